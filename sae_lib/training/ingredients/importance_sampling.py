"""Importance-sampled batches (study 3): of a pool of activations those far from the bias are drawn more often.

Drawn with probability proportional to |x - b_dec| / mean + floor, which bounds the size of a token's gradient, and the
loss divided by it: its expectation is the evenly drawn pool's (Katharopoulos & Fleuret 2018, section 3).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """How many to choose from, and how evenly."""

    pool: int = Field(2, ge=2)
    """Batches' worth of activations that a batch is chosen from: the data are read so many times faster."""
    floor: float = Field(0.5, gt=0)
    """Weight that every token has, beside its own of 1 on average: no token counts more than (1 + floor) / floor."""


@ingredient("importance_sampling", Config)
class ImportanceSampling(Ingredient):
    """Reconstruction, L1, bounds, lasso are reweighted; terms over pairs of latents see the batch as drawn."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.pool = config.pool

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """Losses that are not reweighted, and text whose order would be lost."""
        if p.architecture not in ("topk", "standard"):
            return f"losses of architecture '{p.architecture}' are not reweighted; use topk or standard"
        if p.order != "shuffled":
            return "it draws tokens one by one, so their order is lost; set order: shuffled"
        return None

    def sampling_weights(self, x: Tensor, sae) -> Tensor:
        """(P,) for activations (P, D)."""
        size = (x - sae.b_dec.detach()).norm(dim=1)
        return size / size.mean().clamp_min(1e-12) + self.config.floor

    def log(self, ctx) -> dict[str, float]:
        """The weights' spread: tokens that the batch is worth, as a share (Kish 1965)."""
        weight = ctx.importance
        return {"value/importance_sampling.effective": float(weight.sum() ** 2 / weight.square().sum() / len(weight))}
