"""Learning rates by group (study 3): groups that gain importance learn faster, within a limit.

Importance of a group is its share of the batch's latent norm, followed by a running mean (its momentum); the rates are
(importance / mean importance)^power, clipped. They multiply the optimiser's steps: Adam would undo scaled gradients.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """How strongly rates follow importance."""

    beta: float = Field(0.9, ge=0, lt=1)
    """Momentum of the importance."""
    power: float = 0.5
    limit: float = Field(2.0, ge=1)
    """Rates lie between 1 / limit and limit."""


@ingredient("group_learning_rates", Config)
class GroupLearningRates(Ingredient):
    """State ``importance`` (F,), equal within a group; of rows of encoder and decoder, and the encoder's bias."""

    requires = frozenset({"groups"})

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state = {"importance": torch.ones(d_sae)}

    def row_rates(self, ctx) -> Tensor:
        """(F,) factors of the learning rate."""
        norms = ctx.own["group_norms"].detach().mean(0)
        share = (norms / norms.mean().clamp_min(1e-12)).repeat_interleave(self._sizes(len(norms), norms.device))
        self.state["importance"].lerp_(share, 1 - self.config.beta)
        return self.state["importance"].clamp_min(1e-12).pow(self.config.power).clamp(1 / self.config.limit,
                                                                                      self.config.limit)

    def _sizes(self, groups: int, device) -> Tensor:
        return torch.bincount(torch.arange(self.d_sae, device=device) * groups // self.d_sae, minlength=groups)

    def log(self, ctx) -> dict[str, float]:
        """How far the groups' importances lie apart."""
        found = self.state["importance"]
        return {"value/group_learning_rates.spread": float(found.max() / found.min().clamp_min(1e-12))}
