"""Gradient balancing (study 3, run 6): latents with small gradients learn as those with large ones do.

Each row of the encoder's and of the decoder's gradient is multiplied by (mean / (norm + eps)) ** strength, the mean
over the rows of the same matrix that have a gradient. Adam divides by the running size of each entry, so what lasts
of it is the balance between a latent's busy and its quiet batches, and between latents where gradients are clipped.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """How far towards the mean."""

    strength: float = Field(1.0, ge=0, le=1)
    """1: every row's norm becomes the mean; 0: nothing changes."""
    eps: float = Field(1e-8, gt=0)
    """Added to each norm."""
    limit: float = Field(10.0, ge=1)
    """Largest factor; its inverse is the smallest."""


@ingredient("gradient_balancing", Config)
class GradientBalancing(Ingredient):
    """Changes lengths of gradient rows, not their directions."""

    def on_gradients(self, sae: SparseAutoencoder, ctx: Context) -> None:
        """Scale the rows of both weight matrices' gradients; a row without a gradient stays without."""
        for weights in (sae.W_enc, sae.W_dec):
            weights.grad.mul_(self._factors(weights.grad.norm(dim=1))[:, None])

    def _factors(self, norms: Tensor) -> Tensor:
        given, limit = norms > 0, self.config.limit
        mean = norms.sum() / given.sum().clamp_min(1)
        factors = (mean / (norms + self.config.eps)) ** self.config.strength
        return torch.where(given, factors.clamp(1 / limit, limit), 1.0)
