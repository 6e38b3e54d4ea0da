"""Gradients without their part along the rows most like each row: the search for those rows, and the projection."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

BLOCK = 1024
"""Rows that are compared with all others at a time."""
PASSES = 2
"""The second removes what rounding left where rows are nearly parallel."""
DEPENDENT = 1e-7
"""Of a unit row, the squared part outside the span of the rows before it, under which it adds nothing to the span."""


@torch.no_grad()
def nearest_rows(rows: Tensor, count: int) -> Tensor:
    """(F, count) int64: of each of ``rows`` (F, D) the others with the largest |cos|, by blocks."""
    unit, found = torch.nn.functional.normalize(rows, dim=1), []
    for start in range(0, len(unit), BLOCK):
        cos = (unit[start:start + BLOCK] @ unit.T).abs_()
        cos.diagonal(start).fill_(-1)
        found.append(cos.topk(count, dim=1).indices)
    return torch.cat(found)


def project(gradient: Tensor, rows: Tensor, neighbours: Tensor) -> float:
    """Take from each row of ``gradient`` (F, D), in place, its part in the span of that row and its ``neighbours``.

    The share of the gradient's squared norm that was taken.
    """
    if gradient.device.type == "cpu":
        squares = np.zeros((len(rows), 2))
        _project(gradient.numpy(), rows.contiguous().numpy(), neighbours.numpy(), squares)
        before, after = squares.sum(0)
        return 1 - after / before if before else 0.0
    before = float(gradient.square().sum())
    project_by_torch(gradient, rows, neighbours)
    return 1 - float(gradient.square().sum()) / before if before else 0.0


def project_by_torch(gradient: Tensor, rows: Tensor, neighbours: Tensor) -> None:
    """The same by torch's batched operations, for other devices than a CPU."""
    for start in range(0, len(rows), BLOCK):
        part, own = gradient[start:start + BLOCK], rows[start:start + BLOCK, None]
        basis = torch.cat([own, rows[neighbours[start:start + BLOCK]]], 1)
        inverse = torch.linalg.pinv((basis @ basis.mT).double(), rtol=DEPENDENT, hermitian=True).to(part.dtype)
        for _ in range(PASSES):
            part -= (basis.mT @ (inverse @ (basis @ part[..., None])))[..., 0]


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _project(gradient, rows, neighbours, squares):
    """By the Gram matrix of the rows and its Cholesky factor in float64. Rows without a gradient are passed over."""
    count = neighbours.shape[1] + 1
    for f in prange(len(rows)):
        g = gradient[f]
        squares[f, 0] = _dot(g, g)
        if squares[f, 0] == 0:
            continue
        own, lower, c = np.empty(count, np.int64), np.zeros((count, count)), np.empty(count)
        own[0], own[1:] = f, neighbours[f]
        for i in range(count):
            for j in range(i + 1):
                lower[i, j] = _dot(rows[own[i]], rows[own[j]])
        for i in range(count):
            length = lower[i, i]
            for j in range(i + 1):
                for k in range(j):
                    lower[i, j] -= lower[i, k] * lower[j, k]
                if j < i:
                    lower[i, j] = lower[i, j] / lower[j, j] if lower[j, j] > 0 else 0.0
            lower[i, i] = np.sqrt(lower[i, i]) if lower[i, i] > DEPENDENT * length else 0.0
        for _ in range(PASSES):
            for i in range(count):
                c[i] = _dot(rows[own[i]], g)
            _solve(lower, c)
            for i in range(count):
                row, factor = rows[own[i]], g.dtype.type(c[i])
                for d in range(g.size):
                    g[d] -= factor * row[d]
        squares[f, 1] = _dot(g, g)


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _dot(a, b):
    total = a.dtype.type(0)
    for d in range(a.size):
        total += a[d] * b[d]
    return total


@njit(nogil=True, cache=True)
def _solve(lower, c):
    """c becomes (L L^T)^-1 c; a row that adds nothing to the span (0 on the diagonal) gets 0."""
    count = c.size
    for i in range(count):
        for k in range(i):
            c[i] -= lower[i, k] * c[k]
        c[i] = c[i] / lower[i, i] if lower[i, i] > 0 else 0.0
    for i in range(count - 1, -1, -1):
        for k in range(i + 1, count):
            c[i] -= lower[k, i] * c[k]
        c[i] = c[i] / lower[i, i] if lower[i, i] > 0 else 0.0
