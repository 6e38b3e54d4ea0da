"""Figures of split features: a letter's latents, and a latent's counterparts in another SAE."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation.splits import Split
from sae_lib.views.template import COLOURS, GREY, as_html, dress, style


def split(found: Split, letter: str, title: str = "", caption: str = "") -> go.Figure:
    """F1 as latents are added, each one's cosine with the model's probe, and their cosines with each other."""
    names = [str(n) for n in found.latents]
    fig = make_subplots(rows=1, cols=3, horizontal_spacing=0.1, column_widths=[0.33, 0.25, 0.42],
                        subplot_titles=("F1 of the sparse probe", "Cosine with the model's probe",
                                        "Cosines of decoder rows"))
    ks = list(range(1, len(found.f1) + 1))
    fig.add_scatter(x=ks, y=found.f1, mode="lines+markers", line=style(0), name="k latents", row=1, col=1,
                    customdata=names[:len(ks)], hovertemplate="k = %{x} (+ latent %{customdata}): F1 %{y:.3f}"
                    "<extra></extra>")
    fig.add_scatter(x=[1, ks[-1]], y=[found.probe_f1] * 2, mode="lines", name="model's probe", row=1, col=1,
                    line={"color": GREY, "dash": "dot", "width": 2})
    fig.add_scatter(x=[found.count], y=[found.f1[found.count - 1]], mode="markers", name="split latents", row=1, col=1,
                    marker={"symbol": "circle-open", "size": 16, "color": COLOURS[1], "line": {"width": 3}})
    colours = [COLOURS[0] if place < found.count else GREY for place in range(len(names))]
    fig.add_bar(x=found.probe_cosine, y=names, orientation="h", marker_color=colours, showlegend=False, row=1, col=2,
                hovertemplate="latent %{y}: %{x:.3f}<extra></extra>")
    fig.add_heatmap(z=found.cosines, x=names, y=names, colorscale="RdBu", reversescale=True, zmin=-1, zmax=1, row=1,
                    col=3, colorbar={"thickness": 14, "title": {"text": "cosine", "side": "right"}},
                    hovertemplate="latents %{x}, %{y}: %{z:.3f}<extra></extra>")
    fig.update_xaxes(title="k", dtick=1, row=1, col=1)
    fig.update_yaxes(title="F1", range=[0, 1.02], row=1, col=1)
    fig.update_xaxes(title="Cosine", row=1, col=2)
    fig.update_xaxes(type="category", title="Latent", tickangle=90, row=1, col=3)
    if np.isnan(found.probe_cosine).all():
        fig.add_annotation(text="the probe was not kept", showarrow=False, xref="x2 domain", yref="y2 domain", x=0.5,
                           y=0.5)
    fig.update_yaxes(type="category", autorange="reversed", row=1, col=2,
                     title={"text": "Latent, in the probe's order", "standoff": 12})
    fig.update_yaxes(type="category", autorange="reversed", row=1, col=3)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"})
    caption += "<br>Blue bars: split latents (one more raised F1 by over 0.03); grey: the others that were tried"
    return dress(fig, f"Letter {letter.upper()}, {found.count} split latent{'s' * (found.count != 1)}: {title}",
                 caption, width=1180, height=560, top=120)


def words(table: pd.DataFrame, letter: str, main: int, asked: int, most: int = 40) -> str:
    """The words on which a letter's main latent is silent, as HTML."""
    head = (f"<b>Words in {letter.upper()} on which latent {main}, the main one, is silent</b>: {len(table)} of "
            f"{asked} that the model's probe knows")
    if table.empty:
        return f"<p>{head}.</p>"
    said = table.rename(columns={"latent": "strongest latent", "projection": "projection on the probe",
                                 "absorbed": "fully absorbed"})
    text = as_html(said.head(most))
    more = f"<p>and {len(table) - most} more</p>" if len(table) > most else ""
    return (f"<p>{head}; carried by <i>{html.escape(_carriers(table))}</i></p>"
            f"<div style='overflow:auto;max-height:320px'>{text}</div>{more}")


def _carriers(table: pd.DataFrame) -> str:
    counts = table.latent.value_counts().head(6)
    return ", ".join(f"{latent} ({count} words)" for latent, count in counts.items())


def in_another(table: pd.DataFrame, together: float | None, latent: int, width: int, other: str, other_width: int,
               title: str = "", caption: str = "") -> go.Figure:
    """A latent's nearest latents in another SAE: cosine, and how their firings overlap."""
    names = [str(n) for n in table.latent]
    fig = go.Figure()
    said = {"cosine": "cosine of decoder rows", "covers": f"share of {latent}'s tokens on which it fires",
            "within": f"share of its tokens on which {latent} fires"}
    for number, (column, label) in enumerate(said.items()):
        fig.add_bar(x=names, y=table[column], name=label, marker_color=COLOURS[number],
                    marker_pattern_shape=("", "/", ".")[number], hovertemplate="%{x}: %{y:.3f}<extra></extra>")
    caption += "<br>" + ("Firings: the two runs kept other tokens, so they are not compared" if together is None else
                         f"All of them together fire on {together:.0%} of the tokens of latent {latent}")
    fig.update_xaxes(type="category", title=f"Latent of {other} (F {other_width:,})")
    low = float(min(0.0, table.cosine.min())) if len(table) else 0.0
    fig.update_yaxes(title="Cosine, or share of tokens", range=[low, 1.05])
    fig.update_layout(barmode="group", legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return dress(fig, f"Latent {latent} (F {width:,}) in {other}: {title}", caption, width=1180, height=460, top=110)
