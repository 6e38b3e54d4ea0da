"""Gradient projection (study 3, run 10): no decoder row's gradient has a part along the rows most like it.

It loses its component in the span of its nearest rows (largest |cos|) and of itself: the part along a unit row is taken
away before Adam in any case, which would bring others' back if it were not orthogonal to both. Adam then scales entry
by entry, so the step itself is only nearly orthogonal to them.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.row_projection import nearest_rows, project


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
        sae.W_dec.grad = sae.W_dec.grad.contiguous()
        self.removed = project(sae.W_dec.grad, sae.W_dec.detach(), neighbours)

    def log(self, ctx: Context) -> dict[str, float]:
        """What projecting takes."""
        return {"gradient_projection/removed": self.removed}
