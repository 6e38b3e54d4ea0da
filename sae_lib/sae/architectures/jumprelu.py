"""JumpReLU: a threshold per latent, learnt through the width of a band (Rajamanoharan et al. 2024, "Jumping Ahead").

``l0_penalty: step`` is the paper's: the L0 itself, whose gradient reaches the thresholds alone. ``tanh`` is
sum_i tanh(c f_i), c = 4 (Anthropic's update of January 2025): its gradient reaches the encoder too, so that short runs
become sparse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.architectures.sparsity_control import SparsityControl
from sae_lib.sae.codes import Codes, Dense
from sae_lib.sae.context import Context
from sae_lib.sae.kernels.jumprelu import jump, jumprelu
from sae_lib.sae.kernels.reference import select_over

STEEPNESS, FALL = 4.0, 1.0
"""c; and how much of the controller's move the thresholds make."""


@architectures.register
class JumpReLU(SparsityControl, architectures.Architecture):
    """``threshold`` (F,) is kept from falling below 0."""

    name = "jumprelu"
    vectors = ("threshold",)
    uses = frozenset({"l0_weight", "l0_penalty", "l1_warmup", "target_l0", "start_l0", "threshold_start",
                      "bandwidth"})
    weight_name = "l0_weight"
    starts_at = 10.0  # thresholds rise of themselves as latents are learnt, and no penalty brings them down again
    sparse = True
    silent_entries = True  # of pre-activations just under their threshold
    learnt = scales_as_input = frozenset({"threshold"})

    def further(self, d_sae: int) -> dict[str, Tensor]:
        """Every threshold at ``threshold_start``."""
        return {"threshold": torch.full((d_sae,), float(self.threshold_start))}

    def close_below(self, sae, bound: Tensor) -> None:
        """By the threshold."""
        sae.further["threshold"].copy_(bound)

    def select(self, pre_acts: Tensor, ctx: Context) -> Codes:
        """Pre-activations (B, F) over their threshold."""
        threshold = ctx.sae.further["threshold"]
        if not ctx.training:
            return select_over(pre_acts, threshold)
        values, ctx.own["active"] = jump(pre_acts, threshold.expand_as(pre_acts), self.bandwidth)
        return Dense(values)

    def encode(self, ctx: Context, kernel) -> Codes:
        """The same by a kernel: ragged where few are near their threshold."""
        threshold = ctx.sae.further["threshold"]
        if not ctx.training:
            return kernel.over(ctx.x, ctx.sae, threshold)
        codes, ctx.own["active"] = jumprelu(ctx.x, ctx.sae, kernel, threshold, self.bandwidth)
        return codes

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """The sparsity penalty, averaged over tokens."""
        counted = ctx.own["active"] if self.l0_penalty == "step" else torch.tanh(STEEPNESS * ctx.codes.values)
        return {"sparsity": self.weight(ctx.progress) * counted.sum() / len(ctx.x)}

    def moved(self, ctx: Context, change: float) -> None:
        """Where L0 is under its target, thresholds fall: a weaker penalty stops them rising, no more."""
        if change < 0:
            ctx.sae.further["threshold"] *= 1 + FALL * change

    def after_step(self, ctx: Context) -> None:
        """Thresholds stay at 0 or above; the controller moves the weight."""
        ctx.sae.further["threshold"].clamp_(min=0)
        super().after_step(ctx)
