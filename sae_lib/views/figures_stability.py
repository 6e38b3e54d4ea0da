"""Stability across seeds for 05's page: a table, and how near each latent's nearest of another seed lies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_lib.evaluation.seed_stability import SAME, Stability
from sae_lib.metrics import METRICS
from sae_lib.views.template import GREY, GREY_INK, dress, style, value_within

GRID = np.linspace(0, 1, 201)


def table(found: list[Stability]) -> pd.DataFrame:
    """A row a variant: share of latents found again, beside that of random rows, and what was left out."""
    metric = METRICS["seed_stability"]
    return pd.DataFrame([{
        "variant": one.variant, "seeds": one.seeds, "pairs": one.seeds * (one.seeds - 1) // 2,
        metric.called: value_within(one.share, *(one.interval or ())), "random rows": one.random.share,
        "mean nearest cosine": float(one.best.mean()), "of random rows": float(one.random.best.mean()),
        "matched by": one.by, "note": one.note} for one in found])


def nearest_by_variant(found: list[Stability], caption: str = "") -> go.Figure:
    """Share of latents whose nearest in another seed has at most a cosine of x; a line a variant, random rows grey."""
    fig = go.Figure()
    if not found:
        fig.add_annotation(text="no variant has two comparable seeds", showarrow=False, font_size=18, xref="paper",
                           yref="paper", x=0.5, y=0.5)
        fig.update_xaxes(visible=False).update_yaxes(visible=False)
        return dress(fig, "Stability across seeds", caption, height=300)
    seen = set()
    for one in found:
        shape = len(one.random.best), float(one.random.best.mean())
        if shape not in seen:
            seen.add(shape)
            fig.add_scatter(x=GRID, y=_shares(one.random.best), mode="lines", name="random rows", legendgroup="random",
                            showlegend=len(seen) == 1, line={"color": GREY, "width": 2, "dash": "dot"})
    for number, one in enumerate(found):
        fig.add_scatter(x=GRID, y=_shares(one.best), mode="lines", line=style(number),
                        name=f"{one.variant}: {one.share:.0%} found again")
    fig.add_vline(x=SAME, line={"color": "#444444", "width": 1, "dash": "dash"})
    fig.add_annotation(x=SAME, y=1.0, yref="paper", text=f"{SAME:g}: one latent", showarrow=False, xanchor="left",
                       yanchor="bottom", font={"size": 12, "color": GREY_INK})
    fig.update_xaxes(title="Cosine of a latent's decoder row with the nearest of another seed", range=[0, 1.01])
    fig.update_yaxes(title="Share of latents at or below", range=[0, 1.02])
    fig.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})
    note = "; nearest, in both directions, over all pairs of seeds; found again: matched one to one"
    return dress(fig, "Stability across seeds", caption + note, width=1080, height=560)


def _shares(best: np.ndarray) -> np.ndarray:
    """The empirical distribution function of cosines on GRID."""
    return np.searchsorted(np.sort(best), GRID, side="right") / max(1, len(best))
