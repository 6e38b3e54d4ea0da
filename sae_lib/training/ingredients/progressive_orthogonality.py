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
    chunk: int = Field(128, ge=2)
    """Latents of a chunk (active) or rows of a block (all)."""
    chunks: int = Field(16, ge=1)
    """Chunks of a step at most (active): of a larger partition so many are drawn."""


@ingredient("progressive_orthogonality", Config)
class ProgressiveOrthogonality(Ingredient):
    """The five runs of the study and the static control are parameters of this one term."""

    of_rows = True

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
        size = self.config.chunk
        chunks = [shuffled] if len(active) <= size else shuffled[:len(active) // size * size].split(size)
        # Two active latents meet in a drawn chunk with probability pairs / (A (A - 1)); dividing by it estimates the
        # mean over pairs, and F - 1 partners make it the sum over j.
        chunks = torch.stack(chunks[:self.config.chunks])
        pairs = chunks.numel() * (chunks.shape[1] - 1)
        total = pair_sum(ctx.rows, chunks, compete, through, size)
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


def pair_sum(rows: Tensor, chunks: Tensor | None, compete, through: bool, block: int) -> Tensor:
    """sum over i != j of c_ij cos_ij^2 for ``rows`` (F, D): all pairs, or those within each of ``chunks`` (n, size).

    ``compete`` maps |cos| to c (None: 1). Without a gradient through c the backward costs one product, since
    the sum is symmetric: d / d u_i = 4 sum_j c_ij cos_ij u_j.
    """
    if through and compete is not None:
        unit = torch.nn.functional.normalize(rows[None] if chunks is None else rows[chunks], dim=-1)
        cos = unit @ unit.transpose(1, 2)
        off = 1 - torch.eye(cos.shape[1], dtype=cos.dtype, device=cos.device)
        return (compete(cos.abs()) * cos.square() * off).sum()
    if chunks is None:
        return _AllPairs.apply(torch.nn.functional.normalize(rows, dim=1), compete, block)
    return _PairsOfChunks.apply(rows, chunks, compete)


class _AllPairs(torch.autograd.Function):
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


class _PairsOfChunks(torch.autograd.Function):
    """A chunk at a time stays in the cache, and the gradient is of its rows alone: no pass over (F, D)."""

    @staticmethod
    def forward(ctx, rows, chunks, compete):
        gradient, total = rows.new_empty(*chunks.shape, rows.shape[1]), rows.new_zeros(())
        for number, chunk in enumerate(chunks):
            unit = rows.index_select(0, chunk)
            norms = unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
            unit /= norms
            cos = unit @ unit.T
            cos.diagonal().zero_()
            weighted = cos if compete is None else compete(cos.abs()) * cos
            own = (weighted * cos).sum(1, keepdim=True)
            total += own.sum()
            torch.sub(weighted @ unit, own * unit, out=gradient[number])  # a row's direction, not its length
            gradient[number] /= norms
        ctx.save_for_backward(gradient, chunks)
        ctx.shape = rows.shape
        return total

    @staticmethod
    def backward(ctx, grad):
        gradient, chunks = ctx.saved_tensors
        return torch.sparse_coo_tensor(chunks.view(1, -1), (grad * 4 * gradient).flatten(0, 1), ctx.shape,
                                       is_coalesced=True, check_invariants=False), None, None
