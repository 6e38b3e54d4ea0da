"""How often equal variants would be called different: the rate of false claims of ``results.differences``.

A pair is one variant twice, each time with other training seeds: whatever is claimed of the two is false.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from scipy import stats

from sae_lib.evaluation import results

ANY, ANY_COUNTED = "any metric, each for itself", "any metric, all counted"


def pair(table: pd.DataFrame, first: Sequence[str], second: Sequence[str]) -> pd.DataFrame:
    """The rows of a table of runs (``results.collect``) as two variants, ``first`` and ``second``, of equal seeds.

    The n-th run of the one is paired with the n-th of the other. The true seeds differ: with equal ones the two would
    be the same run, bit for bit. Raises KeyError for a run that the table does not have.
    """
    rows = table.set_index("run", drop=False).loc[[*first, *second]].reset_index(drop=True)
    return rows.assign(variant=["first"] * len(first) + ["second"] * len(second),
                       seed=[*range(len(first)), *range(len(second))])


def rate(pairs: Iterable[pd.DataFrame], metrics: Sequence[str] = results.FIGURES, level: float = 0.95) -> pd.DataFrame:
    """By metric, the share of pairs of which a difference is claimed, with its Clopper-Pearson interval.

    Pairs must share no run, or the interval is too narrow. A pair of which no claim is possible (fewer than three
    seeds that are results and compare) is not counted. The row ANY counts a pair once, whichever metrics are claimed:
    Holm's correction is within a metric, and a reader of many metrics meets more false claims. ANY_COUNTED is of the
    claims that hold over all metrics too. Columns: metric, pairs, claims, share, low, high.
    """
    counted: dict[str, list[bool]] = {metric: [] for metric in (*metrics, ANY, ANY_COUNTED)}
    for table in pairs:
        found = results.differences(table, "first", metrics, level)
        found = found[found.low.notna()]
        claimed = found.claim.str.startswith(("higher", "lower"))
        for metric, called in zip(found.metric, claimed):
            counted[metric].append(bool(called))
        if len(found):
            counted[ANY].append(bool(claimed.any()))
            counted[ANY_COUNTED].append(bool((found.all_metrics == "holds").any()))
    rows = [{"metric": metric, "pairs": len(called), "claims": sum(called),
             "share": sum(called) / len(called)} | dict(zip(("low", "high"), clopper_pearson(sum(called), len(called))))
            for metric, called in counted.items() if called]
    return pd.DataFrame(rows, columns=["metric", "pairs", "claims", "share", "low", "high"])


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a binomial share, ``hits`` of ``n`` (n at least 1)."""
    found = stats.binomtest(hits, n).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)
