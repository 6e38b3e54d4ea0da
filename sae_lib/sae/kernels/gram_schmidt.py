"""Codes for orthonormalised decoder rows: per token, Gram-Schmidt over the rows of the strongest latents.

With W_A the rows of a token's m strongest latents in descending order, G = W_A W_A^T + eps I = L L^T and Q = L^-1 W_A
(modified Gram-Schmidt in one step), f Q = c W_A with c = L^-T f: other codes for the same rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_lib.sae.codes import CSR, Codes, Dense, FixedK
from sae_lib.sae.kernels.tile import ROWS


def orthonormal_codes(codes: Codes, rows: Tensor, latents: int, eps: float) -> Codes:
    """The same active latents with c for f, for decoder ``rows`` (F, D); those beyond the ``latents`` strongest keep f.

    The order carries no gradient; of equal latents the lower number comes first. Values may be negative.
    """
    if isinstance(codes, Dense):
        given = codes.csr()
        found = orthonormal_codes(given, rows, latents, eps)
        return Dense(codes.values.masked_scatter(codes.values > 0, found.values))
    offsets, indices, values = flat(codes)
    most = min(latents, int(offsets.diff().max()) if len(offsets) > 1 else 0)
    if not most:
        return codes
    compiled = rows.device.type == "cpu" and rows.dtype == values.dtype == torch.float32
    form = _GramSchmidt.apply if compiled else by_torch
    return codes.with_values(form(offsets, indices, values, rows, most, eps).view_as(codes.values))


def flat(codes: FixedK | CSR) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (B + 1,), indices (N,) and values (N,); slots that are inactive stay among them."""
    if isinstance(codes, CSR):
        return codes.offsets, codes.indices, codes.values
    count, slots = codes.indices.shape
    offsets = torch.arange(count + 1, device=codes.indices.device) * slots
    return offsets, codes.indices.flatten(), codes.values.flatten()


def strongest(offsets: Tensor, indices: Tensor, values: Tensor, most: int) -> Tensor:
    """(B, most) entries of each token's largest positive values, in order; -1 where there are fewer."""
    values, counts = values.detach(), offsets.diff()
    token = torch.arange(len(counts), device=offsets.device).repeat_interleave(counts)
    order = indices.argsort(stable=True)
    order = order[values[order].argsort(descending=True, stable=True)]
    order = order[token[order].argsort(stable=True)]
    rank = torch.arange(len(order), device=order.device) - offsets[token]
    kept = (rank < most) & (values[order] > 0)
    places = offsets.new_full((len(counts), most), -1)
    places[token[kept], rank[kept]] = order[kept]
    return places


def by_torch(offsets: Tensor, indices: Tensor, values: Tensor, rows: Tensor, most: int, eps: float) -> Tensor:
    """c (N,) by torch's batched operations and their gradients: for other devices and precisions."""
    places = strongest(offsets, indices, values, most)
    taken, entries = places >= 0, places.clamp_min(0)
    f = values[entries] * taken
    own = rows[indices[entries]] * taken[..., None]
    # A missing latent has a row of zeros and a 1 on the diagonal: it meets no other and its code is 0.
    gram = own @ own.mT + torch.diag_embed(torch.where(taken, rows.new_tensor(eps), 1.0))
    lower = torch.linalg.cholesky(gram)
    c = torch.linalg.solve_triangular(lower.mT, f[..., None].to(rows.dtype), upper=True)[..., 0]
    return values.index_put((entries[taken],), c[taken].to(values.dtype))


class _GramSchmidt(torch.autograd.Function):
    """The compiled form; what it keeps for the gradient is (B, m, m)."""

    @staticmethod
    def forward(ctx, offsets, indices, values, rows, most, eps):
        from sae_lib.sae.kernels import gram_schmidt_cpu as loops

        count, size = len(offsets) - 1, -(-most // ROWS) * ROWS
        places = torch.empty(count, most, dtype=torch.int64)
        latents = torch.full((count, size), len(rows))
        inverse, codes = torch.empty(count, size, size), values.clone()
        loops.forward(*(part.contiguous().numpy() for part in (offsets, indices, values, rows)), np.float32(eps),
                      places.numpy(), latents.numpy(), inverse.numpy(), codes.numpy())
        ctx.save_for_backward(values, rows, places, latents, inverse)
        return codes

    @staticmethod
    def backward(ctx, grad):
        from sae_lib.sae.kernels import gram_schmidt_cpu as loops

        values, rows, places, latents, inverse = ctx.saved_tensors
        slopes, d_values, d_rows = torch.empty_like(inverse), grad.clone(), None
        loops.backward_codes(places.numpy(), inverse.numpy(), values.detach().contiguous().numpy(),
                             grad.contiguous().numpy(), slopes.numpy(), d_values.numpy())
        if ctx.needs_input_grad[3]:
            d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
            loops.backward_rows(rows.detach().contiguous().numpy(), latents.numpy(), slopes.numpy(), d_rows.numpy())
        return None, None, d_values, d_rows, None, None
