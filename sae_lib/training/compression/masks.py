"""Masks over latents: which are kept, by a score, and what they make of codes. F latents, L levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae_lib.sae.codes import Codes, Dense, FixedK

SMALLEST = 1e-6
"""Importance under this share of the mean counts as this, so that its logarithm is finite."""


def kept(ratio: float, n: int) -> int:
    """ceil(ratio n): how many of ``n`` a share keeps."""
    return min(n, max(1, math.ceil(ratio * n - 1e-9)))


def log_importance(importance: Tensor) -> Tensor:
    """(F,) logarithms of importance that is 0 or more, and not all 0."""
    return importance.clamp_min(SMALLEST * float(importance.mean())).log()


def choose(score: Tensor, ratio: float, among: Tensor | None = None) -> tuple[Tensor, float]:
    """The ``ratio`` of highest ``score`` (n,), as (n,) bool, and the bound between them and the others.

    With ``among`` (n,) bool only those are candidates. The bound is minus infinity where all are kept.
    """
    ranked = score.detach() if among is None else score.detach().masked_fill(~among, -math.inf)
    candidates = len(score) if among is None else int(among.sum())
    count = kept(ratio, candidates)
    if count == candidates:
        return torch.ones_like(ranked, dtype=torch.bool) if among is None else among, -math.inf
    best = ranked.topk(count + 1)
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[best.indices[:-1]] = True
    return chosen, float(best.values[-2:].mean())


def mask(score: Tensor, chosen: Tensor, bound: float, kind: str, temperature: float) -> Tensor:
    """(n,) in [0, 1] of ``score`` (n,).

    hard: 1 for the chosen. sigmoid: sigmoid((score - bound) / temperature). gate: hard forward, and the sigmoid's
    gradient (straight-through).
    """
    if kind == "hard":
        return chosen.to(score.dtype)
    soft = torch.sigmoid((score - bound) / temperature)
    return soft if kind == "sigmoid" else chosen.to(score.dtype) + (soft - soft.detach())


def factor(masks: Tensor, skip: float | Tensor, binary: bool = False) -> Tensor:
    """(F,) what latents are multiplied by: the product over levels of clip(m + s, 0, 1), of ``masks`` (L, F) or (F,).

    For a ``binary`` mask the clip is s + (1 - s) m, and has that gradient: through the clip's own, a latent that is
    kept would have none.
    """
    masks = masks if masks.dim() == 2 else masks[None]
    parts = skip + (1 - skip) * masks if binary else (masks + skip).clamp(0, 1)
    return parts[0] if len(parts) == 1 else parts.prod(0)


def of_entries(codes: Codes, vector: Tensor) -> Tensor:
    """What ``vector`` (F,) has for each entry of the codes, in (or broadcast to) the shape of their values."""
    if isinstance(codes, Dense):
        return vector
    return vector.index_select(0, codes.indices.flatten()).view_as(codes.indices)


def totals(codes: Codes) -> Tensor:
    """(F,) the sum of each latent over the tokens, without a gradient."""
    values = codes.values.detach()
    if isinstance(codes, Dense):
        return values.sum(0)
    return values.new_zeros(codes.n_latents).index_add_(0, codes.indices.flatten(), values.flatten())


def tokens(codes: Codes) -> int:
    """B."""
    return len(codes.values) if isinstance(codes, Dense | FixedK) else len(codes.offsets) - 1


def carrying(importance: Tensor, share: float) -> float:
    """The share of latents that together carry ``share`` of the importance (F,), the most important first."""
    carried = importance.sort(descending=True).values.double().cumsum(0)
    return (int((carried < share * carried[-1]).sum()) + 1) / len(importance)
