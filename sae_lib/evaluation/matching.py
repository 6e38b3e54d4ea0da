"""Latents of two SAEs matched by their decoder rows, and what differs between matched pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lib import runs
from sae_lib.evaluation import pairs
from sae_lib.evaluation.pairs import Snapshot
from sae_lib.sae import kernels

ROWS, LEAST = 512, 0.5


class Match(NamedTuple):
    """Mutual nearest neighbours of two dictionaries."""

    partner: np.ndarray
    """(F,) of each latent of the first its partner in the second; -1 where it has none."""
    cosine: np.ndarray
    """(F,) with its nearest in the second, mutual or not."""

    @property
    def share(self) -> float:
        """Share of the first's latents that have a partner."""
        return float((self.partner >= 0).mean())


def match(first: Tensor, second: Tensor) -> Match:
    """Match unit decoder rows (F, D) with (G, D): i and j where each is the other's nearest by cosine.

    A cosine under LEAST makes no pair. Raises RunError where the widths of the model differ. Cosines are in bfloat16
    where that is faster; of the pairs found they are computed anew in float32.
    """
    forward, backward = nearest(first, second)
    cosine = (first * second[forward]).sum(1)
    mutual = (backward[forward] == torch.arange(len(first))) & (cosine >= LEAST)
    return Match(torch.where(mutual, forward, -1).numpy(), cosine.numpy())


def nearest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) and (G,) the nearest row of the other, of unit rows (F, D) and (G, D); never more than ROWS x G cosines.

    Raises RunError where the widths of the model differ. In bfloat16 where that is faster.
    """
    if first.shape[1] != second.shape[1]:
        raise runs.RunError(f"decoder rows have {first.shape[1]} and {second.shape[1]} dimensions: not of one model")
    best, forward = torch.full((len(second),), -2.0, device=first.device), []
    backward = torch.zeros(len(second), dtype=torch.int64, device=first.device)
    precision = kernels.precision_of("auto", first.device.type)
    a, b = (part.to(precision) for part in (first, second))
    for start in range(0, len(first), ROWS):
        cosines = (a[start:start + ROWS] @ b.T).float()
        forward.append(cosines.argmax(1))
        top, place = cosines.max(0)
        better = top > best
        best[better], backward[better] = top[better], place[better] + start
    return torch.cat(forward), backward


def overview_difference(one: Snapshot, other: Snapshot, matched: Match, measure: str, cell: np.ndarray,
                        before: tuple[Snapshot | None, Snapshot | None] = (None, None)) -> np.ndarray:
    """(n, n) mean over a cell's matched pairs in ``one`` less that in ``other``; who has no partner is left out."""
    own = np.where(matched.partner >= 0, cell, -1)
    theirs = np.full(other.matrix.shape[0], -1, np.int64)
    theirs[matched.partner[matched.partner >= 0]] = cell[matched.partner >= 0]
    return _padded(pairs.overview(one, measure, own, before[0]), cell) - _padded(
        pairs.overview(other, measure, theirs, before[1]), cell)


def _padded(found: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """With the cells at the end in which nothing is matched."""
    missing = int(cell.max()) + 1 - len(found)
    return np.pad(found, (0, missing), constant_values=np.nan)


def block_difference(one: Snapshot, other: Snapshot, matched: Match, chosen: np.ndarray, measure: str,
                     before: tuple[Snapshot | None, Snapshot | None] = (None, None)) -> np.ndarray:
    """(n, n) a measure among ``chosen`` latents less that among their partners; NaN where one has none."""
    partners = matched.partner[chosen]
    known = np.flatnonzero(partners >= 0)
    theirs, order = np.unique(partners[known], return_inverse=True)
    found = np.full((len(chosen), len(chosen)), np.nan)
    if len(known):
        beside = pairs.block(other, theirs, measure, before[1])[np.ix_(order, order)]
        found[np.ix_(known, known)] = pairs.block(one, chosen, measure, before[0])[np.ix_(known, known)] - beside
    return found
