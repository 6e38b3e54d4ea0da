"""What an SAE is worth where the features are known: recovery, and absorption as it truly is.

Of planted worlds alone (``data.planted``). Shapes: N rows, G features, F latents, D the width of an activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lib.data.planted import Truth

RECOVERED = 0.9
"""Cosine from which a feature counts as recovered."""
PAIRED = 0.5
"""Cosine under which a feature's latent is no latent of it: its absorption cannot be told from its absence."""
CARRIED = 0.4
"""Share of the parent's strength that a child's latent must carry to have absorbed it: SAEBench's share."""


class Matching(NamedTuple):
    """Features and latents one to one, so that the sum of the likenesses is largest (Hungarian algorithm)."""

    latent: np.ndarray
    """(G,) each feature's latent; -1 where there are fewer latents than features."""
    likeness: np.ndarray
    """(G,) of each pair; 0 for a feature without one."""

    @property
    def mcc(self) -> float:
        """Mean correlation coefficient: the mean likeness over features.

        SAELens' ``mean_correlation_coefficient`` where there are at least as many latents as features; with fewer, a
        feature without a latent counts 0 here and not at all there.
        """
        return float(self.likeness.mean())


def match_rows(directions: Tensor, rows: Tensor) -> Matching:
    """Features (G, D) and decoder rows (F, D) by |cosine| (the coefficient of arXiv 2505.20254)."""
    return _assigned(_cosines(directions, rows).abs())


def match_activations(features: Tensor, latents: Tensor) -> Matching:
    """Features (N, G) and latents (N, F) by |correlation| over rows; what never changes correlates with nothing."""
    a, b = ((part - part.mean(0)).double() for part in (features, latents))
    norms = a.norm(dim=0)[:, None] * b.norm(dim=0)[None]
    return _assigned(((a.T @ b) / norms.clamp_min(1e-12)).abs())


def recovered(directions: Tensor, rows: Tensor) -> float:
    """Share of features (G, D) whose nearest decoder row (F, D) has a cosine of at least RECOVERED."""
    return float((_cosines(directions, rows).max(1).values >= RECOVERED).double().mean())


def absorption(latents: Tensor, truth: Truth, rows: Tensor, matching: Matching,
               carried: float = CARRIED) -> pd.DataFrame:
    """How far children's latents have taken their parent's place, by parent, on the truth's rows.

    A row is absorbed where the parent and a child fire (by the truth), the parent's latent (by ``matching``) is silent,
    and the latent of a child that fires carries the parent: the largest f_j <w_j, d> over such children's latents is
    at least ``carried`` of the parent's strength, with d the parent's true direction. ``rate`` is of the rows where a
    child fires with its parent, ``rate_of_parent`` of all where the parent does. A parent whose latent has a cosine
    under PAIRED has none (``known`` is false) and no rate.
    """
    features, found = truth.features, []
    for feature in truth.parent[truth.parent >= 0].unique().tolist():
        children = np.flatnonzero(truth.parent.numpy() == feature)
        children = children[matching.latent[children] >= 0]
        on = features[:, feature] > 0
        child_on = features[:, truth.parent == feature] > 0
        both = on & child_on.any(1)
        known = bool(matching.likeness[feature] >= PAIRED)
        own = torch.from_numpy(matching.latent[children])
        projections = latents[:, own] * (rows[own] @ truth.directions[feature])
        projections = torch.where(features[:, torch.from_numpy(children)] > 0, projections, 0.0)
        most = projections.max(1).values if len(children) else torch.zeros(len(features))
        silent = latents[:, int(matching.latent[feature])] <= 0
        taken = int((both & silent & (most >= carried * features[:, feature])).sum()) if known else 0
        rows_both, rows_on = int(both.sum()), int(on.sum())
        found.append({"feature": feature, "known": known, "cosine": float(matching.likeness[feature]),
                      "rows": rows_both, "rows_of_parent": rows_on, "absorbed": taken,
                      "rate": taken / rows_both if known and rows_both else np.nan,
                      "rate_of_parent": taken / rows_on if known and rows_on else np.nan})
    return pd.DataFrame(found, columns=ABSORPTION_COLUMNS)


ABSORPTION_COLUMNS = ("feature", "known", "cosine", "rows", "rows_of_parent", "absorbed", "rate", "rate_of_parent")


@torch.no_grad()
def measure(sae, x: Tensor, truth: Truth) -> tuple[dict[str, Any], pd.DataFrame]:
    """Figures of an SAE for raw activations on ``x`` (N, D), rows of ``truth``; and absorption by parent.

    ``true_absorption`` and ``true_absorption_of_parent`` are means over the parents that have a latent, None where no
    parent has one.
    """
    latents = torch.cat([sae.encode(part) for part in x.split(4096)]).float().cpu()
    rows = sae.W_dec.detach().float().cpu()
    matching = match_rows(truth.directions, rows)
    by_parent = absorption(latents, truth, rows, matching)
    return {"mcc": matching.mcc, "mcc_activations": match_activations(truth.features, latents).mcc,
            "recovered": recovered(truth.directions, rows), "l0": float((latents > 0).sum(1).double().mean()),
            "true_l0": float((truth.features > 0).sum(1).double().mean()),
            "parents": len(by_parent), "parents_known": int(by_parent.known.sum()),
            "true_absorption": _mean(by_parent.rate),
            "true_absorption_of_parent": _mean(by_parent.rate_of_parent)}, by_parent


class Rank(NamedTuple):
    """Spearman's rank correlation."""

    rho: float
    low: float
    high: float
    n: int
    """SAEs that have both figures."""


def rank_correlation(one, other, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Rank:
    """Spearman's rho of two figures of the same SAEs, with the percentile interval of a bootstrap over SAEs.

    Pairs with a missing figure are left out. A draw in which one figure is the same throughout has no rho and is left
    out. NaN where fewer than three SAEs, or no variation, are left.
    """
    a, b = (np.asarray([np.nan if value is None else value for value in part], float) for part in (one, other))
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    rho = _rho(a, b)
    if not np.isfinite(rho):
        return Rank(np.nan, np.nan, np.nan, len(a))
    places = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
    drawn = np.array([_rho(a[place], b[place]) for place in places])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Rank(rho, float(low), float(high), len(a))


def _rho(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _cosines(directions: Tensor, rows: Tensor) -> Tensor:
    """(G, F)"""
    a, b = (torch.nn.functional.normalize(part.detach().double().cpu(), dim=1) for part in (directions, rows))
    return a @ b.T


def _assigned(likeness: Tensor) -> Matching:
    feature, latent = linear_sum_assignment(likeness.numpy(), maximize=True)
    partner, value = np.full(len(likeness), -1, np.int64), np.zeros(len(likeness))
    partner[feature], value[feature] = latent, likeness.numpy()[feature, latent]
    return Matching(partner, value)


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None
