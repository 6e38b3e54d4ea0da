"""Sums over pairs of decoder rows: exact and blocked, or within chunks, with a gradient that costs one product.

An energy maps cosines and the two sides' latents to each pair's value and its slope d value / d cos; it is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Energy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""energy(cos (n, m), left (n,), right (m,)) -> value and slope (n, m)."""


def mean_over_latents(rows: Tensor, fired: Tensor, config, generator: torch.Generator | None, energy: Energy,
                      by_autograd: bool = False) -> Tensor | None:
    """mean_i sum_{j != i} energy(cos_ij): exact (``config.pairs: all``), or estimated from the latents that ``fired``.

    ``active`` draws a fresh partition of them into chunks of ``config.chunk`` and takes ``config.chunks`` of these at
    most: an unbiased estimate of the mean over their pairs, times F - 1. None where fewer than two fired.
    """
    if config.pairs == "all":
        return pair_sum(rows, None, energy, config.chunk, by_autograd) / len(rows)
    active = fired.nonzero()[:, 0]
    if len(active) < 2:
        return None
    shuffled = active[torch.randperm(len(active), generator=generator).to(active.device)]
    size = config.chunk
    chunks = [shuffled] if len(active) <= size else shuffled[:len(active) // size * size].split(size)
    # Two active latents meet in a drawn chunk with probability pairs / (A (A - 1)); dividing by it estimates the
    # mean over pairs, and F - 1 partners make it the sum over j.
    chunks = torch.stack(chunks[:config.chunks])
    pairs = chunks.numel() * (chunks.shape[1] - 1)
    return pair_sum(rows, chunks, energy, size, by_autograd) * ((len(rows) - 1) / pairs)


def pair_sum(rows: Tensor, chunks: Tensor | None, energy: Energy, block: int, by_autograd: bool = False) -> Tensor:
    """sum over i != j of energy(cos_ij) for ``rows`` (F, D): all pairs, or those within each of ``chunks`` (n, size).

    The backward costs one product, since the sum is symmetric: d / d u_i = 2 sum_j slope_ij u_j, u the unit rows. With
    ``by_autograd`` the energy's value is differentiated instead, and its slope is not asked for.
    """
    if by_autograd:
        ids = torch.arange(len(rows), device=rows.device)[None] if chunks is None else chunks
        unit = torch.nn.functional.normalize(rows[ids], dim=-1)
        cos = unit @ unit.transpose(1, 2)
        off = 1 - torch.eye(cos.shape[1], dtype=cos.dtype, device=cos.device)
        return sum((energy(one, own, own)[0] * off).sum() for one, own in zip(cos, ids))
    if chunks is None:
        return _AllPairs.apply(torch.nn.functional.normalize(rows, dim=1), energy, block)
    return _PairsOfChunks.apply(rows, chunks, energy)


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, energy, block):
        gradient, total = torch.empty_like(unit), unit.new_zeros(())
        ids = torch.arange(len(unit), device=unit.device)
        for start in range(0, len(unit), block):
            cos = unit[start:start + block] @ unit.T
            value, slope = energy(cos, ids[start:start + block], ids)
            value.diagonal(start).zero_()
            slope.diagonal(start).zero_()
            total += value.sum()
            gradient[start:start + block] = slope @ unit
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0], None, None


class _PairsOfChunks(torch.autograd.Function):
    """A chunk at a time stays in the cache, and the gradient is of its rows alone: no pass over (F, D)."""

    @staticmethod
    def forward(ctx, rows, chunks, energy):
        gradient, total = rows.new_empty(*chunks.shape, rows.shape[1]), rows.new_zeros(())
        for number, chunk in enumerate(chunks):
            unit = rows.index_select(0, chunk)
            norms = unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
            unit /= norms
            cos = unit @ unit.T
            value, slope = energy(cos, chunk, chunk)
            value.diagonal().zero_()
            slope.diagonal().zero_()
            total += value.sum()
            along = (slope * cos).sum(1, keepdim=True)
            torch.sub(slope @ unit, along * unit, out=gradient[number])  # a row's direction, not its length
            gradient[number] /= norms
        ctx.save_for_backward(gradient, chunks)
        ctx.shape = rows.shape
        return total

    @staticmethod
    def backward(ctx, grad):
        gradient, chunks = ctx.saved_tensors
        return torch.sparse_coo_tensor(chunks.view(1, -1), (grad * 2 * gradient).flatten(0, 1), ctx.shape,
                                       is_coalesced=True, check_invariants=False), None, None
