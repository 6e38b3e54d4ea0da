"""One look for every figure: colours that survive colour-blindness and print, units on axes, a caption below."""

from __future__ import annotations

import itertools
import re
import textwrap

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
"""Okabe and Ito's palette, strongest contrasts first, yellow darkened for white paper."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
GREY = "#9A9A9A"
"""What is not a result."""
GREY_INK = "#777777"
"""The same for text, which must be read."""
FAINT = "opacity: 0.7"
"""Style of a table's cells that are no results: readable on a light and on a dark page."""


pio.templates["workbook"] = go.layout.Template(layout={
    "colorway": COLOURS, "font": {"family": "DejaVu Sans, Arial, sans-serif", "size": 14, "color": "#111111"},
    "paper_bgcolor": "white", "plot_bgcolor": "white", "title": {"x": 0.01, "xanchor": "left", "font": {"size": 18}},
    "margin": {"l": 80, "r": 30, "t": 70, "b": 90}, "hoverlabel": {"font": {"size": 13}},
    "xaxis": {"showline": True, "linecolor": "#444444", "gridcolor": "#E3E3E3", "zeroline": False, "ticks": "outside"},
    "yaxis": {"showline": True, "linecolor": "#444444", "gridcolor": "#E3E3E3", "zeroline": False, "ticks": "outside"},
})


def dress(figure: go.Figure, title: str, caption: str = "", width: int = 960, height: int = 540,
          top: int = 80, side: int = 80) -> go.Figure:
    """Give a figure the workbook's look, its title, and a caption under the plot, wrapped to its width."""
    lines = [line for part in caption.split("<br>") for line in textwrap.wrap(part, max(20, (width - side) // 7))]
    caption = "<br>".join(lines)
    bottom = 90 + (8 + 18 * len(lines) if caption else 0)
    # plotly.js guesses an axis' type anew where data change: latents' numbers as names shall stay names.
    figure.update_layout(template="workbook", autotypenumbers="strict", title=title, width=width, height=height,
                         margin_b=bottom, margin_t=top, margin_l=side, title_y=1 - 28 / height, title_yanchor="middle")
    if caption:
        figure.add_annotation(text=caption, xref="paper", yref="paper", x=0, y=0, yshift=-(bottom - 14), xanchor="left",
                              align="left", yanchor="bottom", showarrow=False, font={"size": 12, "color": "#555555"})
    return figure


def style(number: int) -> dict:
    """Colour and dash of the n-th series: never told apart by colour alone."""
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)], "width": 2}


def mark(number: int, size: int = 12) -> dict:
    """Colour and symbol of the n-th series of marks; every pair of them is used once before any comes again."""
    turn = number // len(COLOURS)
    symbol = SYMBOLS[(number + turn) % len(SYMBOLS)] + ("-open" if turn % 2 else "")
    return {"size": size, "color": COLOURS[number % len(COLOURS)], "symbol": symbol, "line": {"width": 2 * (turn % 2)}}


def value_within(value: float, low: float | None = None, high: float | None = None) -> str | None:
    """A cell: the value and, in brackets, its interval where it has one; None for no value. Tables show it smaller.

    What is 0 but for rounding is 0; an interval whose ends read alike (L0 of TopK) is left out.
    """
    if pd.isna(value):
        return None
    value = 0.0 if abs(value) < 1e-12 else value
    none = low is None or pd.isna(low) or f"{low:.4g}" == f"{high:.4g}"
    return f"{value:.4g}" + ("" if none else f" {between(low, high)}")


def wrapped(text: str, width: int = 80) -> str:
    """Text for a figure in lines of at most ``width`` characters; no part of it is read as a tag."""
    return "<br>".join(textwrap.wrap(text.replace("<", "&lt;"), width))


def between(low: float, high: float) -> str:
    """An interval as cells say it."""
    return f"[{low:.4g} to {high:.4g}]"


def smaller(cell: str) -> str:
    """A cell's text in HTML, an interval at its end small, below a value."""
    return re.sub(r"(^| )\[([^][]+ to [^][]+)\]$", lambda found: "<br>" * bool(found[1]) +
                  f"<span style='font-size:11px;opacity:0.75;white-space:nowrap'>{found[2]}</span>", cell)


def as_html(frame: pd.DataFrame, grey: pd.DataFrame | None = None) -> str:
    """A table for a page: its text escaped, figures to four digits, all to the left.

    ``grey``, of the frame's shape, says which cells are no results. Intervals in brackets at a cell's end are small.
    """
    text = frame.to_html(index=False, escape=True, na_rep="–", float_format=lambda v: f"{v:.4g}", border=0,
                         justify="left", classes="workbook")
    inks = iter(grey.to_numpy(dtype=bool).ravel()) if grey is not None else itertools.repeat(False)

    def styled(cell: re.Match) -> str:
        # A browser makes a column of sentences as narrow as its longest word.
        said = [FAINT] * next(inks) + ["min-width: 20em"] * (len(cell[1]) > 60)
        head = f'<td style="{"; ".join(said)}">' if said else "<td>"
        return f"{head}{smaller(cell[1])}</td>"
    text = re.sub("<td>(.*?)</td>", styled, text, flags=re.DOTALL)
    return f"<style>.workbook td, .workbook th {{text-align: left !important; vertical-align: top}}</style>{text}"
