"""Gradient projection (study 3, run 10): a decoder row moves across the rows most like it, never along them.

Each row's gradient loses its component in the span of its nearest rows (largest |cos|) and of itself: Adam takes the
part along a unit row away in any case, and would bring others' back if it were not orthogonal to both.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from pydantic import Field
from torch import Tensor

from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient

BLOCK = 1024
"""Rows that are compared with all others at a time."""
PASSES = 2
"""The second removes what rounding left where rows are nearly parallel."""
DEPENDENT = 1e-7
"""Of a unit row, the squared part outside the span of the rows before it, under which it adds nothing to the span."""


class Config(IngredientConfig):
    """Which rows are spared."""

    neighbours: int = Field(4, ge=1, le=8)
    every: int = Field(100, ge=1)
    """Steps between searches; one costs as much as an encoder product over F tokens."""


@ingredient("gradient_projection", Config)
class GradientProjection(Ingredient):
    """Keeps each row's neighbours between searches."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state["neighbours"] = torch.zeros(d_sae, min(config.neighbours, d_sae - 1), dtype=torch.int64)
        self.removed = 0.0
        """Share of the last gradient's squared norm that was taken away, the part along each row itself included."""

    def on_gradients(self, sae: SparseAutoencoder, ctx: Context) -> None:
        """Search where it is time to, and project."""
        neighbours = self.state["neighbours"]
        if ctx.step % self.config.every == 0:
            neighbours.copy_(nearest_rows(sae.W_dec, neighbours.shape[1]))
        gradient = sae.W_dec.grad.contiguous()
        before = float(gradient.square().sum())
        project(gradient, sae.W_dec.detach(), neighbours)
        sae.W_dec.grad = gradient
        self.removed = 1 - float(gradient.square().sum()) / before if before else 0.0

    def log(self, ctx: Context) -> dict[str, float]:
        """What projecting takes."""
        return {"gradient_projection/removed": self.removed}


@torch.no_grad()
def nearest_rows(rows: Tensor, count: int) -> Tensor:
    """(F, count) int64: of each of ``rows`` (F, D) the others with the largest |cos|, by blocks."""
    unit, found = torch.nn.functional.normalize(rows, dim=1), []
    for start in range(0, len(unit), BLOCK):
        cos = (unit[start:start + BLOCK] @ unit.T).abs_()
        cos.diagonal(start).fill_(-1)
        found.append(cos.topk(count, dim=1).indices)
    return torch.cat(found)


def project(gradient: Tensor, rows: Tensor, neighbours: Tensor) -> None:
    """Take from each row of ``gradient`` (F, D), in place, its part in the span of that row and its ``neighbours``."""
    if gradient.device.type == "cpu":
        _project(gradient.numpy(), rows.contiguous().numpy(), neighbours.numpy())
        return
    for start in range(0, len(rows), BLOCK):
        part, own = gradient[start:start + BLOCK], rows[start:start + BLOCK, None]
        basis = torch.cat([own, rows[neighbours[start:start + BLOCK]]], 1)
        inverse = torch.linalg.pinv((basis @ basis.mT).double(), rtol=DEPENDENT, hermitian=True).to(part.dtype)
        for _ in range(PASSES):
            part -= (basis.mT @ (inverse @ (basis @ part[..., None])))[..., 0]


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _project(gradient, rows, neighbours):
    """By the Gram matrix of the few rows and its Cholesky factor in float64; rows without a gradient are passed over."""
    count = neighbours.shape[1] + 1
    for f in prange(len(rows)):
        g = gradient[f]
        if not g.any():
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
