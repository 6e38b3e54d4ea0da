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

    The April 2024 update's form: the penalty counts the decoder's norms. Rows are of unit norm, and the gradient
    along them is projected away, so the norms are left out.
    """

    name = "standard"
    uses = frozenset({"l1", "l1_warmup", "target_l0"})
    sparse = True
    state = ("log_factor", "fast", "slow")
    log_factor = 0.0
    """The controller's correction of l1, as a logarithm."""
    fast: float | None = None
    slow: float | None = None
    """Running means of log L0 over about 10 and 50 steps: their difference is the trend."""

    def select(self, pre_acts: Tensor) -> Codes:
        """ReLU of (B, F)."""
        return Dense(pre_acts.relu())

    def encode(self, x: Tensor, sae, kernel) -> Codes:
        """The same by a kernel: ragged where few are active."""
        return kernel.relu(x, sae)

    def weight(self, progress: float) -> float:
        """The L1 weight in force."""
        warm = min(1.0, progress / self.l1_warmup) if self.l1_warmup else 1.0
        return self.l1 * warm * math.exp(self.log_factor)

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """The sparsity penalty, averaged over tokens."""
        return {"l1": self.weight(ctx.progress) * ctx.codes.values.sum() / len(ctx.x)}

    def after_step(self, ctx: Context) -> None:
        """With ``target_l0``: move log l1 by where L0 is heading, log(L0 / target) plus its trend.

        L0 answers l1 late, most of all while the learning rate warms up: an integral of the error alone winds up
        until every latent is dead. Where L0 is off but on its way, l1 rests.
        """
        if not self.target_l0:
            return
        now = math.log(max(ctx.codes.l0(), 1e-2))
        self.fast = now if self.fast is None else self.fast + 0.1 * (now - self.fast)
        self.slow = now if self.slow is None else self.slow + 0.02 * (now - self.slow)
        if ctx.progress < SETTLED:
            return
        ahead = self.fast - math.log(self.target_l0) + AHEAD * (self.fast - self.slow)
        # The gain is spread over the run, so that short and long runs move alike.
        self.log_factor += GAIN / max(1, ctx.total_steps) * max(-1.0, min(1.0, ahead))

    def log(self) -> dict[str, float]:
        """The controller's correction."""
        return {"value/l1.factor": math.exp(self.log_factor)}


SETTLED, GAIN, AHEAD = 0.25, 10.0, 2.0
"""Share of training before control begins; largest change of log l1 over a run; how far the trend is followed (in
units of about 40 steps)."""
