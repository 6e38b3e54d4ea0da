"""What the masks of study 4 share: f' = clip(m + s, 0, 1) f, m from the importance of latents before the mask.

The skip s acts around the mask alone. A masked latent's importance goes on being measured, so that it can come back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sae_lib.sae.codes import Codes
from sae_lib.training import bound
from sae_lib.training.activity import Activity
from sae_lib.training.compression import masks
from sae_lib.training.ingredients import Ingredient, IngredientConfig
from sae_lib.training.schedules import Schedule, Scheduled

MASKS = frozenset({"bounded_mask", "mask_hierarchy", "parallel_paths"})


class MaskConfig(IngredientConfig):
    """What every mask is told."""

    ratio: Scheduled = Schedule(start=0.5)
    """r: the share of latents that is kept."""
    kind: Literal["hard", "sigmoid"] = "hard"
    """hard: 1 for the ceil(rF) most important, else 0. sigmoid: sigmoid((log importance - bound) / temperature)."""
    temperature: float = Field(0.3, gt=0)
    """Of the sigmoid, in units of log importance."""
    skip: Scheduled = Schedule(start=0.0)
    """s"""
    importance: Literal["running", "ema", "activity"] = "running"
    """Mean activation over all steps so far, its exponential average, or on how many of the last tokens it fired."""
    beta: float = Field(0.99, ge=0, lt=1)
    """Of the exponential average (ema)."""
    window: int = Field(16_384, ge=64, multiple_of=64)
    """Tokens of the ring of bits (activity)."""
    begin: float = Field(0.0, ge=0)
    """Fraction of training before which the mask is 1; steps where it is above 1, as the study counted."""

    @field_validator("ratio", "skip")
    @classmethod
    def _shares(cls, value, info):
        ends = (value.start, value.end) if getattr(value, "kind", "constant") != "constant" else (
            getattr(value, "start", 1),)
        if not all(0 <= end <= 1 for end in ends) or (info.field_name == "ratio" and 0 in ends):
            raise ValueError("expected a share from 0 to 1 (of latents that are kept: above 0)")
        return value


class Masked(Ingredient):
    """What masks share: importance, the ratio in force, the masks (L, F), idle latents, the bound.

    ``state`` has the importance (F,), the masks, and ratio and skip in force: evaluation uses those. ``ctx.own`` gets
    the codes before ("unmasked") and after ("masked").
    """

    changes_forward = True
    levels = 1

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.activity = Activity(d_sae, config.window) if config.importance == "activity" else None
        self.state = {"importance": torch.zeros(d_sae), "mask": torch.ones(self.levels, d_sae),
                      "in_force": torch.tensor([1.0, 0.0])}
        self.binary = config.kind == "gate"

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """One mask at a time: the bound is of one."""
        listed = [entry.get("name") for entry in p.ingredients if entry.get("name") in MASKS]
        return f"one mask at a time; {', '.join(listed)} are listed" if len(listed) > 1 else None

    def warm_up(self) -> Schedule:
        """0 while the mask is still 1 throughout."""
        return Schedule(kind="step", start=0.0, end=1.0, finish=self.config.begin)

    def schedules(self) -> dict[str, Schedule]:
        """With the warm-up: a run that ends before it never had a mask."""
        return super().schedules() | ({"begin": self.warm_up()} if self.config.begin else {})

    def masks(self, ratio: float) -> Tensor:
        """(L, F) by the importance in ``state``, with a gradient where something is learnt."""
        raise TypeError(f"'{self.name}' defines no masks()")

    def ratio(self, ctx) -> float:
        """r at this step."""
        return self.at("ratio", ctx)

    def transform(self, codes: Codes, ctx) -> Codes:
        """f', entry by entry."""
        mask = self._decide(codes, ctx) if ctx.training else self.state["mask"]
        factor = masks.factor(mask, self.state["in_force"][1], self.binary)
        masked = codes.with_values(codes.values * masks.of_entries(codes, factor))
        ctx.own |= {"unmasked": codes, "masked": masked}
        return masked

    def _decide(self, codes, ctx) -> Tensor:
        importance = self.state["importance"]
        with torch.no_grad():
            if self.activity is not None:
                self.activity.record(codes.csr())
                importance.copy_(self.activity.counts() / min(self.activity.seen, self.activity.window))
            else:
                beta = self.config.beta if self.config.importance == "ema" else ctx.step / (ctx.step + 1)
                importance.lerp_(masks.totals(codes) / masks.tokens(codes), 1 - beta)
        waits = bool(self.config.begin) and not self.warm_up()(ctx.step, ctx.total_steps)
        warm = waits or not bool(importance.any())
        ratio = 1.0 if warm else self.ratio(ctx)
        mask = torch.ones_like(self.state["mask"]) if warm else self.masks(ratio)
        with torch.no_grad():
            self.state["mask"].copy_(mask)
            self.state["in_force"].copy_(torch.tensor([ratio, self.at("skip", ctx)]))
        return mask

    def factor(self) -> Tensor:
        """(F,) what latents are multiplied by, as the state has it."""
        return masks.factor(self.state["mask"], self.state["in_force"][1])

    def idle(self) -> Tensor:
        """Latents that the mask shuts."""
        return self.factor() == 0

    def log(self, ctx) -> dict[str, float]:
        """The ratio and skip in force, and how many latents are kept."""
        ratio, skip = self.state["in_force"].tolist()
        return super().log(ctx) | {f"value/{self.name}.ratio": ratio, f"value/{self.name}.skip": skip,
                                   f"value/{self.name}.kept": self.kept()}

    def kept(self) -> int:
        """Latents whose mask is over a half at every level."""
        return int((self.state["mask"] > 0.5).all(0).sum())

    def measures(self, sae, x: Tensor) -> dict[str, Any]:
        """What is in force at the end, and the compression bound."""
        ratio, skip = self.state["in_force"].tolist()
        return {"ratio": ratio, "skip": skip, "kept": self.kept(), "mean_factor": float(self.factor().mean()),
                "bound": bound.report(sae, x, self.state["mask"], skip, self.name)}

    def state_dict(self) -> dict[str, Tensor]:
        """With the ring of bits."""
        bits = self.activity.state_dict() if self.activity else {}
        return super().state_dict() | {f"activity.{key}": value for key, value in bits.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        super().load_state_dict(state)
        if self.activity:
            self.activity.load_state_dict({key.removeprefix("activity."): value for key, value in state.items()})
