"""A controller on the weight of a sparsity penalty: ``target_l0`` for architectures that have no k."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from sae_lib.sae.context import Context

SETTLED, GAIN, AHEAD, DYING = 0.25, 10.0, 2.0, -0.7
"""Share of training before control begins; largest change of the weight's logarithm over a run; how far the trend is
followed (in units of about 40 steps); the log L0 against its target from which control begins at once."""


class SparsityControl:
    """Part of an architecture whose config has a weight, ``l1_warmup``, ``target_l0`` and ``start_l0``."""

    weight_name: ClassVar[str] = "l1"
    """The parameter that holds the weight."""
    starts_at: ClassVar[float] = 4.0
    """Times ``target_l0``: the L0 that training starts with where none is named."""
    state = ("log_factor", "fast", "slow")
    log_factor = 0.0
    """The controller's correction of the weight, as a logarithm."""
    fast: float | None = None
    slow: float | None = None
    """Running means of log L0 over about 10 and 50 steps: their difference is the trend."""

    @torch.no_grad()
    def calibrate(self, sae, x: Tensor) -> None:
        """Set each latent's threshold (or bias) so that it is active on its share of ``x`` (B, D), L0 being start_l0.

        From weights alone half of all latents would be active: every early step would be dense, and most of a short
        run would go into closing them.
        """
        start = self.start_l0 or (self.target_l0 and self.starts_at * self.target_l0)
        if start and start < sae.d_sae:
            rank = max(1, round(len(x) * start / sae.d_sae))
            pre_acts = sae.kernel.pre_activations(x, sae)
            self.close_below(sae, pre_acts.kthvalue(len(x) - rank + 1, dim=0).values.clamp_min(0))

    def close_below(self, sae, bound: Tensor) -> None:
        """Make pre-activations under ``bound`` (F,) inactive: here by the bias."""
        sae.b_enc -= bound

    def weight(self, progress: float) -> float:
        """The weight in force: linear warm-up, times the controller's correction."""
        warm = min(1.0, progress / self.l1_warmup) if self.l1_warmup else 1.0
        return getattr(self, self.weight_name) * warm * math.exp(self.log_factor)

    def after_step(self, ctx: Context) -> None:
        """With ``target_l0``: move the log weight by where L0 is heading, log(L0 / target) plus its trend.

        L0 answers the weight late, most of all while the learning rate warms up: an integral of the error alone winds
        up until every latent is dead. Where L0 is off but on its way, the weight rests.
        """
        if not self.target_l0:
            return
        now = math.log(max(ctx.codes.l0(), 1e-2))
        self.fast = now if self.fast is None else self.fast + 0.1 * (now - self.fast)
        self.slow = now if self.slow is None else self.slow + 0.02 * (now - self.slow)
        ahead = self.fast - math.log(self.target_l0) + AHEAD * (self.fast - self.slow)
        if ctx.progress < SETTLED and ahead > DYING:
            return
        # The gain is spread over the run, so that short and long runs move alike.
        change = GAIN / max(1, ctx.total_steps) * max(-1.0, min(1.0, ahead))
        self.log_factor += change
        self.moved(ctx, change)

    def moved(self, ctx: Context, change: float) -> None:
        """What else follows a move of the log weight."""

    def log(self) -> dict[str, float]:
        """The controller's correction."""
        return {f"value/{self.weight_name}.factor": math.exp(self.log_factor)}
