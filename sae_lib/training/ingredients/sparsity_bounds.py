"""A sparsity weight of each latent's own, from its utilisation, between bounds that move (study 3).

L += weight * mean_b sum_i lambda_i f_bi, lambda_i = clip(u_i / mean(u) * sqrt(lower upper), lower(p), upper(p)): what
is used more than others is penalised more. With ``lower`` 0 every latent has the upper bound, as the study's run did.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.ingredients.utilisation import overuse
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """Bounds as the study has them; ``weight`` brings them to the scale of the activations."""

    weight: float = Field(1.0, gt=0)
    lower: Scheduled = Schedule(kind="linear", start=0.02, end=0.01)
    upper: Scheduled = Schedule(kind="linear", start=1.0, end=0.5)


@ingredient("sparsity_bounds", Config)
class SparsityBounds(Ingredient):
    """Beside an architecture's own penalty; with ``target_l0`` its controller makes room for this one."""

    requires = frozenset({"utilisation"})

    def penalty(self, ctx) -> Tensor:
        """The weighted term."""
        codes = ctx.codes.csr()
        return self.config.weight * ctx.mean_over_tokens(codes.values * self.weights(ctx)[codes.indices])

    def weights(self, ctx) -> Tensor:
        """lambda (F,)."""
        lower, upper = self.at("lower", ctx), self.at("upper", ctx)
        if not lower:
            return torch.full((self.d_sae,), upper, device=ctx.x.device)
        return (overuse(ctx, math.inf) * math.sqrt(lower * upper)).clamp(lower, upper)
