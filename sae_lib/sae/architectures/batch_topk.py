"""BatchTopK: the B k largest of a batch, so that tokens share their latents (Bussmann et al. 2024, "BatchTopK Sparse
Autoencoders"). Outside training a threshold stands for the batch: the running mean of each batch's least value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.architectures.topk import TopK
from sae_lib.sae.codes import Codes
from sae_lib.sae.context import Context
from sae_lib.sae.kernels.reference import select_batch_topk, select_over

MOVES, SHARE = 0.01, 20
"""Weight of a batch in the running mean; in a short run, where values still move, a twentieth of its steps count."""


@architectures.register
class BatchTopK(TopK):
    """Trained as TopK is, AuxK included; saved for SAELens as the JumpReLU SAE that it then computes."""

    name = "batch_topk"
    vectors = ("threshold",)
    lens = "jumprelu"
    scales_as_input = frozenset({"threshold"})
    state = ("seen",)
    seen = 0
    """Batches that the threshold has seen."""

    def further(self, d_sae: int) -> dict[str, Tensor]:
        """One threshold, for all latents the same."""
        return {"threshold": torch.zeros(d_sae)}

    def select(self, pre_acts: Tensor, ctx: Context) -> Codes:
        """The largest of (B, F) through ReLU; outside training those over the threshold."""
        if ctx.training:
            return select_batch_topk(pre_acts, self.k)
        return select_over(pre_acts, ctx.sae.further["threshold"])

    def encode(self, ctx: Context, kernel) -> Codes:
        """The same by a kernel."""
        if ctx.training:
            return kernel.batch_topk(ctx.x, ctx.sae, self.k)
        return kernel.over(ctx.x, ctx.sae, ctx.sae.further["threshold"])

    def after_step(self, ctx: Context) -> None:
        """Move the threshold toward the batch's least active value."""
        values = ctx.selected.values.detach()
        active = values[values > 0]
        if len(active):
            threshold, least = ctx.sae.further["threshold"], active.min()
            threshold += max(MOVES, SHARE / ctx.total_steps, 1 / (self.seen + 1)) * (least - threshold)
            self.seen += 1

    def log(self) -> dict[str, Any]:
        """Nothing that changes by plan."""
        return {}
