"""Training curves of several runs: every recorded quantity, seeds as a band or each for itself."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import labels, main, why
from sae_lib.views.template import GREY, dress, style

NAMES = {"l0": METRICS["l0"].label, "dead_share": METRICS["dead_share"].label,
         "explained_variance": f"{METRICS['explained_variance'].label} (batch)", "lr": "Learning rate",
         "loss": "Loss, all terms", "grad_norm": "Norm of the gradient", "samples_per_second": "Samples per second"}
UNITS = {**{name: METRICS[name].axis.capitalize() for name in ("l0", "dead_share", "explained_variance")},
         "lr": "Step size", "grad_norm": "Norm", "samples_per_second": "Samples / s"}
LOGGED = ("loss", "share")
ORDER = ("loss", "loss/", "explained_variance", "l0", "dead_share", "share/")


def quantities(histories) -> list[str]:
    """What the histories record, in an order that a reader expects; ``step`` and ``samples`` are axes."""
    found = {name for history in histories for name in history.select_dtypes("number")} - {"step", "samples"}

    def place(name: str) -> tuple[int, str]:
        fits = [n for n, start in enumerate(ORDER) if name == start or (start[-1] == "/" and name.startswith(start))]
        return (fits[0] if fits else len(ORDER), name)
    return sorted(found, key=place)


def called(name: str) -> str:
    """A recorded quantity as a reader knows it."""
    head, _, rest = name.partition("/")
    return NAMES.get(name) or {"loss": f"Loss: {rest}", "share": f"Gradient share: {rest}",
                               "stability": f"Stability of {rest}", "value": f"Schedule: {rest}",
                               "tracking": f"Tracking, {rest}"}.get(head, f"{head} {rest}".strip())


def smoothed(history: pd.DataFrame, weight: float) -> pd.DataFrame:
    """Exponential moving averages of all but the axes; ``weight`` 0 changes nothing, 0.9 averages some ten rows."""
    columns = [name for name in history.select_dtypes("number") if name not in ("step", "samples")]
    return history.assign(**history[columns].ewm(alpha=1 - weight).mean()) if weight and len(history) else history


def curves(histories: dict[str, pd.DataFrame], table: pd.DataFrame, shown: list[str], x: str = "samples",
           log: bool = True, smoothing: float = 0.0, bands: bool = True, caption: str = "") -> go.Figure:
    """A panel per quantity of ``shown``: a line per variant (mean over seeds, band from lowest to highest) or per run.

    Runs that are not valid are drawn one by one, in grey, and belong to no band.
    """
    cols = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // cols))
    fig = make_subplots(rows=rows, cols=cols, subplot_titles=[called(name) for name in shown] or None,
                        horizontal_spacing=0.1, vertical_spacing=0.24 / rows)
    histories = {run: smoothed(history, smoothing) for run, history in histories.items() if len(history)}
    names, kept = labels(table), main(table)
    groups = [(names[own.run.iloc[0]].rpartition("-s")[0] or names[own.run.iloc[0]], list(own.run))
              for _, own in table[kept & table.run.isin(list(histories))].groupby("variant", sort=False)]
    for number, (label, members) in enumerate(groups):
        for place, name in enumerate(shown):
            at = {"row": place // cols + 1, "col": place % cols + 1}
            lines = [histories[run] for run in members if name in histories[run]]
            if bands:
                _band(fig, lines, name, x, label, number, place == 0, at)
            else:
                for order, (run, line) in enumerate(zip(members, lines)):
                    fig.add_scatter(x=line[x], y=line[name], mode="lines", line=style(number), name=label,
                                    legendgroup=label, showlegend=place == 0 and order == 0, hovertext=run, **at)
    _apart(fig, histories, table[~kept], shown, x, cols)
    for place, name in enumerate(shown):
        at = {"row": place // cols + 1, "col": place % cols + 1}
        logged = log and name.partition("/")[0] in LOGGED
        unit = UNITS.get(name) or {"loss": "Loss per token", "share": "Share"}.get(name.partition("/")[0], "Value")
        flat = name in ("l0", "dead_share") or name.startswith("value/")  # no rounding noise blown up
        fig.update_yaxes(type="log" if logged else "linear", rangemode="tozero" if flat else "normal",
                         tickformat=".0e" if name == "lr" else None, title=unit + (" (log)" if logged else ""), **at)
    fig.update_xaxes(title="Training samples" if x == "samples" else "Step", row=rows)
    if not any(len(history) for history in histories.values()):
        fig.add_annotation(text="no step was trained", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5,
                           font_size=18)
    caption += "<br>" if caption else ""
    caption += "Lines: means over seeds, bands: lowest to highest" if bands else "A line per run"
    caption += f"; smoothed (moving average, weight {smoothing:g})" if smoothing else ""
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1 + 0.1 / rows, "yanchor": "bottom"})
    return dress(fig, "Training curves", caption, width=1120, height=200 + 290 * rows,
                 top=110 + 20 * ((len(groups) + (~kept).sum()) // 4))


def _band(fig, lines: list[pd.DataFrame], name: str, x: str, label: str, number: int, first: bool, at) -> None:
    """Mean and range over seeds, at the places of the first seed's rows."""
    if not lines:
        return
    places = lines[0][x].to_numpy(dtype=float)
    values = np.array([np.interp(places, line[x], line[name].astype(float), right=np.nan) for line in lines])
    look = style(number)
    if len(lines) > 1:
        colour = "rgba({},{},{},0.2)".format(*hex_to_rgb(look["color"]))
        ends = np.concatenate([values.max(0), values.min(0)[::-1]])
        fig.add_scatter(x=np.concatenate([places, places[::-1]]), y=ends, fill="toself", fillcolor=colour, mode="lines",
                        line={"width": 0}, hoverinfo="skip", legendgroup=label, showlegend=False, **at)
    fig.add_scatter(x=places, y=values.mean(0), mode="lines", line=look, name=label, legendgroup=label,
                    showlegend=first, **at)


def _apart(fig, histories, table: pd.DataFrame, shown: list[str], x: str, cols: int) -> None:
    for row in table[table.run.isin(list(histories))].itertuples():
        label = f"{row.run.rpartition('/')[2]} ({why(row).partition(':')[0]})"
        for place, name in enumerate(shown):
            line = histories[row.run]
            if name in line:
                fig.add_scatter(x=line[x], y=line[name], mode="lines", name=label, legendgroup=label,
                                showlegend=place == 0, line={"color": GREY, "width": 1.5, "dash": "dot"},
                                hovertext=f"{row.run}: {why(row)}".replace("<", "&lt;"), row=place // cols + 1,
                                col=place % cols + 1)
