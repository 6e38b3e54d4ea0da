"""Figures of pairs of latents: decoder cosines and co-activation by phase of training, stability of tracked pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation import results
from sae_lib.views.figures_compare import labels, main
from sae_lib.views.template import dress, style

PHASES = ("early", "middle", "late")
WHAT = {"cosines": ("|cosine| of decoder rows", "linear"), "overlap": ("Co-activation |A and B| / |A or B|", "log")}
FEWEST = 1000
"""Pairs of a bin that a share is told of."""
LOG = {"linear": {}, "log": {"dtick": 1, "exponentformat": "power"}}


def phases(report: dict[str, Any], title: str = "", caption: str = "") -> go.Figure:
    """Decoder cosines and co-activation of one run at the end of each third of training."""
    fig = make_subplots(rows=1, cols=2, subplot_titles=("Decoder cosines", "Co-activation"), horizontal_spacing=0.13)
    for number, phase in enumerate(report["phases"]):
        for col, what in enumerate(WHAT, 1):
            x, y = shares(phase[what])
            fig.add_scatter(x=x, y=y, mode="lines+markers", line=style(number), marker_size=4, row=1, col=col,
                            legendgroup=phase["phase"], name=f"{phase['phase']}: step {phase['step']:,}",
                            showlegend=col == 1)
    for col, (name, kind) in enumerate(WHAT.values(), 1):
        fig.update_xaxes(title=name, type=kind, row=1, col=col, **LOG[kind])
        fig.update_yaxes(title="Share of pairs per bin (log)" if col == 1 else None, type="log", dtick=1,
                         exponentformat="power", row=1, col=col)
    if not report["phases"]:
        fig.add_annotation(text="no third of training was finished", showarrow=False, font_size=18, xref="paper",
                           yref="paper", x=0.5, y=0.5)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"})
    return dress(fig, f"Pairs of latents by phase: {title}", caption, height=520, top=140)


def phases_by_run(found: dict[str, list[dict[str, Any]]], table: pd.DataFrame, baseline: str | None = None,
                  caption: str = "") -> go.Figure:
    """Decoder cosines and co-activation beside the baseline's: a column per phase, a line per variant, seeds averaged.

    Shares of pairs relative to the baseline's, in bins where both have FEWEST pairs or more: where runs differ by a
    few per cent, their distributions would lie on each other.
    """
    fig = make_subplots(rows=2, cols=3, shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.17,
                        subplot_titles=[f"{phase.capitalize()} third" for phase in PHASES])
    names, kept = labels(table), table[main(table) & table.run.isin(list(found))]
    own = results.baselines(table, baseline) if len(table) else table.get("variant")
    for number, (_, runs) in enumerate(kept.groupby("variant", sort=False)):
        label = names[runs.run.iloc[0]].rpartition("-s")[0] or names[runs.run.iloc[0]]
        base = kept[kept.variant == own[runs.index[0]]]
        for row, what in enumerate(WHAT, 1):
            for col, phase in enumerate(PHASES, 1):
                x, y = _relative(found, runs.run, base.run, phase, what)
                fig.add_scatter(x=x, y=y, mode="lines", line=style(number), name=label, legendgroup=label,
                                showlegend=row == col == 1, row=row, col=col)
    for row, (name, kind) in enumerate(WHAT.values(), 1):
        fig.update_xaxes(type=kind, row=row, **LOG[kind])
        fig.update_xaxes(title=name, row=row, col=2)
        fig.update_yaxes(type="log", row=row)
        fig.update_yaxes(title="Relative share of pairs", row=row, col=1)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"})
    return dress(fig, "Pairs of latents by phase of training, beside the baseline's",
                 caption + f"; bins of fewer than {FEWEST} pairs left out", width=1120, height=820,
                 top=130 + 22 * (kept.variant.nunique() // 3))


def _relative(found, runs, base, phase: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Bins, and the mean share of ``runs`` in each over that of ``base``."""
    def mean(names):
        entries = [entry[what] for run in names for entry in found[run] if entry["phase"] == phase]
        pairs = [np.array(entry["pairs"], dtype=float) for entry in entries]
        thin = np.min(pairs, axis=0) < FEWEST if pairs else None
        share = np.mean([part / max(part.sum(), 1) for part in pairs], axis=0) if pairs else np.zeros(0)
        return entries, np.where(thin, np.nan, share) if pairs else share
    entries, own = mean(runs)
    _, beside = mean(base)
    if not len(own) or len(own) != len(beside):
        return np.zeros(0), np.zeros(0)
    told = ~np.isnan(own) & ~np.isnan(beside)
    return shares(entries[0])[0][told], own[told] / beside[told]


def shares(histogram: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the bins and the share of all pairs in each; empty bins are missing, not 0 (a log axis)."""
    edges, pairs = np.array(histogram["edges"]), np.array(histogram["pairs"], dtype=float)
    middles = np.where(edges[:-1] > 0, np.sqrt(edges[:-1] * edges[1:]), edges[1:] / 2) if edges[1] < 1e-3 else \
        (edges[:-1] + edges[1:]) / 2
    return middles, np.where(pairs > 0, pairs / max(pairs.sum(), 1), np.nan)


def stability(history: pd.DataFrame, title: str = "", caption: str = "") -> go.Figure | None:
    """How alike windows are over training, by pair and by latent; None for a run that tracks no pairs."""
    columns = [name for name in history if name.startswith("stability/")]
    if not columns:
        return None
    fig = go.Figure()
    for number, column in enumerate(columns):
        fig.add_scatter(x=history.step, y=history[column], mode="lines", line=style(number),
                        name=column.removeprefix("stability/"))
    fig.update_xaxes(title="Step")
    fig.update_yaxes(title="Stability (1: as on average before)", range=[0, 1])
    caption += "<br>Stability: 1 - |c - average| / max of a pair at a window's end, weighted by its count"
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return dress(fig, f"Stability of co-activation: {title}", caption, height=480, top=120)


def of_training(run: str, result, caption: str) -> dict[str, go.Figure]:
    """02's figures of pairs by file name."""
    named = {"phases": phases(result.report, run, caption), "stability": stability(result.history, run, caption)}
    return {name: fig for name, fig in named.items() if fig is not None}
