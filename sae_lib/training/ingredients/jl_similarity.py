"""A Johnson-Lindenstrauss projection of decoder rows, and how good it is (study 3).

P (D, m) has orthonormal columns from the QR of a Gaussian, scaled by sqrt(D / m): lengths are kept on average. Others
read ``ctx.own["projection"]``. The random projection adds noise of sqrt((1 - m/D) / m) to a cosine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """Into how many dimensions."""

    dims: int = Field(128, ge=1)
    """m"""
    sampled_pairs: int = Field(20_000, ge=100)
    """Pairs of rows that the projection is judged by at the end."""


@ingredient("jl_similarity", Config)
class JLSimilarity(Ingredient):
    """State ``projection`` (D, m), drawn once."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        drawn = torch.randn(d_in, min(config.dims, d_in), generator=generator, dtype=torch.float64)
        dims = drawn.shape[1]
        self.state = {"projection": (torch.linalg.qr(drawn).Q * math.sqrt(d_in / dims)).float()}

    def before_step(self, ctx) -> None:
        """Publish the projection."""
        ctx.own["projection"] = self.state["projection"]

    def measures(self, sae, x) -> dict[str, Any]:
        """Distances and cosines of random pairs of rows, projected beside exact; and what the projection has lost."""
        g = torch.Generator().manual_seed(0)
        rows = torch.nn.functional.normalize(sae.W_dec.detach().cpu().double(), dim=1)
        return quality(rows, self.state["projection"].cpu().double(), self.config.sampled_pairs, g)


def quality(rows: Tensor, projection: Tensor, pairs: int, generator: torch.Generator) -> dict[str, Any]:
    """How far ``rows`` (F, D) by ``projection`` (D, m) keep distances and cosines, over random ``pairs``.

    ``eps``: that for which |ratio of squared distances - 1| <= eps is promised for all pairs of F points,
    sqrt(8 ln F / m) (Johnson & Lindenstrauss 1984, in the common form); above 1 it promises nothing.
    ``lost``: share of the rows' energy that no linear map brings back from the projection.
    """
    left, right = (torch.randint(len(rows), (pairs,), generator=generator) for _ in range(2))
    left, right = left[left != right], right[left != right]
    small, dims = rows @ projection, projection.shape[1]
    squared = (rows[left] - rows[right]).square().sum(1)
    distortion = (small[left] - small[right]).square().sum(1) / squared.clamp_min(1e-12) - 1
    unit = torch.nn.functional.normalize(small, dim=1)
    noise = (unit[left] * unit[right]).sum(1) - (rows[left] * rows[right]).sum(1)
    back = small @ torch.linalg.pinv(projection)
    counts, edges = torch.histogram(distortion.clamp(-1, 1), bins=80, range=(-1.0, 1.0))
    cosines, places = torch.histogram(noise.clamp(-0.5, 0.5), bins=100, range=(-0.5, 0.5))
    return {"dims": dims, "of": rows.shape[1], "pairs": len(left), "eps": math.sqrt(8 * math.log(len(rows)) / dims),
            "distortion": {"worst": float(distortion.abs().max()), "p99": float(distortion.abs().quantile(0.99)),
                           "edges": edges.tolist(), "counts": counts.tolist()},
            "cosine_noise": {"std": float(noise.std()), "expected": math.sqrt((1 - dims / rows.shape[1]) / dims),
                             "edges": places.tolist(), "counts": cosines.tolist()},
            "lost": float((rows - back).square().sum() / rows.square().sum())}
