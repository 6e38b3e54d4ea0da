"""Progressive orthogonality (study 1): decoder rows are pushed apart, over training, where they compete.

L += lambda(p) * mean_i sum_{j != i} c_ij cos_ij^2, with the competition
c_ij = sigmoid((s(p) |cos_ij| - tau(p)) / T), T = max(tau(p) / 5, 0.005), or c = 1 without a threshold.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """Each of weight, threshold and scale is a number or a schedule."""

    weight: Scheduled = Schedule(start=0.05)
    """lambda(p)"""
    threshold: Scheduled | None = None
    """tau(p); None sets every c_ij to 1."""
    scale: Scheduled = Schedule(start=1.0)
    """s(p), on |cos| before the threshold."""
    gradient_through_competition: bool = False
    pairs: Literal["active", "all"] = "active"
    """active: latents that fired in the batch, in random chunks; all: every pair, exact."""
    chunk: int = Field(512, ge=2)
    """Latents of a chunk (active) or rows of a block (all)."""


@ingredient("progressive_orthogonality", Config)
class ProgressiveOrthogonality(Ingredient):
    """The five runs of the study and the static control are parameters of this one term."""

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term; its gradient reaches the decoder's directions alone."""
        weight = self._at("weight", ctx)
        if not weight:
            return None
        compete = self._competition(ctx)
        through = self.config.gradient_through_competition
        if self.config.pairs == "all":
            return weight * pair_sum(ctx.rows, None, compete, through, self.config.chunk) / self.d_sae
        active = ctx.fired.nonzero()[:, 0]
        if len(active) < 2:
            return None
        shuffled = active[torch.randperm(len(active), generator=self.generator).to(active.device)]
        chunks = torch.tensor_split(shuffled, -(-len(active) // self.config.chunk))
        # A random pair of active latents meets in a chunk with probability pairs / (A (A - 1)); dividing by it
        # estimates the mean over pairs, and F - 1 partners make it the sum over j.
        pairs = sum(len(c) * (len(c) - 1) for c in chunks)
        total = sum(pair_sum(ctx.rows, c, compete, through, self.config.chunk) for c in chunks)
        return weight * total * ((self.d_sae - 1) / pairs)

    def _at(self, field: str, ctx) -> float:
        return getattr(self.config, field)(ctx.step, ctx.total_steps)

    def _competition(self, ctx):
        if self.config.threshold is None:
            return None
        tau, scale = self._at("threshold", ctx), self._at("scale", ctx)
        temperature = max(tau / 5, 0.005)
        return lambda size: torch.sigmoid((scale * size - tau) / temperature)

    def log(self, ctx) -> dict[str, float]:
        """The schedules' values."""
        return {f"value/{self.name}.{key}": schedule(ctx.step, ctx.total_steps)
                for key, schedule in self.schedules().items()}


def pair_sum(rows: Tensor, subset: Tensor | None, compete, through: bool, block: int) -> Tensor:
    """sum over i != j of c_ij cos_ij^2 for ``rows`` (F, D), or for a ``subset`` of them.

    ``compete`` maps |cos| to c (None: 1). Without a gradient through c the backward costs one product, since
    the sum is symmetric: d / d u_i = 4 sum_j c_ij cos_ij u_j.
    """
    unit = torch.nn.functional.normalize(rows if subset is None else rows[subset], dim=1)
    if through and compete is not None:
        cos = unit @ unit.T
        return (compete(cos.abs()) * cos.square()).fill_diagonal_(0).sum()
    return _SymmetricPairSum.apply(unit, compete, block)


class _SymmetricPairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, compete, block):
        gradient, total = torch.empty_like(unit), unit.new_zeros(())
        for start in range(0, len(unit), block):
            cos = unit[start:start + block] @ unit.T
            cos.diagonal(start).zero_()
            weighted = cos if compete is None else compete(cos.abs()) * cos
            total += (weighted * cos).sum()
            gradient[start:start + block] = weighted @ unit
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad * 4 * ctx.saved_tensors[0], None, None
