"""Figures of distributions: active latents per token, densities of latents, quality of a random projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation.distributions import Sparsity
from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import labels, main
from sae_lib.views.template import COLOURS, GREY, dress, style

MOST_PROJECTIONS = 4
"""Runs whose projections are drawn: of equal sizes they lie on each other."""


def all_figures(comparison, caption: str = "") -> dict[str, go.Figure]:
    """By file name: activation sparsity, and the projection's quality where a run has one."""
    drawn = {"activation_sparsity": sparsity(comparison.sparsity, comparison.table, caption)}
    return drawn | ({"projection_quality": projection(comparison.projections, caption)} if comparison.projections
                    else {})


def sparsity(found: dict[str, Sparsity], table: pd.DataFrame, caption: str = "") -> go.Figure:
    """Tokens by active latents, and latents by density: a line per run; of each variant the first valid run."""
    fig = make_subplots(rows=1, cols=2, subplot_titles=("Tokens by L0", "Latents by density"),
                        horizontal_spacing=0.12)
    names = labels(table)
    kept = table[main(table) & table.run.isin(list(found))].drop_duplicates("variant")
    for number, run in enumerate(kept.run):
        own, label = found[run], names[run].rpartition("-s")[0] or names[run]
        group = {"name": label, "legendgroup": label, "line": style(number), "mode": "lines"}
        wide = max(1, len(own.l0) // 60)
        shares = np.add.reduceat(own.l0, np.arange(0, len(own.l0), wide)) / wide
        fig.add_scatter(x=np.arange(len(shares)) * wide + (wide - 1) / 2, y=shares, row=1, col=1, **group)
        middle = 10 ** ((own.edges[1:] + own.edges[:-1]) / 2)
        fig.add_scatter(x=middle, y=own.density, row=1, col=2, showlegend=False, **group,
                        hovertext=f"{own.never:.1%} fire on no token")
    fig.update_xaxes(title=METRICS["l0"].titled, row=1, col=1)
    fig.update_xaxes(title="Density (share of tokens that fire it, log)", type="log", dtick=1,
                     exponentformat="power", row=1, col=2)
    fig.update_yaxes(title="Share of tokens per L0", row=1, col=1)
    fig.update_yaxes(title="Share of latents per bin", row=1, col=2)
    rows = -(-len(kept) // 3)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"})
    if not len(kept):
        fig.add_annotation(text="no run here is a result that keeps its latents", showarrow=False, xref="paper",
                           yref="paper", x=0.5, y=0.5, font_size=18)
    never = "; ".join(f"{names[run].rpartition('-s')[0] or names[run]} {found[run].never:.1%}" for run in kept.run)
    caption = (f"bins of density: a third of a decade; latents that fire on none of the held-out tokens: "
               f"{never or 'none'}<br>{caption}")
    return dress(fig, "Activation sparsity", caption, width=1040, height=560 + 30 * rows, top=100 + 30 * rows)


def projection(found: dict[str, dict[str, Any]], caption: str = "") -> go.Figure:
    """How far a Johnson-Lindenstrauss projection keeps distances and cosines of decoder rows."""
    fig = make_subplots(rows=1, cols=2, subplot_titles=("Squared distances: projected / exact - 1",
                                                        "Cosines: projected - exact"), horizontal_spacing=0.12)
    for number, (run, own) in enumerate(list(found.items())[:MOST_PROJECTIONS]):
        for col, key in enumerate(("distortion", "cosine_noise"), 1):
            edges, counts = np.asarray(own[key]["edges"]), np.asarray(own[key]["counts"])
            fig.add_scatter(x=(edges[1:] + edges[:-1]) / 2, y=counts / max(1.0, counts.sum()), mode="lines",
                            line=style(number) | {"shape": "hvh"}, name=run.rpartition("/")[2], legendgroup=run,
                            showlegend=col == 1, row=1, col=col)
    first = next(iter(found.values()))
    bound, noise = first["eps"], first["cosine_noise"]["std"]
    thresholds = [own["threshold"] for own in found.values() if own.get("threshold") is not None]
    threshold = max(thresholds, default=None)
    promised = f"promised for all pairs of F rows: within ±{bound:.2f}"
    for side in (-1, 1):
        if bound < 1:
            fig.add_vline(x=side * bound, line={"color": GREY, "dash": "dash"}, row=1, col=1)
        fig.add_vline(x=side * noise, line={"color": GREY, "dash": "dash"}, row=1, col=2)
    if threshold is not None:
        fig.add_vline(x=threshold, line={"color": COLOURS[1], "width": 2}, row=1, col=2)
    fig.update_xaxes(title="Relative distortion", row=1, col=1)
    fig.update_xaxes(title="Error of the cosine", row=1, col=2)
    fig.update_yaxes(title="Share of sampled pairs per bin", row=1, col=1)
    told = (f"{first['of']} dimensions into {first['dims']}. Left, dashed: {promised}",
            "" if bound < 1 else ", which is no promise",
            f"; 99 of 100 sampled pairs lie within {first['distortion']['p99']:.2f}. Right, dashed: the error's "
            f"standard deviation {noise:.3f} (theory {first['cosine_noise']['expected']:.3f}); "
            f"{_verdict(noise, threshold)}. "
            f"The projection loses {first['lost']:.0%} of the rows' energy for good. Drawn: "
            f"{min(len(found), MOST_PROJECTIONS)} of {len(found)} runs that have one.<br>{caption}")
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"})
    return dress(fig, "Quality of the Johnson-Lindenstrauss projection", "".join(told), width=1040, height=560, top=140)


def _verdict(noise: float, threshold: float | None) -> str:
    if threshold is None:
        return "no threshold of contrast to hold it against"
    told = "more than" if noise >= threshold else "less than"
    return f"line: contrast's last threshold, {threshold:g}; the noise is {told} that" + (
        ", so under it a projected cosine cannot tell alike from not alike" if noise >= threshold else "")
