"""NT-Xent between neighbouring tokens (study 4, run 5; Chen et al. 2020, "SimCLR", eq. 1).

On a slice of consecutive rows, z_b = f_b / |f_b|; a pair (b, b + 1) of one document is positive, all other rows are
negatives: L += weight * mean over pairs and both directions of -log(exp(z_b z_c / t) / sum_{k != b} exp(z_b z_k / t)).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.sae.codes import CSR, Codes, Dense, FixedK
from sae_lib.training.coactivation.packed import follows
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """The study's temperature and weight."""

    weight: Scheduled = Schedule(start=0.1)
    temperature: float = Field(0.1, gt=0)
    """t"""
    tokens: int = Field(256, ge=2)
    """Rows of the slice."""


@ingredient("nt_xent", Config)
class NTXent(Ingredient):
    """On latents as the decoder gets them."""

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """Neighbours are needed."""
        if p.order != "sequence_blocks":
            return "positives are neighbouring tokens; set order: sequence_blocks"
        return None

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term, of the slice alone; None where no row of it has its neighbour."""
        weight = self.at("weight", ctx)
        n = min(self.config.tokens, len(ctx.x))
        start = int(torch.randint(len(ctx.x) - n + 1, (1,), generator=self.generator))
        part = slice(start, start + n)
        later = follows(ctx.document[part], ctx.position[part]).nonzero()[:, 0].to(ctx.x.device)
        if not weight or not len(later):
            return None
        return weight * nt_xent(rows_between(ctx.codes, part.start, part.stop), later, self.config.temperature)


def nt_xent(latents: Tensor, later: Tensor, temperature: float) -> Tensor:
    """The loss of ``latents`` (n, F), where each row of ``later`` (pairs,) is positive with the row before it."""
    unit = torch.nn.functional.normalize(latents, dim=1, eps=1e-8)
    similar = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    log_share = similar.log_softmax(1)
    return -(log_share[later - 1, later] + log_share[later, later - 1]).mean() / 2


def rows_between(codes: Codes, start: int, stop: int) -> Tensor:
    """(stop - start, F) of the codes; no more than those rows is made dense."""
    if isinstance(codes, Dense):
        return codes.values[start:stop]
    if isinstance(codes, FixedK):
        return FixedK(codes.indices[start:stop], codes.values[start:stop], codes.n_latents).dense()
    offsets = codes.offsets[start:stop + 1]
    low, high = offsets[[0, -1]].tolist()
    return CSR(offsets - low, codes.indices[low:high], codes.values[low:high], codes.n_latents).dense()
