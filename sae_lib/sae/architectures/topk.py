"""TopK: the k largest pre-activations of each token (Gao et al. 2024, "Scaling and evaluating SAEs")."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.codes import Codes
from sae_lib.sae.context import Context
from sae_lib.sae.kernels.reference import select_topk


@architectures.register
class TopK(architectures.Architecture):
    """k latents per token; dead ones are revived by the auxiliary loss."""

    name = "topk"
    uses = frozenset({"k", "aux_k", "aux_weight", "aux_dead_after"})
    sparse = True

    @classmethod
    def from_params(cls, p, d_in: int) -> TopK:
        """``aux_k`` is half the model's width where none is named (Gao et al., appendix A.2)."""
        aux_k = d_in // 2 if p.aux_k is None else p.aux_k
        return cls(k=p.k, aux_k=aux_k, aux_weight=p.aux_weight)

    def density(self, d_sae: int) -> float:
        """k / F."""
        return self.k / d_sae

    def config(self) -> dict[str, Any]:
        """k alone decides which latents are active."""
        return {"k": self.k}

    def select(self, pre_acts: Tensor, ctx: Context) -> Codes:
        """The k largest of each row of (B, F), through ReLU."""
        return select_topk(pre_acts, self.k)

    def encode(self, ctx: Context, kernel) -> Codes:
        """The same by a kernel."""
        return kernel.topk(ctx.x, ctx.sae, self.k)

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """AuxK: dead latents reconstruct what the live ones left (the residual is a constant to it)."""
        if not self.aux_k or not self.aux_weight or ctx.dead is None or not ctx.dead.any():
            return {}
        return {"auxk": self.aux_weight * auxiliary_loss(ctx, self.aux_k)}


def auxiliary_loss(ctx: Context, aux_k: int) -> Tensor:
    """|e - e_hat|^2 per token, e the detached residual, e_hat decoded from the ``aux_k`` strongest dead latents.

    Gao et al. 2024, appendix A.2. The gradient reaches the dead latents' encoder and decoder rows; ``b_dec``
    enters through the encoder alone, so it is counted once. Only rows of dead latents are touched.
    """
    sae, dead = ctx.sae, ctx.dead.nonzero()[:, 0]
    codes = sae.kernel.topk_among(ctx.x, sae, aux_k, dead)
    residual = (ctx.x - ctx.reconstruction).detach()
    rows = sae.W_dec.index_select(0, dead)
    return architectures.squared_error(residual, sae.kernel.decode(codes, rows), ctx.importance)
