"""How pairs are weighed: the options of study 2, its code's departures among them."""

from __future__ import annotations

from typing import NamedTuple

ALPHA_LIMIT, ALPHA_SCALE = 0.1, 1000.0
"""alpha_ij = min(0.1, count / 1000)."""


class Rule(NamedTuple):
    """Options of the windows; the defaults are the study's formula."""

    window: int = 1000
    """Tokens of a window."""
    gamma: float = 1.0
    """Weight of the deviation from the running average."""
    after_reset: bool = False
    """Departure: windows close at a batch's end and are reset before weights are read. Where one closes, the weights
    are the batch's own co-activation, without deviation: every window up to a batch's length is the same run."""
    latent_rate: bool = False
    """Departure: alpha from rates of latents (firings per token / 1000; the mean of a pair's two), not from the pair's
    count: the average then hardly moves."""
    decay_absent: bool = False
    """A pair that a window did not see moves toward 0 by 1/1000; else it keeps its average."""

    def closings(self, tokens: int, batch: int) -> tuple[list[int], list[int], int]:
        """For a window that holds ``tokens`` and a batch: the rows before which windows close, those windows' lengths,
        and how many tokens the open window holds in the end."""
        if self.after_reset:
            full = tokens + batch >= self.window
            return ([batch], [tokens + batch], 0) if full else ([], [], tokens + batch)
        ends = list(range(self.window - tokens, batch + 1, self.window))
        return ends, [self.window] * len(ends), (tokens + batch) % self.window
