"""Variants in order, metric by metric, and which of them their seeds do not tell apart.

All pairs of variants that share a baseline are compared in the fit that the claims rest on (``contrasts.fit``: variant
+ seed), with Holm's correction over all pairs of a metric. A rank is a range: from one more than are shown to be better
to as many as are not shown to be worse. A metric without a direction ranks nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from sae_lib.evaluation import contrasts, results
from sae_lib.metrics import METRICS

FEWEST = 3
"""Seeds of a variant, at least."""
COLUMNS = ["metric", "baseline", "rank", "variant", "seeds", "mean", "low", "high", "alike", "claim"]


def ranking(table: pd.DataFrame, baseline: str | None, metrics=results.FIGURES, level: float = 0.95) -> pd.DataFrame:
    """Variants of a table of runs by metric, the best first; those of under three seeds last, without a rank.

    Columns: metric; baseline (variants of one are ranked together); rank ("1", "1-3", or empty); variant; seeds; mean
    over its seeds, adjusted (least squares) where a variant lacks one that others have; low and high, the t interval
    over its own seeds alone, cut to what the metric can be; alike, the variants not shown to differ, joined by ", ";
    claim. Intervals of two variants may overlap although their paired difference is shown.
    """
    valid, rows = results.single(table, baseline), []
    for metric in (name for name in metrics if METRICS[name].direction and name in valid):
        held = valid.dropna(subset=[metric])
        groups = [_group(metric, own, runs_of, level) for own, runs_of in held.groupby("own", sort=False)]
        pairs = [pair for _, of_group in groups for pair in of_group]
        contrasts.holm(pairs)
        apart = {(pair["better"], pair["worse"]) for pair in pairs if pair.get("p_holm", 1.0) <= 1 - level}
        for of_group, _ in groups:
            rows += _ranked(of_group, apart)
    return pd.DataFrame(rows, columns=COLUMNS)


def _group(metric: str, own: str, held: pd.DataFrame, level: float):
    """Variants that share a baseline, the best first, and the pairs of those that have seeds enough."""
    fitted = contrasts.fit(held[metric], held.variant, held.seed)
    means, rows = dict(zip(fitted.variants, fitted.effect)), []
    for variant, runs_of in held.groupby("variant", sort=False):
        seeds, spread = len(runs_of), runs_of[metric].std()
        reach = special.stdtrit(seeds - 1, (1 + level) / 2) * spread / np.sqrt(seeds) if seeds >= FEWEST else np.nan
        low, high = (np.clip(means[variant] + side * reach, METRICS[metric].lowest, METRICS[metric].highest)
                     for side in (-1, 1))
        rows.append({"metric": metric, "baseline": own, "variant": variant, "seeds": seeds, "mean": means[variant],
                     "low": low, "high": high})
    few = [row for row in rows if row["seeds"] < FEWEST]  # these stay as they come: an order would be read as one
    rows = sorted((row for row in rows if row not in few), key=lambda row: -METRICS[metric].direction * row["mean"])
    enough = [row["variant"] for row in rows]
    return rows + few, [{"better": one, "worse": other, **fitted.contrast(one, other, level)}
                  for one, other in itertools.combinations(enough, 2)]


def _ranked(rows: list[dict[str, Any]], apart: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Add to each row its rank, who is alike, and the claim; ``apart``: pairs shown to differ, better first."""
    names = [row["variant"] for row in rows if row["seeds"] >= FEWEST]
    for row in rows:
        own = row["variant"]
        if own not in names:
            count = row["seeds"]
            row |= {"rank": "", "alike": "", "claim": f"no claim possible: {count} seed{'s' * (count != 1)}, at least "
                                                      f"{FEWEST} are needed"}
            continue
        better, worse = ([name for name in names if pair(name) in apart] for pair in (
            lambda name, own=own: (name, own), lambda name, own=own: (own, name)))
        alike = [name for name in names if name not in (own, *better, *worse)]
        first, last = 1 + len(better), len(names) - len(worse)
        row |= {"rank": str(first) if first == last else f"{first}-{last}", "alike": ", ".join(alike)}
        row["claim"] = ("no other variant to rank it with" if len(names) == 1 else
                        f"not distinguishable from {row['alike']}" if alike else "distinguishable from every other")
    return rows
