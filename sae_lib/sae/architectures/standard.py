"""Standard: ReLU latents under an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import math

from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.codes import Codes, Dense
from sae_lib.sae.context import Context


@architectures.register
class Standard(architectures.Architecture):
    """``l1 * sum_i f_i |W_dec_i|`` after a linear warm-up; ``target_l0`` moves l1 until L0 fits.

    The April 2024 update's form: the penalty counts the decoder's norms, which are 1 here.
    """

    name = "standard"
    uses = frozenset({"l1", "l1_warmup", "target_l0"})
    state = ("log_factor", "mean_l0")
    log_factor = 0.0
    """The controller's correction of l1, as a logarithm."""
    mean_l0: float | None = None
    """Running mean of the batch's L0."""

    def select(self, pre_acts: Tensor) -> Codes:
        """ReLU of (B, F)."""
        return Dense(pre_acts.relu())

    def weight(self, progress: float) -> float:
        """The L1 weight in force."""
        warm = min(1.0, progress / self.l1_warmup) if self.l1_warmup else 1.0
        error = math.log(self.mean_l0 / self.target_l0) if self.target_l0 and self.mean_l0 else 0.0
        return self.l1 * warm * math.exp(self.log_factor + PROPORTIONAL * _clamp(error))

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """The sparsity penalty, averaged over tokens."""
        penalty = (ctx.codes.values * ctx.sae.W_dec.norm(dim=1)).sum(1).mean()
        return {"l1": self.weight(ctx.progress) * penalty}

    def after_step(self, ctx: Context) -> None:
        """With ``target_l0``: a proportional-integral controller on log l1, driven by log(L0 / target)."""
        if not self.target_l0:
            return
        l0 = max(ctx.codes.l0(), 1e-3)
        self.mean_l0 = l0 if self.mean_l0 is None else 0.9 * self.mean_l0 + 0.1 * l0
        # The whole integral gain is spread over the run, so that short and long runs move alike.
        gain = INTEGRAL / max(1, ctx.total_steps)
        self.log_factor += gain * _clamp(math.log(self.mean_l0 / self.target_l0))

    def log(self) -> dict[str, float]:
        """The controller's correction."""
        return {"value/l1.factor": math.exp(self.log_factor)}


PROPORTIONAL, INTEGRAL = 0.5, 40.0
"""Gains of the controller: chosen so that L0 ends within 10 % of its target from an l1 ten times off."""


def _clamp(error: float) -> float:
    return max(-2.0, min(2.0, error))
