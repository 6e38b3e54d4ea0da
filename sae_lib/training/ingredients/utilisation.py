"""How often each latent is used: a running mean of the share of tokens that it fires on (study 3).

A tracker: it changes nothing by itself. Others read ``ctx.own["utilisation"]``.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """How long it remembers."""

    beta: float = Field(0.9, ge=0, lt=1)
    """u <- beta u + (1 - beta) * share of the batch's tokens."""


@ingredient("utilisation", Config)
class Utilisation(Ingredient):
    """State ``mean`` (F,): the running mean, which starts with the first batch's shares."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state = {"mean": torch.zeros(d_sae), "batches": torch.zeros((), dtype=torch.int64)}

    def before_step(self, ctx) -> None:
        """Publish the utilisation (F,) as it was before this batch; None before the first."""
        ctx.own["utilisation"] = self.state["mean"].clone() if int(self.state["batches"]) else None

    def after_step(self, sae, ctx) -> None:
        """Count this batch."""
        codes, mean = ctx.codes.csr(), self.state["mean"]
        shares = torch.bincount(codes.indices[codes.values > 0], minlength=self.d_sae) / len(ctx.x)
        mean.copy_(shares) if not int(self.state["batches"]) else mean.lerp_(shares.to(mean), 1 - self.config.beta)
        self.state["batches"] += 1

    def log(self, ctx) -> dict[str, float]:
        """How unevenly latents are used: the share of all firing that the busiest tenth does."""
        mean = self.state["mean"]
        busiest = mean.topk(max(1, self.d_sae // 10)).values.sum()
        return {"value/utilisation.busiest_tenth": float(busiest / mean.sum().clamp_min(1e-12))}


def overuse(ctx, limit: float = 4.0) -> torch.Tensor:
    """(F,) utilisation beside its mean over latents, at most ``limit``; 1 before the first batch was counted."""
    used = ctx.own["utilisation"]
    if used is None:
        return torch.ones(ctx.sae.d_sae, device=ctx.x.device)
    return (used / used.mean().clamp_min(1e-12)).clamp_max(limit)
