"""Contrast between decoder rows (study 3): latents more alike than a threshold are pushed apart.

L += weight * mean_i sum_{j != i} o_ij relu(sim_ij - t(p))^2, o_ij the mean over-use of the two latents (1 without it).
Similarities are exact cosines, or those of the rows' projections (``jl``): under a threshold of about the projection's
noise that pushes apart pairs that are not alike.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sae_lib.training.ingredients import Ingredient, PairsConfig, ingredient
from sae_lib.training.ingredients.utilisation import overuse
from sae_lib.training.pair_sum import mean_over_latents
from sae_lib.training.schedules import Schedule, Scheduled


class Config(PairsConfig):
    """Weight and threshold are numbers or schedules."""

    weight: Scheduled = Schedule(start=1.0)
    threshold: Scheduled = Schedule(kind="linear", start=0.4, end=0.05)
    """t(p), a cosine."""
    similarity: Literal["exact", "jl"] = "exact"
    """jl: of the projections that the ingredient jl_similarity draws."""
    by_use: bool = True
    """Over-used latents repel more: a pair counts by the mean of its latents' utilisation beside the average's."""


@ingredient("contrastive", Config)
class Contrastive(Ingredient):
    """Its gradient reaches the decoder's directions alone."""

    of_rows = True

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """What it reads must be kept by someone."""
        listed = {entry.get("name") for entry in p.ingredients}
        if config.similarity == "jl" and "jl_similarity" not in listed:
            return "similarity: jl reads the projection of 'jl_similarity'; list that too, or set similarity: exact"
        if config.by_use and "utilisation" not in listed:
            return "by_use reads what 'utilisation' keeps; list that too, or set by_use: false"
        return None

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term."""
        weight, threshold = self.at("weight", ctx), self.at("threshold", ctx)
        if not weight:
            return None
        use = overuse(ctx) if self.config.by_use else None

        def energy(cos: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            over = (cos - threshold).relu()
            pull = over if use is None else over * (use[left][:, None] + use[right]) / 2
            return pull * over, 2 * pull
        projected = self.config.similarity == "jl"
        rows = ctx.rows @ ctx.own["projection"] if projected else ctx.rows
        term = mean_over_latents(rows, ctx.fired, self.config, self.generator, energy, by_autograd=projected)
        return None if term is None else weight * term
