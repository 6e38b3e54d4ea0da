"""Null baselines beside a run's own figures: columns and rows of 03's and 04's tables, and why one has no figure."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sae_lib.evaluation.null_names import LABELS
from sae_lib.views.template import GREY_INK


def figures(nulls: dict[str, Any], evaluation: str) -> dict[str, dict[str, float]]:
    """By null in words, in the order of tables: its metrics in an evaluation, where it has any."""
    return {entry["config"]["what"]: entry["metrics"] for name in LABELS
            if (entry := nulls.get(name, {}).get(evaluation, {})).get("metrics")}


def with_columns(table: pd.DataFrame, nulls: dict[str, Any], evaluation: str, names: list[str]) -> pd.DataFrame:
    """A table of metrics (a row for each of ``names``) with a column per null after the value and its interval."""
    first = 3 if "within this SAE" in table else 2
    for place, (what, metrics) in enumerate(figures(nulls, evaluation).items(), first):
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


def draw(fig: go.Figure, nulls: pd.DataFrame, metric: str, span: tuple[float, float], line: str, **place: int) -> None:
    """A dotted line (``line``: hline or vline) in a panel for each row of ``nulls`` whose figure is on its axis.

    Not for the raw residual stream: it loses nothing, which no SAE could reach.
    """
    shown = [] if nulls is None else nulls[nulls.null != "residual"].to_dict("records")
    for number, row in enumerate(row for row in shown if span[0] <= row[metric] <= span[1]):
        getattr(fig, f"add_{line}")(
            row[metric], line={"color": GREY_INK, "width": 1, "dash": "dot"}, **place,
            annotation={"text": row["label"], "font": {"size": 10, "color": GREY_INK}, "bgcolor": "white",
                        "yshift": -14 * number if line == "vline" else 0},
            annotation_position="top right" if line == "vline" else "bottom right")
