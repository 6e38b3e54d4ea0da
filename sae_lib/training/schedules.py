"""Values that change over training, as functions of progress p = step / total steps."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Schedule(BaseModel):
    """``start`` moves to ``end`` while progress goes from ``begin`` to ``finish``; before and after, it rests.

    With q the fraction of that way done:

    - constant: start
    - linear: start + (end - start) q
    - cosine: the same with (1 - cos(pi q)) / 2 for q
    - quadratic: the same with 1 - (1 - q)^2 for q (``ease: out``; the study's (1 - p)^2) or q^2 (``ease: in``)
    - exponential: start * exp(-rate q)
    - step: start, then end once q = 1
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["constant", "linear", "cosine", "exponential", "quadratic", "step"] = "constant"
    start: float
    end: float = 0.0
    rate: float = 1.0
    ease: Literal["out", "in"] = "out"
    begin: float = Field(0.0, ge=0)
    """Fraction of training, or a step where it is above 1."""
    finish: float = Field(1.0, gt=0)
    """Fraction of training, or a step where it is above 1."""

    def span(self, total_steps: int) -> tuple[float, float]:
        """``begin`` and ``finish`` as fractions of a run of ``total_steps``."""
        return tuple(v / max(1, total_steps) if v > 1 else v for v in (self.begin, self.finish))

    def __call__(self, step: int, total_steps: int) -> float:
        """The value at ``step``."""
        begin, finish = self.span(total_steps)
        q = (step / max(1, total_steps) - begin) / max(finish - begin, 1e-12)
        q = min(1.0, max(0.0, q))
        if self.kind == "exponential":
            return self.start * math.exp(-self.rate * q)
        way = {"constant": 0.0, "linear": q, "cosine": (1 - math.cos(math.pi * q)) / 2,
               "quadratic": q * q if self.ease == "in" else 1 - (1 - q) ** 2, "step": float(q >= 1)}[self.kind]
        return self.start + (self.end - self.start) * way

    def unfinished(self, steps: int, total_steps: int) -> bool:
        """True where a run that made ``steps`` of ``total_steps`` ended before this schedule did."""
        return self.kind != "constant" and self.span(total_steps)[1] * total_steps > steps + 1e-9


def _from_number(value):
    return {"start": value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Scheduled = Annotated[Schedule, BeforeValidator(_from_number)]
"""A field that takes a number (constant) or a mapping of Schedule's fields."""


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Linear warm-up over ``warmup_steps``, then 1, then linear decay to 0 over the last ``decay_share``."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay_steps = decay_share * total_steps
    return warm * (min(1.0, (total_steps - step) / decay_steps) if decay_steps else 1.0)
