"""Figures of one run: pure functions from a table, a report or a manifest to a plotly figure or a table of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS, of_core
from sae_lib.training.limits import DOMINATING, INERT
from sae_lib.views import beside_nulls
from sae_lib.views.template import GREY, between, dress, style


def caption(run: str, report: dict[str, Any]) -> str:
    """Run, seed and versions: what a figure in a paper must name."""
    made = report["provenance"]
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "sae-bench")
                         if name in made["packages"])
    return f"Run {run}, seed {made.get('seed')}; {versions}; {made['written'][:10]}"


def measures(report: dict[str, Any]) -> pd.DataFrame:
    """What training measured, one row per metric, with direction, unit and definition."""
    return explained({name: report[name] for name in METRICS if name in report})


def evaluation(results: dict[str, Any]) -> pd.DataFrame:
    """What SAEBench core measured, one row per metric; all but explained variance by its own code. Nulls beside it."""
    report = results.get("core", {})
    values, within = report.get("metrics", {}), report.get("within_this_sae", {})
    called = {name: name if name == "explained_variance" else of_core(name) for name in METRICS
              if values.get(name) is not None}
    table = explained({key: values[name] for name, key in called.items()},
                      {key: within[name] for name, key in called.items() if within.get(name)})
    return beside_nulls.with_columns(table, results.get("nulls", {}), "core", list(called))


def explained(values: dict[str, float], within: dict[str, list[float]] | None = None, **more: Any) -> pd.DataFrame:
    """A row per metric with all that a reader must know of it; ``more`` are columns between, alike in every row.

    ``within``: by metric its interval "within this SAE", a further column where there is any.
    """
    def beside(name):
        return {"within this SAE": between(*within[name]) if name in within else ""} if within else {}
    return pd.DataFrame([{"metric": METRICS[name].label, "value": value, **beside(name),
                          "reading": METRICS[name].reading, **more, "unit": METRICS[name].unit,
                          "range": METRICS[name].range, "source": METRICS[name].from_,
                          "definition": METRICS[name].formula} for name, value in values.items()])


def norm_histogram(manifest: dict[str, Any]) -> go.Figure:
    """Norms of the tokens' activations, with the median and the limit over which tokens are dropped."""
    edges, counts = np.array(manifest["norm_histogram"]["edges"]), manifest["norm_histogram"]["counts"]
    median, limit = manifest["median_norm"], manifest["median_norm"] * manifest["inputs"]["max_norm_ratio"]
    seen = [n for n, count in enumerate(counts) if count]
    first, last = seen[0], seen[-1]
    # A step line, as bars have no width that a log axis keeps; half a token stands for none.
    y = [max(count, 0.5) for count in counts[first:last + 1]]
    fig = go.Figure(go.Scatter(x=edges[first:last + 2], y=[*y, y[-1]], mode="lines", name="tokens", fill="tozeroy",
                               line={**style(0), "shape": "hv"}))
    for number, (x, name) in enumerate(((median, f"median {median:.4g}"), (limit, f"dropped above {limit:.4g}")), 1):
        fig.add_scatter(x=[x, x], y=[0.5, max(counts) * 1.5], mode="lines", name=name, line=style(number))
    fig.update_xaxes(title="Norm of a token's activation (log)", type="log", dtick=1)
    fig.update_yaxes(title="Tokens per bin (log)", type="log", dtick=1)
    return dress(fig, f"Activation norms at {manifest['hook']}", f"Store {manifest['name']}")


def of_training(run: str, result) -> dict[str, go.Figure]:
    """The figures of 02's page by file name, for a trainer's result."""
    text = caption(run, result.report)
    return {"training_curves": training_curves(result.history, run, text),
            "schedules": schedules(result.history, run, text)}


def training_curves(history: pd.DataFrame, title: str = "", caption: str = "", log: bool = True,
                    x: str = "step") -> go.Figure:
    """Six panels of one run: loss terms, gradient shares, explained variance, L0, dead share, learning rate."""
    shown = ("explained_variance", "l0", "dead_share")
    titles = ("Loss terms", "Gradient, beside the reconstruction's", f"{METRICS[shown[0]].label} (batch)",
              *(METRICS[name].label for name in shown[1:]), "Learning rate")
    fig = make_subplots(rows=3, cols=2, subplot_titles=titles, horizontal_spacing=0.12, vertical_spacing=0.11)
    if history.empty:
        fig.add_annotation(text="no step was trained", showarrow=False, font_size=20, xref="paper", yref="paper",
                           x=0.5, y=0.5)
        return dress(fig, f"Training curves: {title}", caption, height=900)
    terms = [name.removeprefix("loss/") for name in history if name.startswith("loss/")]
    for number, term in enumerate(terms):
        for column, col in ((f"loss/{term}", 1), (f"share/{term}", 2)):
            if column in history:
                fig.add_scatter(x=history[x], y=history[column], mode="lines", line=style(number), name=term,
                                meta=column, legendgroup=term, showlegend=col == 1, row=1, col=col)
    for column, row, col in (("explained_variance", 2, 1), ("l0", 2, 2), ("dead_share", 3, 1), ("lr", 3, 2)):
        fig.add_scatter(x=history[x], y=history[column], mode="lines", line=style(6), showlegend=False, row=row,
                        meta=column, col=col)
    for limit, text in ((INERT, "inert below"), (DOMINATING, "dominating above")):
        fig.add_scatter(x=history[x].iloc[[0, -1]], y=[limit, limit], mode="lines+text", showlegend=False,
                        text=[text, ""], textposition="top right", textfont={"size": 12, "color": "#555555"},
                        line={"color": GREY, "dash": "dot", "width": 1.5}, row=1, col=2)
    scale, said = ("log", " (log)") if log else ("linear", "")
    units = ((f"Loss per token{said}", scale), (f"Share{said}", scale),
             *((METRICS[name].axis.capitalize(), "linear") for name in shown), ("Step size", "linear"))
    for number, (unit, kind) in enumerate(units):
        fig.update_yaxes(title=unit, type=kind, row=number // 2 + 1, col=number % 2 + 1)
    fig.update_xaxes(title="Step" if x == "step" else "Training samples", row=3)
    fig.update_yaxes(dtick=1 if log else None, row=1)
    fig.update_yaxes(tickformat=".0e", row=3, col=2)
    shares = [v for name in history if name.startswith("share/") for v in history[name].dropna() if v > 0]
    low, high = np.log10(min([INERT, *shares])) - 0.5, np.log10(max([DOMINATING, *shares])) + 0.7
    fig.update_yaxes(range=[low, high] if log else [0, 1.1 * max([DOMINATING, *shares])], row=1, col=2)
    _fix_flat(fig, history)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.05, "yanchor": "bottom"})
    return dress(fig, f"Training curves: {title}", caption, height=960, top=130)


def _fix_flat(fig: go.Figure, history: pd.DataFrame) -> None:
    """A constant L0 or a dead share of 0 gets an axis that shows it as flat, not its rounding noise."""
    highest = float(history.l0.max())
    fig.update_yaxes(range=[0, 1.15 * highest if highest else 1], row=2, col=2)
    later = history.dead_share.iloc[1:]
    fig.update_yaxes(range=[-0.002, max(0.05, 1.1 * float(later.max() if len(later) else 0))], row=3, col=1)


def schedules(history: pd.DataFrame, title: str = "", caption: str = "") -> go.Figure:
    """What changed by plan: the learning rate and every scheduled value, each scaled to its own largest."""
    columns = ["lr", *(name for name in history if name.startswith("value/"))] if len(history) else []
    fig = go.Figure()
    for number, column in enumerate(columns):
        top = float(history[column].abs().max()) or 1.0
        name = "learning rate" if column == "lr" else column.removeprefix("value/")
        fig.add_scatter(x=history.step, y=history[column] / top, mode="lines", line=style(number),
                        name=f"{name} (1 = {top:.3g})")
    fig.update_xaxes(title="Step")
    fig.update_yaxes(title="Value as a share of its largest", range=[0, 1.05])
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return dress(fig, f"Schedules: {title}", caption, height=480, top=150)
