"""Matryoshka BatchTopK: every prefix of the latents reconstructs alone (Bussmann et al. 2025, "Learning Multi-Level
Features with Matryoshka Sparse Autoencoders", eq. 5: the loss is the sum over prefixes).

A token's entries are in the order of their latents, so a prefix is a run of them: all prefixes cost one decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.architectures.batch_topk import BatchTopK
from sae_lib.sae.codes import CSR
from sae_lib.sae.context import Context
from sae_lib.sae.kernels.prefixes import prefixes


@architectures.register
class MatryoshkaBatchTopK(BatchTopK):
    """``matryoshka_widths``: where prefixes end, as shares of the latents; all of them always come last."""

    name = "matryoshka_batch_topk"
    reconstructions = frozenset({"prefixes"})
    uses = BatchTopK.uses | {"matryoshka_widths"}

    @classmethod
    def from_params(cls, p, d_in: int) -> MatryoshkaBatchTopK:
        """Prefix lengths in latents, each at least one."""
        made = super().from_params(p, d_in)
        made.ends = sorted({max(1, round(share * p.d_sae)) for share in p.matryoshka_widths} | {p.d_sae})
        return made

    def decode(self, ctx: Context, kernel) -> Tensor:
        """The whole reconstruction; in training the sum of the prefixes' errors stands in ``ctx.own``."""
        if not ctx.training:
            return super().decode(ctx, kernel)
        codes = ctx.codes.csr()
        parts = kernel.decode(split(codes, self.ends), ctx.rows)
        whole, ctx.own["prefixes"] = prefixes(parts.view(len(ctx.x), len(self.ends), -1), ctx.x, ctx.sae.b_dec)
        return whole

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """Squared errors of the prefixes short of the whole, summed; and AuxK."""
        return super().losses(ctx) | ({"prefixes": ctx.own["prefixes"]} if len(self.ends) > 1 else {})


def split(codes: CSR, ends: list[int]) -> CSR:
    """The same entries as (B * groups) rows: row b * groups + g holds token b's latents from ends[g - 1] to ends[g]."""
    tokens = len(codes.offsets) - 1
    bounds = torch.tensor(ends, device=codes.indices.device)
    group = torch.bucketize(codes.indices, bounds, right=True)
    counts = torch.bincount(codes.rows() * len(ends) + group, minlength=tokens * len(ends))
    return CSR(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), codes.indices, codes.values, codes.n_latents)
