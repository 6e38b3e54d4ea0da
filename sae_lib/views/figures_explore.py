"""Any figure of a study's runs against any other, with intervals where there are."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import labels, main, span, why
from sae_lib.views.template import GREY, dress, mark

OTHERS = {"d_sae": "Width F", "k": "k", "samples": "Training samples", "seconds": "Training time, s", "seed": "Seed"}


def choices(table: pd.DataFrame) -> list[str]:
    """The columns that can be an axis: those that any run has a number for."""
    names = [name for name in (*METRICS, *OTHERS) if name in table]
    names += [name for name in table if name.startswith(("loss/", "share/"))]
    return [name for name in names if pd.to_numeric(table[name], errors="coerce").notna().any()]


def called(name: str) -> str:
    """An axis' name with its direction."""
    if name in METRICS:
        return METRICS[name].called
    return OTHERS.get(name) or name.replace("loss/", "Final loss: ").replace("share/", "Gradient share: ")


def explore(table: pd.DataFrame, x: str, y: str, parameters: dict[str, str], differences: pd.DataFrame,
            log: bool = False, apart: bool = False, title: str = "", caption: str = "") -> go.Figure:
    """A mark per run, a colour and shape per variant; hovering tells what differs from the baseline.

    The bar through a variant's mean is the interval of its difference from the baseline, paired by seed. With ``apart``
    runs that are no results, or do not compare, are shown too, in grey with the reason.
    """
    names, kept = labels(table), main(table)
    fig = go.Figure()
    values = table.assign(x=pd.to_numeric(table[x], errors="coerce"), y=pd.to_numeric(table[y], errors="coerce"))
    for number, (_, own) in enumerate(values[kept].groupby("variant", sort=False)):
        label = names[own.run.iloc[0]].rpartition("-s")[0] or names[own.run.iloc[0]]
        fig.add_scatter(x=own.x, y=own.y, mode="markers", name=label, legendgroup=label, marker=mark(number, 13),
                        customdata=own.run, hovertext=[_said(run, parameters) for run in own.run],
                        hovertemplate="%{hovertext}<br>%{x:.5g}, %{y:.5g}<extra></extra>")
        bars = [_interval(differences, own, name) for name in ("x", "y") for name in ((x if name == "x" else y),)]
        if any(bar is not None for bar in bars):
            error = {f"error_{axis}": None if bar is None else
                     {"type": "data", "array": [bar[1]], "arrayminus": [bar[0]], "width": 6}
                     for axis, bar in zip("xy", bars)}
            fig.add_scatter(x=[own.x.mean()], y=[own.y.mean()], mode="markers", legendgroup=label, showlegend=False,
                            marker={**mark(number, 5), "color": "#111111"}, hoverinfo="skip", **error)
    # An empty trace keeps the figure's shape when nothing is apart.
    rest = values[~kept] if apart else values.iloc[:0]
    fig.add_scatter(x=rest.x, y=rest.y, mode="markers", name="set apart", showlegend=len(rest) > 0, customdata=rest.run,
                    marker={"size": 11, "symbol": "x-thin", "line": {"width": 2, "color": GREY}},
                    hovertext=[f"{html.escape(row.run)}<br>{html.escape(why(row))}" for row in rest.itertuples()],
                    hovertemplate="%{hovertext}<extra></extra>")
    drawable = values[kept][["x", "y"]].notna().all(axis=1).any() or rest[["x", "y"]].notna().all(axis=1).any()
    if not drawable:
        fig.add_annotation(text="no run has both figures", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5,
                           font_size=16)
    drawn = pd.concat([values[kept], rest])
    logged = log and drawn.x.dropna().gt(0).all()
    # Differences in the fifth digit should look like it; room for intervals where there are.
    wide = differences.low.notna().any() if len(differences) else False
    fig.update_xaxes(title=called(x) + _unit(x) + (" (log)" if logged else ""), type="log" if logged else "linear",
                     range=None if logged or wide else span(drawn.x))
    fig.update_yaxes(title=called(y) + _unit(y), automargin=True, range=None if wide else span(drawn.y))
    if (differences.low.notna() if len(differences) else pd.Series(dtype=bool)).any():
        caption += "<br>Bars: 95 % interval of a variant's difference from the baseline, paired by seed, about its mean"
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, hoverlabel_align="left")
    return dress(fig, title or f"{called(y).partition(' (')[0]} against {called(x).partition(' (')[0]}", caption,
                 width=1000, height=640, top=90 + 22 * (table[kept].variant.nunique() // 4))


def _said(run: str, parameters: dict[str, str]) -> str:
    """A run and what differs in it, as hover text."""
    return f"<b>{html.escape(run)}</b><br>" + html.escape(parameters.get(run, "")).replace("\n", "<br>")


def _unit(name: str) -> str:
    return f", {METRICS[name].axis}" if name in METRICS else ""


def _interval(differences: pd.DataFrame, own: pd.DataFrame, name: str) -> tuple[float, float] | None:
    """How far the interval reaches below and above a variant's mean."""
    found = differences[(differences.variant == own.variant.iloc[0]) & (differences.metric == name)] \
        if len(differences) else differences
    if found.empty or not np.isfinite(found.low.iloc[0]):
        return None
    row = found.iloc[0]
    return float(row.difference - row.low), float(row.high - row.difference)
