"""Figures of latents kept: quality against their share, what they know of two corpora, and a bound's tightness.

Pure functions from reports to plotly. Each line is one SAE, its bars the interval within that SAE; what is no result is
not drawn, and the caption says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import labels, main, why
from sae_lib.views.template import GREY, dress, mark, style

CURVES = ("explained_variance", "loss_recovered")
ABSORPTION = ("mean_full_absorption_score", "mean_absorption_fraction_score")
SHARE = "Latents kept, r"


class Kept(NamedTuple):
    """What one run's evaluations say of shares of its latents."""

    label: str
    curve: dict[str, Any]
    """The content of evals/compression.json, or nothing."""
    absorption: dict[str, Any]
    """The content of evals/compression_absorption.json, or nothing."""
    bounds: dict[str, dict[str, Any]]
    """By ingredient, what it measured of its bound (training.json)."""
    apart: str = ""
    """Why the run does not stand beside the others; then its lines are grey."""

    @property
    def no_result(self) -> str:
        """Why its figures are no results; empty if they are."""
        return self.curve.get("not_a_result") or self.absorption.get("not_a_result") or ""


def of_study(comparison, caption: str = "") -> dict[str, go.Figure]:
    """The figures of 05 by name, of what the study's runs hold; none where no run was measured so."""
    table, names, kept = comparison.table, labels(comparison.table), main(comparison.table)
    runs = [Kept(names[row.run], *comparison.compression[row.run], "" if kept[row.Index] else why(row))
            for row in table.itertuples() if row.run in comparison.compression]
    return all_figures(runs, caption)


def of_run(label: str, report: dict[str, Any], caption: str = "") -> dict[str, go.Figure]:
    """The figures of 03's page by name, for the content of evals/compression.json; none for an empty or failed one."""
    return all_figures([Kept(label, report, {}, {})] if "curve" in report else [], caption)


def all_figures(runs: list[Kept], caption: str = "") -> dict[str, go.Figure]:
    """Every figure of this file by name, as far as some run holds what it shows."""
    found = {}
    if any(run.curve or run.absorption for run in runs):
        found["compression_curves"] = curves(runs, caption)
    if any(run.curve.get("localization") for run in runs):
        found["localization"] = localization(runs, caption)
    if any(run.bounds for run in runs):
        found["bound_tightness"] = bound_tightness(runs, caption)
    return found


def curves(runs: list[Kept], caption: str = "", metrics: tuple[str, ...] = (*CURVES, *ABSORPTION[:1]),
           title: str = "Quality against the share of latents kept") -> go.Figure:
    """A panel a metric, a line a run: the most important latents are kept, the others are 0."""
    held = {name: [_rows(run, name) for run in runs] for name in metrics}
    panels = [name for name in metrics if any(len(rows) for rows in held[name])] or list(metrics[:1])
    fig = _panels(panels)
    for number, run in enumerate(runs):
        for col, name in enumerate(panels, 1):
            if len(held[name][number]):
                _line(fig, held[name][number], number, run, {"row": 1, "col": col})
    for col, name in enumerate(panels, 1):
        fig.update_yaxes(title=METRICS[name].axis, rangemode="tozero", row=1, col=col)
    fig.update_xaxes(title=SHARE, range=[0, 1.04], tickformat=".0%")
    _nothing(fig, runs)
    return _dressed(fig, title, _said(runs, f"{caption}; bars: 95 % within each SAE"),
                    width=160 + 340 * len(panels), height=540)


def localization(runs: list[Kept], caption: str = "") -> go.Figure:
    """A column for each corpus whose own latents are kept, beside another; a line for each corpus measured.

    Lines apart: the latents that are kept know more of the one corpus than of the other.
    """
    pairs = list(dict.fromkeys((part["kept_for"], part["against"]) for run in runs
                               for part in run.curve.get("localization", [])))
    corpora = list(dict.fromkeys(name for pair in pairs for name in pair))
    several = len([run for run in runs if run.curve.get("localization")]) > 1
    fig = make_subplots(rows=2, cols=len(pairs), vertical_spacing=0.1, horizontal_spacing=0.1, subplot_titles=[
        f"kept: {_short(own)}'s own,<br>beside {_short(other)}" for own, other in pairs])
    spans: dict[int, list[float]] = {1: [0.0], 2: [0.0]}
    for number, run in enumerate(runs):
        for part in run.curve.get("localization", []):
            col = pairs.index((part["kept_for"], part["against"])) + 1
            for name, rows in part["on"].items():
                label = f"on {_short(name)}" + (f", {run.label}" if several else "")
                for row, metric in enumerate(("loss_recovered", "explained_variance"), 1):
                    shown = _frame(rows, metric)
                    spans[row] += [*shown.value.dropna(), *shown.low.dropna(), *shown.high.dropna()]
                    _line(fig, shown, number * len(corpora) + corpora.index(name), run._replace(label=label),
                          {"row": row, "col": col})
    for row, metric in enumerate(("loss_recovered", "explained_variance"), 1):
        said = METRICS[metric]
        room = 0.04 * (max(spans[row]) - min(spans[row]))
        fig.update_yaxes(range=[min(spans[row]) - room, max(spans[row]) + room], row=row)
        fig.update_yaxes(title=f"{said.label}, {said.unit}<br>({said.reading})", row=row, col=1)
    fig.update_xaxes(range=[0, 1.04], tickformat=".0%")
    fig.update_xaxes(title=SHARE, row=2)
    return _dressed(fig, "What the latents of one corpus know of another",
                    _said(runs, f"{caption}; ranked by mean latent on the one over the other, on text that is not "
                                "measured; bars: 95 % within each SAE"),
                    width=190 + 340 * len(pairs), height=760, side=110)


def bound_tightness(runs: list[Kept], caption: str = "") -> go.Figure:
    """Measured error over its bound against the share kept: mean and worst token, a pair of lines a run."""
    fig, said, metric, top = go.Figure(), [], METRICS["bound_tightness"], 1.0
    without: dict[str, list[str]] = {}
    named = [(run, bound) for run in runs for bound in run.bounds.values()]
    for number, (run, bound) in enumerate(named):
        if run.apart and not run.apart.startswith("not comparable"):  # of one SAE by itself, as the bound is
            said.append(f"{run.label}: {run.apart}")
        elif bound.get("applicable") is False:
            without.setdefault(bound.get("reason") or "not applicable", []).append(run.label)
        else:
            rows = pd.DataFrame(bound.get("by_ratio") or [], columns=["ratio", "mean", "worst", "holds"])
            rows = rows.sort_values("ratio")
            whole = bound.get("tightness") or {}
            if rows.empty and whole:
                said.append(f"{run.label}: mean {_number(whole.get('mean'))}, worst {_number(whole.get('worst'))}")
            top = max([top, *rows["worst"].dropna(), *rows["mean"].dropna()])
            for which, dash in (("mean", "solid"), ("worst", "dot")):
                fig.add_scatter(x=rows.ratio, y=rows[which], mode="lines+markers", name=f"{run.label}, {which}",
                                line=style(number) | {"dash": dash}, marker=mark(number, 9))
            broken = rows[rows.holds.eq(False)]
            if len(broken) or bound.get("holds") is False:
                said.append(f"{run.label}: the bound does NOT hold")
                fig.add_scatter(x=broken.ratio, y=broken.worst, mode="markers", name=f"{run.label}, bound broken",
                                marker={"symbol": "x", "size": 15, "color": "#000000"})
    fig.add_hline(y=1, line={"color": "#111111", "dash": "dash", "width": 1.5}, annotation_text="the bound",
                  annotation_position="top left")
    fig.update_xaxes(title=SHARE, range=[0, 1.04], tickformat=".0%")
    fig.update_yaxes(title="Measured error / bound", range=[0, 1.1 * top])
    said += [f"no bound for {', '.join(labels)} ({reason})" for reason, labels in without.items()]
    text = "; ".join([caption, metric.formula, *said])
    return _dressed(fig, f"Tightness of the bound ({metric.reading}; 1 is tight)", text, width=720, height=620)


# -- within ------------------------------------------------------------------------------------------------------

def _panels(names: list[str]) -> go.Figure:
    return make_subplots(rows=1, cols=len(names), subplot_titles=[METRICS[n].stacked for n in names],
                         horizontal_spacing=0.36 / (1 + len(names)))


def _rows(run: Kept, metric: str) -> pd.DataFrame:
    """Value and interval by ratio of one metric of a run; no rows where it has none."""
    if metric not in ABSORPTION:
        return _frame(run.curve.get("curve") or [], metric)
    rows = [{"ratio": row["ratio"], metric: row["metrics"][metric], "interval": row["interval"]}
            for row in run.absorption.get("by_ratio") or [] if metric in row["metrics"]]
    return _frame(rows, metric)


def _frame(rows: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    spans = [(row.get("interval") or {}).get(metric) or (None, None) for row in rows]
    frame = pd.DataFrame({"ratio": [row["ratio"] for row in rows], "value": [row[metric] for row in rows],
                          "low": [span[0] for span in spans], "high": [span[1] for span in spans]}, dtype=float)
    return frame.sort_values("ratio")


def _line(fig: go.Figure, rows: pd.DataFrame, number: int, run: Kept, place: dict[str, int]) -> None:
    line = {"color": GREY, "dash": "dot", "width": 1.5} if run.apart else style(number)
    marks = mark(number, 8) | ({"color": GREY} if run.apart else {})
    name = f"{run.label} ({run.apart.partition(':')[0]})" if run.apart else run.label
    fig.add_scatter(x=rows.ratio, y=rows.value, mode="lines+markers", name=name, legendgroup=name,
                    showlegend=not any(trace.name == name for trace in fig.data), line=line, marker=marks, **place,
                    hovertext=f"{run.label}: {run.apart}".replace("<", "&lt;") if run.apart else run.label,
                    error_y={"type": "data", "symmetric": False, "array": rows.high - rows.value,
                             "arrayminus": rows.value - rows.low, "thickness": 1.2, "width": 3})


def _dressed(fig: go.Figure, title: str, caption: str, width: int, height: int, side: int = 80) -> go.Figure:
    """The workbook's look, with the legend at the right, for which plotly makes room in the width added here."""
    names = [trace.name for trace in fig.data if trace.showlegend is not False]
    room = 50 + 8 * max((len(name) for name in names), default=0) if names else 0
    fig.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}, showlegend=bool(names))
    return dress(fig, title, caption, width=width + room, height=max(height, 340 + 23 * len(names)), top=110, side=side)


def _said(runs: list[Kept], caption: str) -> str:
    """The caption with the runs that are not drawn, and why."""
    left = [f"{run.label} ({run.no_result})" for run in runs if run.no_result]
    return caption + (f"; no results, left out: {', '.join(left)}" if left else "")


def _nothing(fig: go.Figure, runs: list[Kept]) -> None:
    if not any(trace.y is not None and len(trace.y) for trace in fig.data):
        fig.update_yaxes(range=[0, 1])
        fig.add_annotation(text="no result", showarrow=False, font={"size": 20, "color": GREY}, xref="paper",
                           yref="paper", x=0.5, y=0.5)


def _short(corpus: str) -> str:
    """A corpus for a legend: the topic of a newsgroup, the file of a path."""
    return corpus.rpartition("/")[2].removeprefix("newsgroups_")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else "not known"
