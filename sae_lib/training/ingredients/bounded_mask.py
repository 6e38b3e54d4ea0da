"""Bounded compression (study 4): a mask keeps a share r of the latents, f' = clip(m + s, 0, 1) f."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.training.compression import masks
from sae_lib.training.ingredients import ingredient
from sae_lib.training.ingredients.masked import MaskConfig, Masked
from sae_lib.training.schedules import Schedule, Scheduled


class Config(MaskConfig):
    """A single mask over all latents."""

    ratio: Scheduled | Literal["dynamic"] = Schedule(start=0.5)
    """r, or dynamic: the share of latents that carry ``share`` of the importance, within ``bounds``."""
    bounds: tuple[float, float] | None = None
    """[r_min, r_max] of a dynamic ratio."""
    share: float = Field(0.9, gt=0, le=1)
    """Of the importance, that the latents of a dynamic ratio carry."""
    kind: Literal["hard", "sigmoid", "gate"] = "hard"
    """gate: hard forward, with the sigmoid's gradient into a learned logit per latent, which is added to log
    importance."""
    learned: bool = False
    """Importance weights omega (F,), added to log importance and learnt through the sigmoid (a gate always has its)."""


@ingredient("bounded_mask", Config)
class BoundedMask(Masked):
    """One mask over all latents."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        if config.learned or config.kind == "gate":
            self.state["omega"] = torch.zeros(d_sae)
            self.learnt = frozenset({"omega"})

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """What would have no effect, or no meaning."""
        if (config.ratio == "dynamic") != (config.bounds is not None):
            return "ratio: dynamic and bounds: [r_min, r_max] belong together"
        if config.bounds is not None and not 0 < config.bounds[0] <= config.bounds[1] <= 1:
            return f"bounds: expected 0 < r_min <= r_max <= 1, got {list(config.bounds)}"
        if config.learned and config.kind == "hard":
            return "learned: a hard mask has no gradient; set kind: sigmoid, or kind: gate"
        return super().refuses(config, p)

    def ratio(self, ctx) -> float:
        """By the schedule, or by what carries the importance."""
        if self.config.ratio != "dynamic":
            return super().ratio(ctx)
        low, high = self.config.bounds
        return min(high, max(low, masks.carrying(self.state["importance"], self.config.share)))

    def masks(self, ratio: float) -> Tensor:
        """(1, F)"""
        score = masks.log_importance(self.state["importance"])
        if "omega" in self.state:
            score = score + self.state["omega"]
        chosen, least = masks.choose(score, ratio)
        return masks.mask(score, chosen, least, self.config.kind, self.config.temperature)[None]
