"""05's work: the runs of a study (or a list) into one table, its differences, and files for both."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sae_lib import params, runs, studies
from sae_lib.evaluation import results


class Comparison(NamedTuple):
    """What the page shows."""

    study: str
    folder: Path
    """Where files go: runs/<study>/compare."""
    table: pd.DataFrame
    """One row per run, whatever its state."""
    differences: pd.DataFrame
    """Each variant beside the baseline, by metric."""
    apart: pd.DataFrame
    """Runs that do not compare with the baseline, and why."""
    histories: dict[str, pd.DataFrame]
    """Training history by run."""


def compare(p: params.Compare) -> Comparison:
    """Read the runs that ``p`` names (or all of its study) and write table.csv and differences.csv.

    Raises RunError when there is nothing to compare; what is wrong with one run is a row of the table.
    """
    folder = runs.folder_of(f"{p.study}/compare")
    names = p.runs or _of_study(p.study)
    if not names:
        raise runs.RunError(f"study '{p.study}': no runs in {folder.parent}; run `snakemake --config study={p.study}`")
    table = results.compared(results.collect(names), p.baseline)
    differences = results.differences(table, p.baseline)
    for name, frame in (("differences", differences), ("table", results.masked(table))):
        with runs.whole(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    histories = {name: history for name in names if (history := _history(name)) is not None}
    apart = table.loc[table["apart"] != "", ["run", "status", "apart", "reasons"]]
    return Comparison(p.study, folder, table, differences, apart, histories)


def _of_study(study: str) -> list[str]:
    """The runs that a study's file asks for, and any other found in its folder."""
    try:
        names = [member.name for member in studies.expand(study)]
    except params.ParameterError:
        names = []
    found = sorted(path.parent for path in (runs.home() / "runs" / study).glob("*/params.yaml"))
    return list(dict.fromkeys([*names, *(f"{study}/{path.name}" for path in found)]))


def _history(name: str) -> pd.DataFrame | None:
    try:
        history = pd.read_parquet(runs.folder_of(name) / "history.parquet")
    except (OSError, ValueError, params.ParameterError):
        return None
    return history if {"samples", "loss/reconstruction", "explained_variance"} <= set(history) else None
