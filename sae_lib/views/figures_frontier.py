"""The frontier: metrics against L0, or against any parameter that a study sweeps."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation import results
from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import span
from sae_lib.views.template import dress, mark, style

PANELS = ("explained_variance", "ce_loss_score", "mean_full_absorption_score", "mean_cos2")


def frontier(comparison, caption: str = "") -> go.Figure:
    """One panel a metric; a mark per run, a line through each variant's means. A curve, so L0 need not be matched.

    Runs that differ from the first in more than L0 and the swept parameter are left out, and counted below.
    """
    along, table = comparison.frontier, results.results(comparison.table)
    x = table.l0 if along == "l0" else pd.to_numeric(table["along"], errors="coerce")
    alike = [not results.why_apart(row, table.iloc[0], free={"l0", along}) for _, row in table.iterrows()]
    left_out = len(table) - sum(alike)
    table = table.assign(x=x)[alike].dropna(subset=["x"])
    panels = [name for name in PANELS if name in table and table[name].notna().any()] or ["explained_variance"]
    titles = [METRICS[n].panel for n in panels]
    rows = -(-len(panels) // 2)
    fig = make_subplots(rows=rows, cols=min(2, len(panels)), subplot_titles=titles, horizontal_spacing=0.14,
                        vertical_spacing=0.16)
    heads = [results.parts_of(row.variant, row.model)[1] for row in table.itertuples()]
    for number, (head, own) in enumerate(table.groupby(pd.Series(heads, table.index, dtype=object), sort=False)):
        for place, name in enumerate(panels):
            at = {"row": place // 2 + 1, "col": place % 2 + 1}
            fig.add_scatter(x=own.x, y=own[name], mode="markers", hovertext=own.run, name=head, legendgroup=head,
                            showlegend=place == 0, **at,
                            marker=mark(number))
            means = own.groupby("variant").agg({"x": "mean", name: "mean"}).sort_values("x")
            if len(means) > 1:
                fig.add_scatter(x=means.x, y=means[name], mode="lines", line=style(number), legendgroup=head,
                                showlegend=False, hoverinfo="skip", **at)
    label = METRICS["l0"].titled if along == "l0" else along
    wide = len(table) and table.x.min() > 0 and table.x.max() > 8 * table.x.min()
    fig.update_xaxes(title=label + (", log" if wide else ""), type="log" if wide else "linear")
    for place, name in enumerate(panels):
        # As wide as elsewhere in 05: a panel of noise alone must not be filled by it.
        fig.update_yaxes(title={"text": METRICS[name].axis, "standoff": 8}, automargin=True, range=span(table[name]),
                         row=place // 2 + 1, col=place % 2 + 1)
    if left_out:
        caption += f"; {left_out} valid runs left out: they differ in more than {label}"
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.04 + 0.03 * (rows == 1), "yanchor": "bottom"})
    return dress(fig, f"Frontier over {label}", caption, width=1040, height=180 + 360 * rows,
                 top=120 + 22 * (len(set(heads)) // 4))
