"""Pruning of the least used latents (study 3), for good: their encoder is set to 0 and a bias keeps them silent.

Part of the weights, so a pruned SAE is a plain one. Others read ``ctx.own["idle"]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """What share of the latents is pruned by when."""

    share: Scheduled = Schedule(kind="linear", start=0.0, end=0.05, begin=0.3, finish=0.8)


@ingredient("pruning", Config)
class Pruning(Ingredient):
    """State ``pruned`` (F,) bool."""

    requires = frozenset({"utilisation"})

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state = {"pruned": torch.zeros(d_sae, dtype=torch.bool)}

    def before_step(self, ctx) -> None:
        """Publish which latents are pruned."""
        ctx.own["idle"] = self.state["pruned"]

    def after_step(self, sae, ctx) -> None:
        """Prune the least used until the scheduled share is reached; keep what is pruned silent."""
        pruned, used = self.state["pruned"], ctx.own["utilisation"]
        missing = int(self.at("share", ctx) * self.d_sae) - int(pruned.sum())
        if missing > 0 and used is not None:
            pruned[used.masked_fill(pruned, float("inf")).topk(missing, largest=False).indices] = True
        if bool(pruned.any()):  # every step: the optimiser's moments move them on
            sae.W_enc[pruned], sae.b_enc[pruned] = 0, -1

    def idle(self) -> Tensor:
        """The pruned."""
        return self.state["pruned"]

    def log(self, ctx) -> dict[str, float]:
        """Their number."""
        return {"value/pruning.pruned": float(self.state["pruned"].sum())}
