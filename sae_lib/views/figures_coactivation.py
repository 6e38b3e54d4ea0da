"""Figures of pairs of latents: the whole matrix in cells, and a block of it in the order of its clusters."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.views.template import COLOURS, GREY, dress

UNITS = {"count": "tokens", "rate": "share of tokens", "Jaccard": "Jaccard", "lift": "times chance",
         "decoder cosine": "cosine", "stability": "stability"}
LOG = {"overview": ("count", "rate", "Jaccard", "lift"), "block": ("count", "rate", "lift")}


def overview(cells: np.ndarray, measure: str, order: str, n_latents: int, latent: int | None = None,
             place: int | None = None, difference: str = "", title: str = "", caption: str = "") -> go.Figure:
    """The whole F x F matrix as n x n cells; ``place`` marks the chosen one, ``difference`` names the other run."""
    per_cell = -(-n_latents // len(cells))
    at = per_cell * np.arange(len(cells)) + (per_cell - 1) / 2
    fig = go.Figure(_heat(cells, at, at, measure, difference, "overview"))
    by = "Latent" if order == "number" else "Latents by density, most frequent first"
    fig.update_xaxes(title=by, showgrid=False, range=[-0.5, n_latents - 0.5], constrain="domain")
    fig.update_yaxes(title=by, showgrid=False, range=[n_latents - 0.5, -0.5], scaleanchor="x", constrain="domain")
    mark = [at[place]] if place is not None else []
    fig.add_scatter(x=mark, y=mark, mode="markers", showlegend=False, name="chosen latent",
                    marker={"symbol": "circle-open", "size": 14, "color": COLOURS[1], "line": {"width": 3}},
                    hovertemplate=f"latent {latent}<extra></extra>")
    what = f"difference from {difference}, mean over matched pairs" if difference else f"mean over {per_cell}"
    name = f"{_capital(measure)} of all pairs" + (", a difference" if difference else "")
    name += f": {title}" if title else ""
    caption += f"<br>A cell: {what if difference else what + ' x ' + str(per_cell) + ' latents'}"
    return dress(fig, name, caption + ("; white: 0" if measure in LOG["overview"] and not difference else ""),
                 width=720, height=760, top=70, side=90)


def block(values: np.ndarray, latents: np.ndarray, density: np.ndarray, strength: np.ndarray, measure: str, latent: int,
          difference: str = "", title: str = "", caption: str = "") -> go.Figure:
    """A block in cluster order (``latents`` as drawn), beside it each one's density and strength with the chosen.

    ``density`` and ``strength`` are (n,), the strength NaN for the latent itself.
    """
    fig = make_subplots(rows=1, cols=2, column_widths=[0.58, 0.42], horizontal_spacing=0.2)
    names = [str(n) for n in latents]
    heat = _heat(values, names, names, measure, difference, "block")
    heat.colorbar.update(x=0.475, len=1.0)
    fig.add_trace(heat, 1, 1)
    shared = {"type": "category", "showgrid": False, "constrain": "domain", "nticks": 14, "row": 1, "col": 1}
    fig.update_xaxes(title="Latent (in order of clusters)", tickangle=90, **shared)
    fig.update_yaxes(title="Latent", autorange="reversed", scaleanchor="x", **shared)
    own = latents == latent
    fig.add_scatter(x=100 * np.where(density > 0, density, np.nan), y=strength, mode="markers", customdata=latents,
                    showlegend=False, row=1, col=2, marker={"size": 8, "color": COLOURS[0], "opacity": 0.75},
                    hovertemplate="latent %{customdata}<br>density %{x:.3g} %, %{y:.3g}<extra></extra>")
    if own.any() and density[own][0] > 0:
        fig.add_vline(x=100 * density[own][0], line={"color": GREY, "width": 2}, row=1, col=2)
    fig.update_xaxes(title="Density, % of tokens (log)", type="log", row=1, col=2)
    log = measure in LOG["block"] and not difference
    fig.update_yaxes(title=f"{_capital(measure)} with latent {latent}" + (" (log)" if log else ""),
                     type="log" if log else "linear", row=1, col=2)
    if len(latents) < 2:
        fig.add_annotation(text=f"latent {latent} fires with no other", showarrow=False, xref="paper", yref="paper",
                           x=0.2, y=0.5, font_size=16)
    name = f"{_capital(measure)} around latent {latent}" + (f", less that of {difference}" if difference else "")
    name += f": {title}" if title else ""
    caption += "; grey line: the latent's own density"
    return dress(fig, name, caption, width=1180, height=600, top=80)


def _heat(values, x, y, measure: str, difference: str, kind: str) -> go.Heatmap:
    """A heat map with a scale that suits the measure."""
    raw = np.asarray(values, np.float32)
    place = "%{x:.0f}, %{y:.0f}" if kind == "overview" else "latents %{x}, %{y}"
    power, plain = place + ": 10^%{z:.2f}<extra></extra>", place + ": %{z:.3g}<extra></extra>"
    bar = {"title": {"text": UNITS[measure], "side": "right"}, "thickness": 14}
    if difference or measure == "decoder cosine":
        finite = np.abs(raw[np.isfinite(raw)])
        reach = float(np.quantile(finite, 0.999)) if finite.size else 1.0
        return go.Heatmap(z=raw, x=x, y=y, hovertemplate=plain, colorscale="RdBu", reversescale=True,
                          zmin=-(reach or 1), zmax=reach or 1, colorbar=bar)
    if measure not in LOG[kind]:
        return go.Heatmap(z=raw, x=x, y=y, hovertemplate=plain, colorscale="YlGnBu",
                          zmin=0, zmax=float(np.nanmax(raw, initial=1e-6)), colorbar=bar)
    with np.errstate(divide="ignore"):
        logs = np.where(raw > 0, np.log10(np.where(raw > 0, raw, 1)), np.nan).astype(np.float32)
    finite = logs[np.isfinite(logs)]
    low, high = (float(np.quantile(finite, 0.01)), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(low, high - 0.5)
    ticks = np.arange(np.ceil(low), np.floor(high) + 1)
    if len(ticks) < 2:  # powers of ten are too far apart
        ticks = np.linspace(low, high, 4)
    text = [f"{10 ** tick:.2g}" for tick in ticks]
    return go.Heatmap(z=logs, x=x, y=y, hovertemplate=power, colorscale="YlGnBu", zmin=low, zmax=high,
                      colorbar=bar | {"tickvals": ticks, "ticktext": text})


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
