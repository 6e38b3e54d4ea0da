"""Figures and pieces of page for single latents: pure functions from what ``evaluation.latents`` gives."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation.latents import Context, Latents
from sae_lib.views.template import COLOURS, dress, style

BINS, NEIGHBOURS = 40, 8
SILENT = "this latent fires on none of the tokens that are kept"
PANELS = ("Activations where it fires", "In training", "Effect on logits (direct, per unit)",
          "Nearest latents by decoder cosine", "Nearest latents by co-activation")


def latent(latents: Latents, number: int, history: pd.DataFrame, by_cosine: pd.Series, by_pairs: pd.Series,
           log: bool = False, title: str = "", caption: str = "") -> go.Figure:
    """One latent in five panels; ``by_cosine`` and ``by_pairs`` are strengths by the other latent's number."""
    specs = [[{}, {"secondary_y": True}, {"rowspan": 2}], [{}, {}, None]]
    fig = make_subplots(rows=2, cols=3, specs=specs, horizontal_spacing=0.13, vertical_spacing=0.22,
                        column_widths=[0.34, 0.34, 0.32], subplot_titles=PANELS)
    values = latents.codes.data[slice(*latents.codes.indptr[number:number + 2])]
    counts, edges = np.histogram(values, BINS) if len(values) else (np.zeros(1), np.array([0.0, 1.0]))
    fig.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, width=np.diff(edges), marker_color=COLOURS[0], row=1, col=1,
                hovertemplate="%{x:.3g}: %{y} tokens<extra></extra>", showlegend=False)
    _history(fig, history)
    _effects(fig, latents.table.iloc[number])
    for col, near in enumerate((by_cosine, by_pairs), 1):
        fig.add_bar(x=near.to_numpy()[::-1], y=[f"{n}" for n in near.index][::-1], orientation="h", row=2, col=col,
                    marker_color=COLOURS[2], hovertemplate="latent %{y}: %{x:.3f}<extra></extra>", showlegend=False)
    fig.update_yaxes(title="Tokens" + (" (log)" if log else ""), type="log" if log else "linear", row=1, col=1)
    fig.update_xaxes(title="Activation", row=1, col=1)
    fig.update_xaxes(title="Cosine", row=2, col=1)
    fig.update_xaxes(title="Jaccard", row=2, col=2)
    fig.update_yaxes(type="category", row=2, col=1)
    fig.update_yaxes(type="category", row=2, col=2)
    if not len(values):
        caption += f"; {SILENT}"
    fig.update_layout(legend={"orientation": "h", "x": 0.36, "y": 1.06, "yanchor": "bottom"}, bargap=0.25)
    return dress(fig, f"Latent {number}: {title}", caption, width=1180, height=700, top=110)


def _history(fig: go.Figure, history: pd.DataFrame) -> None:
    x = history.step if history.step.notna().all() else history.phase
    fig.add_scatter(x=x, y=100 * history.density, mode="lines+markers", line=style(1), row=1, col=2,
                    name="density (left)")
    fig.add_scatter(x=x, y=history.cosine, mode="lines+markers", line=style(6), row=1, col=2, secondary_y=True,
                    name="cosine with its last decoder row (right)")
    fig.update_xaxes(title="Step", row=1, col=2)
    fig.update_yaxes(title="Tokens, %", rangemode="tozero", row=1, col=2, secondary_y=False)
    fig.update_yaxes(range=[min(0, float(history.cosine.min()) if len(history) else 0), 1.05],
                     showgrid=False, dtick=0.25, row=1, col=2, secondary_y=True)


def _effects(fig: go.Figure, row: pd.Series) -> None:
    """Raised tokens above, lowered ones below, strongest first."""
    tokens = [*map(shown, row.raised), *(map(shown, list(row.lowered)[::-1]))][::-1]
    values = [*row.raised_by, *list(row.lowered_by)[::-1]][::-1]
    places = list(range(len(tokens)))
    fig.add_bar(x=values, y=places, orientation="h", showlegend=False, row=1, col=3, customdata=tokens,
                marker_color=[COLOURS[0] if value > 0 else COLOURS[1] for value in values],
                hovertemplate="%{customdata}: %{x:.3f}<extra></extra>")
    fig.update_yaxes(tickvals=places, ticktext=tokens, showgrid=False, row=1, col=3, tickfont_size=12)
    fig.update_xaxes(title="Logits", row=1, col=3)
    if not tokens:
        fig.add_annotation(text="not known for this run", showarrow=False, xref="x3 domain", yref="y4 domain", x=0.5,
                           y=0.5)


def shown(token: str) -> str:
    """A token as a label: what cannot be seen is drawn, markup is text."""
    text = token.replace("\n", "↵").replace("\t", "⇥")
    text = "␣" + text[1:] if text.startswith(" ") else text
    return html.escape(text if len(text) < 18 else text[:16] + "…", quote=False).replace("$", "&#36;") or "∅"


def contexts(found: list[Context], latent: int) -> str:
    """The contexts as HTML: each token on a ground the stronger the more the latent is active, the peak framed."""
    if not found:
        return f"<p><i>{SILENT}</i></p>"
    top = max(context.strength for context in found)
    rows = []
    for context in found:
        spans = []
        for place, (text, strength) in enumerate(zip(context.texts, context.strengths)):
            ground = f"background:rgba(230,159,0,{min(1, strength / top):.2f});" if strength > 0 else ""
            peak = "outline:1.5px solid #111;font-weight:600;" if place == context.at else ""
            said = html.escape(text.replace("\n", "↵"))
            spans.append(f'<span title="{strength:.3g}" style="{ground}{peak}">{said}</span>')
        rows.append(f'<tr><td style="text-align:right;padding:2px 10px 2px 0;font-variant-numeric:tabular-nums">'
                    f'{context.strength:.2f}</td><td style="white-space:pre-wrap;text-align:left;padding:2px 0">'
                    f'{"".join(spans)}</td></tr>')
    return ('<div class="contexts"><b>Contexts</b> (activation at the framed token; darker is stronger)'
            f'<table style="font-size:14px;border-spacing:0" data-latent="{latent}">{"".join(rows)}</table></div>')


def card(row: pd.Series, n_tokens: int) -> str:
    """The latent in a line."""
    if not row.firings:
        return f"<p><b>Latent {row.latent}</b>: {SILENT} ({n_tokens:,})</p>"
    return (f"<p><b>Latent {row.latent}</b>: fires on {row.firings:,} of {n_tokens:,} held-out tokens "
            f"({100 * row.density:.2g} %), mean {row['mean']:.3g}, largest {row.largest:.3g}; nearest decoder row "
            f"{row.nearest} (cosine {row.nearest_cosine:.2f})</p>")


def listing(table: pd.DataFrame) -> pd.DataFrame:
    """The latents' table for the page: words in one column, figures rounded."""
    def joined(column):
        return [" ".join(map(shown_plain, words)) for words in column]
    def rounded(column, digits=3):
        return column.astype(float).round(digits)
    return pd.DataFrame({"latent": table.latent, "density %": rounded(100 * table.density, 4),
                         "mean": rounded(table["mean"]), "largest": rounded(table.largest),
                         "nearest": table.nearest, "cosine": rounded(table.nearest_cosine),
                         "fires on": joined(table.tokens), "raises": joined(list(words)[:4] for words in table.raised)})


def shown_plain(token: str) -> str:
    """A token in a list of tokens."""
    return token.strip().replace("\n", "↵") or "␣"


def first(table: pd.DataFrame) -> int:
    """The latent to open with: of those on 0.1 to 1 % of tokens the one whose strongest tokens are fewest."""
    fit = table[table.density.between(0.001, 0.01)]
    fit = fit if len(fit) else table[table.firings > 0]
    if fit.empty:
        return 0
    ranked = fit.assign(kinds=fit.tokens.map(len)).sort_values(["kinds", "firings"], ascending=[True, False])
    return int(ranked.latent.iloc[0])
