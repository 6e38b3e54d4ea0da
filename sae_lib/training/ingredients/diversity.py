"""Diversity (study 3): latents' activation vectors over the batch are kept from pointing alike.

L += weight(p) * mean_i sum_{j != i} cos(f_i, f_j)^2, f_i the column of latent i over the batch: exact, and only pairs
that fire together count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.codes import CSR, Dense
from sae_lib.sae.kernels import DENSE_FROM
from sae_lib.training.coactivation.gram import gram_squares
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """The study's weight rises from 0 to 0.1."""

    weight: Scheduled = Schedule(kind="linear", start=0.0, end=0.1)


@ingredient("diversity", Config)
class Diversity(Ingredient):
    """Its gradient reaches the encoder."""

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term; none while codes are dense, when all latents fire with all others."""
        weight = self.at("weight", ctx)
        if not weight or crowded(ctx):
            return None
        codes = ctx.codes.csr()
        return weight * gram_squares(scaled(codes, column_norms(codes))) / self.d_sae


def crowded(ctx) -> bool:
    """Whether so many latents are active that pairs are not counted."""
    return isinstance(ctx.codes, Dense) and ctx.codes.l0() > DENSE_FROM * ctx.sae.d_sae


def column_norms(codes: CSR) -> Tensor:
    """(F,) norms of the latents' activation vectors over the batch."""
    squares = torch.zeros(codes.n_latents, device=codes.values.device, dtype=codes.values.dtype)
    return squares.index_add(0, codes.indices, codes.values.square()).clamp_min(1e-12).sqrt()


def scaled(codes: CSR, by: Tensor) -> CSR:
    """Each latent divided by its own number of ``by`` (F,)."""
    return codes.with_values(codes.values / by[codes.indices])
