"""Differences between variants that share seeds: least squares of variant + seed over all their runs.

Runs of one seed see the same batches in the same order, and several variants have one baseline: their differences from
it are correlated. In y = variant + seed + residual that correlation is part of the model, and the variance of the
residual is estimated once (two-way layout without replication; Scheffe 1959, chapter 4). N runs, V variants, S seeds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import special
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

TINY = 1e-12
"""A difference, as a share of the values, that is rounding."""


class Fit(NamedTuple):
    """The model, fitted to the runs of one metric."""

    variants: list[str]
    effect: np.ndarray
    """(V,) of each variant, in the mean over seeds."""
    covariance: np.ndarray
    """(V, V) of the effects, in units of the residual's variance."""
    part: np.ndarray
    """(V,) which variants are connected by seeds: only those have a difference."""
    variance: float
    """Of the residual; NaN without degrees of freedom."""
    freedom: int
    """N - V - S + 1, or + the number of unconnected parts."""
    rounding: float
    """Under this a difference is 0."""

    def contrast(self, one: str, other: str, level: float = 0.95) -> dict[str, float]:
        """``one`` less ``other``: difference, t interval, p; all NaN where no seeds connect them.

        Interval and p are NaN where nothing is left to estimate the variance from.
        """
        a, b = self.variants.index(one), self.variants.index(other)
        if self.part[a] != self.part[b]:
            return dict.fromkeys(("difference", "low", "high", "p"), np.nan)
        difference = float(self.effect[a] - self.effect[b])
        difference = 0.0 if abs(difference) <= self.rounding else difference
        spread = self.covariance[a, a] + self.covariance[b, b] - 2 * self.covariance[a, b]
        error = float(np.sqrt(max(0.0, spread) * self.variance))
        reach = special.stdtrit(self.freedom, (1 + level) / 2) * error if self.freedom else np.nan
        p = 2 * special.stdtr(self.freedom, -abs(difference) / error) if error else float(difference == 0)
        return {"difference": difference, "low": difference - reach, "high": difference + reach,
                "p": float(p) if self.freedom else np.nan}


def fit(values, variants, seeds) -> Fit:
    """Fit variant + seed to ``values`` (N,) of runs whose variants (N,) and seeds (N,) are named."""
    y = np.asarray(values, dtype=float)
    names, v = np.unique(np.asarray(variants, dtype=str), return_inverse=True)
    _, s = np.unique(np.asarray(seeds), return_inverse=True)
    n_v, n_s, n = len(names), int(s.max()) + 1, len(y)
    parts, part = connected_components(coo_matrix((np.ones(n), (v, n_v + s)), shape=(n_v + n_s,) * 2), directed=False)
    design = np.zeros((n, n_v + n_s))
    design[np.arange(n), v] = design[np.arange(n), n_v + s] = 1
    inverse = np.linalg.pinv(design.T @ design, hermitian=True)
    middle = y.mean()
    solved = inverse @ (design.T @ (y - middle))
    residual, freedom = y - middle - design @ solved, n - n_v - n_s + parts
    rounding = TINY * float(np.abs(y).max())
    squares = float((residual ** 2).sum())
    squares = 0.0 if squares <= n * rounding ** 2 else squares
    effect = solved[:n_v] + np.array([solved[n_v:][part[n_v:] == own].mean() for own in part[:n_v]]) + middle
    return Fit(list(map(str, names)), effect, inverse[:n_v, :n_v], part[:n_v],
               squares / freedom if freedom else np.nan, freedom, rounding)


def holm(rows: list[dict[str, Any]]) -> None:
    """Add ``p_holm`` to rows that have a finite ``p``: Holm's correction (1979) over all of them."""
    tested, running = [row for row in rows if np.isfinite(row["p"])], 0.0
    for rank, row in enumerate(sorted(tested, key=lambda r: r["p"])):
        running = max(running, min(1.0, row["p"] * (len(tested) - rank)))
        row["p_holm"] = running
