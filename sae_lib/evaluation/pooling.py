"""Sums over blocks of a symmetric F x F matrix whose upper triangle is sparse, without the matrix.

An overview of n x n cells has in each the mean of a measure over the cell's pairs i != j. Pairs that never fired
together have count, rate, Jaccard and lift 0, and count in the mean.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sae_lib.training.coactivation.loops import CHUNKS, COMPILED

MEASURES = ("count", "rate", "Jaccard", "lift")
"""By their number in the compiled loops: n_ij tokens, n / T, n / (n_i + n_j - n), n T / (n_i n_j)."""


@njit(**COMPILED)
def value(measure, both, first, second, tokens):
    """A measure of a pair from its counts."""
    if measure == 0:
        return np.float64(both)
    if measure == 1:
        return both / tokens
    if measure == 2:
        return both / (first + second - both)
    return both * tokens / (np.float64(first) * second)


@njit(**COMPILED, parallel=True)
def pool(starts, columns, counts, own, tokens, cell, n_cells, measure):
    """(n, n) sums of a measure over the pairs i < j of an upper triangle in CSR, by the cells of i and j.

    ``cell`` (F,) is each latent's place in the overview; a negative one is left out. Sums stand at (lower, higher).
    """
    total = np.zeros((CHUNKS, n_cells, n_cells))
    for chunk in prange(CHUNKS):
        for i in range(chunk, starts.size - 1, CHUNKS):
            a = cell[i]
            if a >= 0:
                for place in range(starts[i], starts[i + 1]):
                    j = columns[place]
                    b = cell[j]
                    if j != i and b >= 0:
                        total[chunk, min(a, b), max(a, b)] += value(measure, counts[place], own[i], own[j], tokens)
    return total.sum(0)


@njit(**COMPILED, parallel=True)
def pool_stability(starts, columns, counts, scale, starts2, columns2, counts2, scale2, cell, n_cells):
    """(n, n) sums of min / max of two matrices' rates over pairs i < j that either holds, and the number of those."""
    total, seen = np.zeros((CHUNKS, n_cells, n_cells)), np.zeros((CHUNKS, n_cells, n_cells))
    for chunk in prange(CHUNKS):
        for i in range(chunk, starts.size - 1, CHUNKS):
            p, q, end, end2 = starts[i], starts2[i], starts[i + 1], starts2[i + 1]
            while cell[i] >= 0 and (p < end or q < end2):
                left = columns[p] if p < end else 2**31 - 1
                right = columns2[q] if q < end2 else 2**31 - 1
                j, alike = min(left, right), 0.0
                if left == right:
                    one, other = counts[p] * scale, counts2[q] * scale2
                    alike = min(one, other) / max(one, other)
                p, q = p + (left == j), q + (right == j)
                if j != i and cell[j] >= 0:
                    a, b = min(cell[i], cell[j]), max(cell[i], cell[j])
                    total[chunk, a, b] += alike
                    seen[chunk, a, b] += 1
    return total.sum(0), seen.sum(0)


def mirrored(upper: np.ndarray) -> np.ndarray:
    """The symmetric matrix of sums that stand in the upper triangle."""
    return upper + np.triu(upper, 1).T


def pairs_of(cell: np.ndarray, n_cells: int) -> np.ndarray:
    """(n, n) how many pairs i != j each cell has."""
    sizes = np.bincount(cell[cell >= 0], minlength=n_cells).astype(float)
    pairs = np.outer(sizes, sizes)
    np.fill_diagonal(pairs, sizes * (sizes - 1) / 2)
    return pairs
