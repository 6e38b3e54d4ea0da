"""A hierarchy of masks (study 4, run 6): nested blocks of latents, a mask per level, f' = prod_l clip(m_l + s, 0, 1) f.

A level keeps the share r^(1/L) of its blocks, by their summed importance, among those inside what the level above
kept: L levels together keep r of the latents. Where rounding up to whole blocks keeps too many, later levels keep
fewer.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sae_lib.training.compression import masks
from sae_lib.training.ingredients import ingredient
from sae_lib.training.ingredients.masked import MaskConfig, Masked


class Config(MaskConfig):
    """Blocks are of neighbouring latents; the last of a level may be smaller."""

    importance: Literal["running", "ema", "activity"] = "ema"
    blocks: list[int] = Field([64, 8, 1], min_length=1)
    """Latents of a block on each level, from the widest."""

    @field_validator("blocks")
    @classmethod
    def _nested(cls, value):
        if min(value) < 1 or any(wide % narrow or wide == narrow for wide, narrow in zip(value, value[1:])):
            raise ValueError("each block size must divide the one before it, as in [64, 8, 1]")
        return value


@ingredient("mask_hierarchy", Config)
class MaskHierarchy(Masked):
    """Levels from the widest blocks to the narrowest."""

    def __init__(self, config, d_in, d_sae, generator=None):
        self.levels = len(config.blocks)
        super().__init__(config, d_in, d_sae, generator)

    def masks(self, ratio: float) -> Tensor:
        """(L, F)"""
        importance = self.state["importance"]
        allowed, found = torch.ones_like(importance, dtype=torch.bool), []
        for level, size in enumerate(self.config.blocks):
            each = min(1.0, ratio * self.d_sae / int(allowed.sum())) ** (1 / (self.levels - level))
            padded = torch.nn.functional.pad(importance, (0, -self.d_sae % size))
            score = masks.log_importance(padded.view(-1, size).sum(1))
            chosen, least = masks.choose(score, each, allowed[::size])
            mask = masks.mask(score, chosen, least, self.config.kind, self.config.temperature)
            found.append(mask.repeat_interleave(size)[:self.d_sae])
            allowed = chosen.repeat_interleave(size)[:self.d_sae]
        return torch.stack(found)
