"""Null baselines beside a run's own figures: columns and rows of 03's and 04's tables, and why one has no figure."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sae_lib.evaluation.null_saes import LABELS


def figures(nulls: dict[str, Any], evaluation: str) -> dict[str, dict[str, float]]:
    """By null in words, in the order of tables: its metrics in an evaluation, where it has any."""
    return {entry["config"]["what"]: entry["metrics"] for name in LABELS
            if (entry := nulls.get(name, {}).get(evaluation, {})).get("metrics")}


def with_columns(table: pd.DataFrame, nulls: dict[str, Any], evaluation: str, names: list[str]) -> pd.DataFrame:
    """A table of metrics (a row for each of ``names``) with a column per null after the value."""
    for place, (what, metrics) in enumerate(figures(nulls, evaluation).items(), 2):
        if len(table):
            table.insert(place, what, [metrics.get(name) for name in names])
    return table


def without(nulls: dict[str, Any], *evaluations: str) -> str:
    """A sentence for each null that has no figure in one of the evaluations, or whose figures have a note."""
    said = []
    for name, label in LABELS.items():
        for evaluation in evaluations:
            entry = nulls.get(name, {}).get(evaluation, {})
            if "status" in entry:
                said.append(f"{label}, {evaluation}: {entry['status']}: {entry['reason']}.")
            elif entry.get("note"):
                said.append(f"{entry['config']['what']}, {evaluation}: {entry['note']}.")
    return "\n\n".join(said)
