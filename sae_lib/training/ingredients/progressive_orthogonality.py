"""Progressive orthogonality (study 1): decoder rows are pushed apart, over training, where they compete.

L += lambda(p) * mean_i sum_{j != i} c_ij cos_ij^2, with the competition
c_ij = sigmoid((s(p) |cos_ij| - tau(p)) / T), T = max(tau(p) / 5, 0.005), or c = 1 without a threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, PairsConfig, ingredient
from sae_lib.training.pair_sum import mean_over_latents
from sae_lib.training.schedules import Schedule, Scheduled


class Config(PairsConfig):
    """Each of weight, threshold and scale is a number or a schedule."""

    weight: Scheduled = Schedule(start=0.05)
    """lambda(p)"""
    threshold: Scheduled | None = None
    """tau(p); None sets every c_ij to 1."""
    scale: Scheduled = Schedule(start=1.0)
    """s(p), on |cos| before the threshold."""
    gradient_through_competition: bool = False


@ingredient("progressive_orthogonality", Config)
class ProgressiveOrthogonality(Ingredient):
    """The five runs of the study and the static control are parameters of this one term."""

    of_rows = True

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term; its gradient reaches the decoder's directions alone."""
        weight = self.at("weight", ctx)
        if not weight:
            return None
        compete = self._competition(ctx)

        def energy(cos: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor | None]:
            if compete is None:
                return cos.square(), 2 * cos
            weighted = compete(cos.abs()) * cos
            return weighted * cos, 2 * weighted
        through = self.config.gradient_through_competition and compete is not None
        term = mean_over_latents(ctx.rows, ctx.fired, self.config, self.generator, energy, by_autograd=through)
        return None if term is None else weight * term

    def _competition(self, ctx):
        if self.config.threshold is None:
            return None
        tau, scale = self.at("threshold", ctx), self.at("scale", ctx)
        temperature = max(tau / 5, 0.005)
        return lambda size: torch.sigmoid((scale * size - tau) / temperature)
