"""The null baselines of several runs as rows for 05: each once, however many runs share it, and apart from the runs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sae_lib import params, runs
from sae_lib.evaluation import results, validity
from sae_lib.evaluation.null_names import LABELS

COLUMNS = ("null", "run", "label", "model", "hook", "architecture", "d_sae", "weights", "beside", "without")
"""``run`` names the null as a table's row does; ``beside``: the runs that it stands beside, comma between; ``without``:
evaluations that it has no figure in, and why."""
OF = {"heldout": results.TRAINING, "core": results.CORE, "absorption": results.LETTERS, **results.FURTHER}
"""Of each evaluation, the metrics of a table's row."""


def collect(names: list[str]) -> pd.DataFrame:
    """One row per distinct null (same weights, same evaluations) of the runs ``names``: ``COLUMNS`` and every metric.

    Intervals "within this SAE" stand in columns as those of runs do (``results.within``).

    A run whose file is not there, or damaged, adds none.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            run = runs.Run(name)
            training, values = run.json("training.json", {}), run.params
            for null, entries in validity.null_baselines(run).items():
                _add(found, _row(null, entries, training, values), name)
        except (runs.RunError, params.ParameterError, KeyError, TypeError, AttributeError, ValueError):
            continue
    rows = [row | {"beside": ", ".join(row["beside"]), "without": "; ".join(row["without"].values())}
            for row in sorted(found.values(), key=lambda row: list(LABELS).index(row["null"]))]
    within = dict.fromkeys(name for row in rows for name in row if name.startswith("within/"))
    table = pd.DataFrame(rows, columns=[*COLUMNS, *results.FIGURES, *within])
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in results.FIGURES})


def _row(null: str, entries: dict[str, Any], training: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    fine = {name: entry for name, entry in entries.items() if "metrics" in entry}
    about = next(iter(fine.values()))["config"] if fine else {}
    row = {"null": null, "run": f"null: {about.get('what', LABELS[null])}", "label": LABELS[null],
           "model": values.get("model"), "hook": training.get("hook"), "architecture": about.get("architecture"),
           "d_sae": about.get("d_sae"), "weights": about.get("weights", "")}
    row["without"] = {name: f"{name}: {entry['status']}, {entry['reason']}" for name, entry in entries.items()
                      if name not in fine}
    row["compare"] = {name: entry["config"]["comparable"] for name, entry in fine.items()}
    for name, entry in fine.items():
        row |= {metric: entry["metrics"].get(metric) for metric in OF[name] if metric in results.FIGURES}
        row |= results.within(entry, OF[name])
    return row


def _add(found: dict[str, dict[str, Any]], row: dict[str, Any], name: str) -> None:
    """Join a row with one of the same null, unless an evaluation that both have was another one."""
    for place in range(1 + len(found)):
        key = f"{row['null']} {row['weights']} {place}"
        other = found.setdefault(key, {"compare": {}, "without": {}, "beside": []})
        if all(other["compare"].get(one, same) == same for one, same in row["compare"].items()):
            compare, without = (other[part] | row[part] for part in ("compare", "without"))
            told = {one: value for one, value in row.items() if value is not None or one not in other}
            found[key] = other | told | {"compare": compare, "beside": [*other["beside"], name],
                                         "without": {one: why for one, why in without.items() if one not in compare}}
            return
