"""The bootstrap behind every interval "within this SAE": how far its figures rest on the text that was read.

One SAE is held fixed and what it was measured on (blocks of text, labelled texts, words) is drawn anew; nothing is
said about a variant, for which seeds are needed. Percentile interval (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

DRAWS, LEVEL = 1000, 0.95
BLOCKS = "bootstrap over blocks of text"
PORTION = 2**22
"""Weights that are held at once."""


def spread(n: int, figures: Callable[[np.ndarray], dict[str, np.ndarray]], *,
           strata: Sequence[np.ndarray] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """(DRAWS,) values of each of ``figures`` over redrawn units, with equal draws for equal arguments.

    ``figures`` takes weights (W, n), how often each unit was drawn, and gives (W,) values by name. Units are drawn
    within each of ``strata`` (their places, which together are all n); None draws among all.
    """
    draw, found = np.random.default_rng(seed), []
    own = [np.arange(n)] if strata is None else strata
    step = max(1, min(DRAWS, PORTION // max(1, n)))
    for start in range(0, DRAWS, step):
        weights = np.zeros((min(step, DRAWS - start), n))
        for places in own:
            weights[:, places] = draw.multinomial(len(places), np.full(len(places), 1 / len(places)), len(weights))
        found.append(figures(weights))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def interval(values: np.ndarray) -> list[float] | None:
    """Lower and upper end at LEVEL of drawn values; draws that are no number are left out, None if that is half."""
    finite = values[np.isfinite(values)]
    if 2 * len(finite) <= len(values):
        return None
    return [float(edge) for edge in np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def within(by: str, drawn: dict[str, np.ndarray]) -> dict[str, object]:
    """A report's ``within_this_sae``: level, over what (``by``), and the interval of each metric that has one."""
    found = {name: interval(values) for name, values in drawn.items()}
    return {"level": LEVEL, "by": by} | {name: pair for name, pair in found.items() if pair}
