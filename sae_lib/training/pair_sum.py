"""Sums over pairs of decoder rows: exact and blocked, or within chunks, with a gradient that costs one product."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_sum(rows: Tensor, chunks: Tensor | None, compete, through: bool, block: int) -> Tensor:
    """sum over i != j of c_ij cos_ij^2 for ``rows`` (F, D): all pairs, or those within each of ``chunks`` (n, size).

    ``compete`` maps |cos| to c (None: 1). Without a gradient through c the backward costs one product, since
    the sum is symmetric: d / d u_i = 4 sum_j c_ij cos_ij u_j.
    """
    if through and compete is not None:
        unit = torch.nn.functional.normalize(rows[None] if chunks is None else rows[chunks], dim=-1)
        cos = unit @ unit.transpose(1, 2)
        off = 1 - torch.eye(cos.shape[1], dtype=cos.dtype, device=cos.device)
        return (compete(cos.abs()) * cos.square() * off).sum()
    if chunks is None:
        return _AllPairs.apply(torch.nn.functional.normalize(rows, dim=1), compete, block)
    return _PairsOfChunks.apply(rows, chunks, compete)


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, compete, block):
        gradient, total = torch.empty_like(unit), unit.new_zeros(())
        for start in range(0, len(unit), block):
            cos = unit[start:start + block] @ unit.T
            cos.diagonal(start).zero_()
            weighted = cos if compete is None else compete(cos.abs()) * cos
            total += (weighted * cos).sum()
            gradient[start:start + block] = weighted @ unit
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad * 4 * ctx.saved_tensors[0], None, None


class _PairsOfChunks(torch.autograd.Function):
    """A chunk at a time stays in the cache, and the gradient is of its rows alone: no pass over (F, D)."""

    @staticmethod
    def forward(ctx, rows, chunks, compete):
        gradient, total = rows.new_empty(*chunks.shape, rows.shape[1]), rows.new_zeros(())
        for number, chunk in enumerate(chunks):
            unit = rows.index_select(0, chunk)
            norms = unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
            unit /= norms
            cos = unit @ unit.T
            cos.diagonal().zero_()
            weighted = cos if compete is None else compete(cos.abs()) * cos
            own = (weighted * cos).sum(1, keepdim=True)
            total += own.sum()
            torch.sub(weighted @ unit, own * unit, out=gradient[number])  # a row's direction, not its length
            gradient[number] /= norms
        ctx.save_for_backward(gradient, chunks)
        ctx.shape = rows.shape
        return total

    @staticmethod
    def backward(ctx, grad):
        gradient, chunks = ctx.saved_tensors
        return torch.sparse_coo_tensor(chunks.view(1, -1), (grad * 4 * gradient).flatten(0, 1), ctx.shape,
                                       is_coalesced=True, check_invariants=False), None, None
