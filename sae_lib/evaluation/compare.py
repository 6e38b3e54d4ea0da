"""05's work: the runs of a study (or a list) into one table, its differences, and files for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from sae_lib import params, runs, studies
from sae_lib.evaluation import distributions, null_table, ranking, results

LETTER_COLUMNS = ["letter", "kept", "full_absorption", "absorption_fraction", "splits"]
DRAWN = {"step", "samples", "loss/reconstruction", "explained_variance"}


class Comparison:
    """What the page shows. What its tables say is known from the start, what its figures show when one asks for it."""

    def __init__(self, p: params.Compare, names: list[str], table: pd.DataFrame, nulls: pd.DataFrame):
        self.study, self.names = p.study, names
        self.folder: Path = runs.folder_of(f"{p.study}/compare")
        """Where files go: runs/<study>/compare."""
        self.table = table
        """One row per run, whatever its state."""
        self.nulls = nulls
        """A row per distinct null baseline of the runs (``null_table.collect``); in no rank, mean or series."""
        self.baseline: str | None = p.baseline
        """The variant that others are compared with; None for the first run's."""
        self.frontier: str = p.frontier
        """What the frontier runs along; where that is a parameter, the table's column ``along`` holds it."""

    @functools.cached_property
    def differences(self) -> pd.DataFrame:
        """Each variant beside the baseline, by metric."""
        return results.differences(self.table, self.baseline)

    @functools.cached_property
    def ranking(self) -> pd.DataFrame:
        """Variants in order, by metric, and which of them seeds do not tell apart."""
        return ranking.ranking(self.table, self.baseline)

    @property
    def apart(self) -> pd.DataFrame:
        """Runs that do not compare with the baseline, and why."""
        return self.table.loc[self.table["apart"] != "", ["run", "status", "apart", "reasons"]]

    @functools.cached_property
    def histories(self) -> dict[str, pd.DataFrame]:
        """Training history by run."""
        return {name: history for name in self.names if (history := _history(name)) is not None}

    @functools.cached_property
    def letters(self) -> pd.DataFrame:
        """Full absorption and fraction by run, seed and letter, of the runs that are results."""
        return _letters(self.table)

    @functools.cached_property
    def phases(self) -> dict[str, list[dict[str, Any]]]:
        """Decoder cosines and co-activation at the end of each third of training, by run."""
        return {name: found for name in self.names if (found := _phases(name))}

    @functools.cached_property
    def parameters(self) -> dict[str, str]:
        """By run, the parameters that differ from its baseline's, a line each."""
        return parameters_apart(self.table, self.baseline)

    @functools.cached_property
    def sparsity(self) -> dict[str, distributions.Sparsity]:
        """Active latents per token and densities, by run."""
        return _each(distributions.sparsity, self.table)

    @functools.cached_property
    def projections(self) -> dict[str, dict[str, Any]]:
        """Quality of a Johnson-Lindenstrauss projection, by run that has one."""
        return _each(distributions.projection, self.table)

    @functools.cached_property
    def compression(self) -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """By run that has any: evals/compression.json, evals/compression_absorption.json, and bounds by ingredient."""
        return {name: found for name in self.names if any(found := _compression(name))}

    @functools.cached_property
    def over_training(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """By run that has any: evals/over_training.json and evals/absorption_over_training.json."""
        return {name: found for name in self.names if (found := _over_training(name))}


def compare(p: params.Compare) -> Comparison:
    """Read the runs that ``p`` names (or all of its study) and write table, nulls, differences and ranking as files.

    Raises RunError when there is nothing to compare; what is wrong with one run is a row of the table.
    """
    names = p.runs or _of_study(p.study)
    if not names:
        raise runs.RunError(f"study '{p.study}': no runs in {runs.folder_of(f'{p.study}/compare').parent}; "
                            f"run `snakemake --config study={p.study}`")
    table = results.compared(results.collect(names), p.baseline)
    if p.frontier != "l0":
        table = table.assign(along=[_parameter(name, p.frontier) for name in table.run])
        if table.along.isna().all():
            raise params.ParameterError(f"frontier: no run has a number for '{p.frontier}'"
                                        f"{params.nearest(p.frontier, params.VOCABULARY)}")
    found = Comparison(p, names, table, null_table.collect(names))
    _export(found.folder, "ranking", found.ranking)
    _export(found.folder, "differences", found.differences)
    # A file of their own: in the table's a reader's mean over a column would take them up.
    _export(found.folder, "nulls", found.nulls)
    _export(found.folder, "table", results.masked(table))
    return found


def parameters_apart(table: pd.DataFrame, baseline: str | None) -> dict[str, str]:
    """For each run the parameters that differ from its baseline's run (of its seed, where there is one)."""
    held = {name: _params(name) for name in table.run}
    found = {}
    for row, own in zip(table.itertuples(), results.baselines(table, baseline)):
        beside = table[table.variant == own]
        same = beside[beside.seed == row.seed]
        base, asked = held[(same if len(same) else beside).run.iloc[0]], held[row.run]
        apart = sorted(key for key in {*base, *asked} if base.get(key) != asked.get(key))
        found[row.run] = "\n".join(f"{key}: {_short(asked.get(key))} (baseline {_short(base.get(key))})"
                                   for key in apart) or "parameters as the baseline's"
    return found


def _params(name: str) -> dict[str, Any]:
    try:
        return dict(runs.Run(name).params)
    except (runs.RunError, params.ParameterError, TypeError, ValueError):
        return {}


def _short(value: Any, longest: int = 90) -> str:
    if isinstance(value, list):  # ingredients
        value = ", ".join(str(part.get("name", part)) + "".join(
            f" {key}={item}" for key, item in part.items() if key != "name") if isinstance(part, dict) else str(part)
            for part in value) or "none"
    text = str(value)
    return text if len(text) <= longest else text[:longest - 1] + "…"


def _parameter(name: str, parameter: str) -> float | None:
    """A run's value of a training parameter, or of an ingredient's (``<name>.<key>``; of a schedule its start)."""
    try:
        run, (head, *keys) = runs.Run(name), parameter.split(".")
        value = run.params.get(head)
        if keys:
            value = next(part for part in run.json("training.json", {})["ingredients"] if part["name"] == head)
        for key in keys:
            value = value[key]
        value = value["start"] if isinstance(value, dict) else value
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except (runs.RunError, params.ParameterError, KeyError, TypeError, StopIteration):
        return None


def _phases(name: str) -> list[dict[str, Any]]:
    """A run's phases, or none where they cannot be drawn."""
    try:
        found = runs.Run(name).json("training.json", {}).get("phases", [])
        fine = all({"phase", "cosines", "overlap"} <= set(entry) for entry in found)
        return found if fine else []
    except (runs.RunError, params.ParameterError, TypeError, AttributeError):
        return []


def _each(measure: Callable[[str], Any], table: pd.DataFrame) -> dict[str, Any]:
    """Of the runs whose figures are results, those of which there is something."""
    return {name: found for name in results.results(table).run if (found := measure(name)) is not None}


def _compression(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a run's evaluations and ingredients say of shares of its latents; nothing where it cannot be drawn."""
    try:
        run = runs.Run(name)
        curve, absorption = (run.json(f"evals/{file}.json", {}) for file in ("compression", "compression_absorption"))
        fine = all({"ratio", "interval"} <= set(row) for row in [*curve.get("curve", []),
                                                                 *absorption.get("by_ratio", [])])
        measured = run.json("training.json", {}).get("measured") or {}
        bounds = {part: found["bound"] for part, found in measured.items() if isinstance(found.get("bound"), dict)}
        return (curve, absorption, bounds) if fine else ({}, {}, bounds)
    except (runs.RunError, params.ParameterError, TypeError, AttributeError):
        return {}, {}, {}


def _over_training(name: str) -> tuple[dict[str, Any], ...]:
    """What a run's evaluations say of the SAEs kept in training; nothing where it cannot be drawn."""
    try:
        held = [runs.Run(name).json(f"evals/{file}.json") for file in ("over_training", "absorption_over_training")]
        found = tuple(report for report in held if report and "points" in report)
        wanted = {"samples", "status", "not_a_result", "metrics", "interval"}
        return found if all(wanted <= set(point) for report in found for point in report["points"]) else ()
    except (runs.RunError, params.ParameterError, KeyError, TypeError):
        return ()


def _export(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """The same table as CSV, parquet, LaTeX and Markdown; CSV last, since a batch waits for it."""
    # pandas' own LaTeX imports matplotlib, for a second's colours that are not asked for.
    filled = frame.astype(object).where(frame.notna(), None)
    # Text stays text: a hash of digits ("12e4") is no number.
    words = [number for number, name in enumerate(frame) if frame[name].map(lambda value: isinstance(value, str)).any()]
    texts = {ending: tabulate(filled, headers="keys", tablefmt=kind, floatfmt=".4g", missingval=gap, showindex=False,
                              disable_numparse=words) + "\n"
             for ending, kind, gap in (("tex", "latex_booktabs", "--"), ("md", "pipe", ""))}
    with runs.whole(folder / f"{name}.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    for ending, text in texts.items():
        runs.write_text(folder / f"{name}.{ending}", text)
    with runs.whole(folder / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False)


def _letters(table: pd.DataFrame) -> pd.DataFrame:
    """Each kept letter's figures, of the runs whose figures are results."""
    found = []
    for name in results.results(table).run:
        frame = _parquet(name, "evals/absorption_letters.parquet", LETTER_COLUMNS)
        if frame is not None and len(frame):
            found.append(frame[frame.kept].assign(run=name))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*LETTER_COLUMNS, "run"])


def _of_study(study: str) -> list[str]:
    """The runs that a study's file asks for, and any other found in its folder."""
    try:
        names = [member.name for member in studies.expand(study)]
    except params.ParameterError:
        names = []
    found = sorted(path.parent for path in (runs.home() / "runs" / study).glob("*/params.yaml"))
    return list(dict.fromkeys([*names, *(f"{study}/{path.name}" for path in found)]))


def _history(name: str) -> pd.DataFrame | None:
    """A run's history, or None where there is none that can be drawn."""
    history = _parquet(name, "history.parquet")
    return history if history is not None and DRAWN.issubset(history.select_dtypes("number")) else None


def _parquet(name: str, file: str, columns: list[str] | None = None) -> pd.DataFrame | None:
    """A file of a run's, or None where it is missing or damaged."""
    try:
        return runs.read_table(runs.folder_of(name) / file, columns)
    except (runs.RunError, params.ParameterError):
        return None
