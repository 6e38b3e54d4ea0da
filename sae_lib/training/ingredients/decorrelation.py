"""Decorrelation of the batch (study 3): L += weight * mean_i sum_{j != i} corr(f_i, f_j)^2 over the batch's tokens.

Correlations, not covariances, so that strong latents do not count for more. Exact without an F x F matrix: of a pair
that never fires together only the product of the means remains, and those products sum in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.training.coactivation.gram import gram_squares
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.ingredients.diversity import crowded, scaled
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """A number or a schedule."""

    weight: Scheduled = Schedule(start=0.1)


@ingredient("decorrelation", Config)
class Decorrelation(Ingredient):
    """Its gradient reaches the encoder. Logs the batch's diversity too."""

    latest: float = float("nan")

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term; none while codes are dense."""
        weight = self.at("weight", ctx)
        if not weight or crowded(ctx):
            return None
        term = squared_correlations(ctx.codes.csr(), len(ctx.x)) / self.d_sae
        self.latest = float(term.detach())
        return weight * term

    def log(self, ctx) -> dict[str, float]:
        """The batch diversity metric: 1 / (1 + mean_i sum_j corr^2); 1 where no two latents go together."""
        return super().log(ctx) | {"value/batch_diversity": 1 / (1 + self.latest)}


def squared_correlations(codes, tokens: int) -> Tensor:
    """sum over i != j of corr(f_i, f_j)^2 over ``tokens`` tokens; latents that never vary have none.

    With v = f / std and m its mean: corr_ij = (v_i . v_j) / B - m_i m_j, so the sum over i != j is
    sum (v_i . v_j)^2 / B^2 - 2 sum (v_i . v_j) m_i m_j / B + sum m_i^2 m_j^2.
    """
    def per_latent(values: Tensor) -> Tensor:
        return values.new_zeros(codes.n_latents).index_add(0, codes.indices, values)

    mean, square = per_latent(codes.values) / tokens, per_latent(codes.values.square()) / tokens
    std = (square - mean.square()).clamp_min(1e-12).sqrt()
    v = scaled(codes, std)
    m, own = (mean / std).double(), (square / std.square()).double()
    along = torch.zeros(tokens, device=m.device, dtype=m.dtype).index_add(0, codes.rows(),
                                                                          v.values.double() * m[codes.indices])
    crossed = along.square().sum() / tokens - (own * m.square()).sum()
    products = m.square().sum().square() - m.square().square().sum()
    return (gram_squares(v).double() / tokens**2 - 2 * crossed + products).float()
