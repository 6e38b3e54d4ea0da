"""Show a figure to whoever reads: a person in JupyterLab, a batch, or the reader of a shared file.

The runner says which (``mode``); nothing guesses. Files are written too: self-contained HTML, and PNG, SVG and PDF
where a Chrome can be found (``pictures``). A person's are written after the cells (``later``). A batch's pictures are
drawn at once, or, of notebooks that a batch engine runs, in the end by one browser for all (``executed``). A notebook
holds pictures of few colours; without a Chrome its figures are HTML that share one plotly.js.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from IPython import get_ipython
from IPython.display import HTML, Image, Markdown, display
from plotly.offline import get_plotlyjs

from sae_lib import presence
from sae_lib.views import executed, later, pictures
from sae_lib.views.template import as_html

WIDTH = 960
"""Of a figure that has none of its own."""


def figure(fig: go.Figure, name: str, *, folder: Path, mode: str) -> None:
    """Write <folder>/<name>.html and its pictures, and display the figure."""
    figures({name: fig}, folder=folder, mode=mode)


def figures(named: dict[str, go.Figure], *, folder: Path, mode: str) -> None:
    """The same for several figures."""
    files = {name: Path(folder) / f"{name}.html" for name in named}
    if mode == "live":
        for fig in named.values():
            display(fig)
        return _for_a_person({files[name]: fig for name, fig in named.items()})
    in_the_end = presence.ENGINE in os.environ and pictures.browser() is not None
    write(named, folder, draw=not in_the_end)
    for name, fig in named.items():
        width, picture = int(fig.layout.width or WIDTH), files[name].with_suffix(".png")
        if picture.exists():
            display(Image(data=pictures.small(picture), width=width))
        else:
            _page.load()
            display(HTML(fig.to_html(include_plotlyjs=False, full_html=False)),
                    metadata=executed.of_figure(files[name], width))
    return None


def write(named: dict[str, go.Figure], folder: Path, draw: bool = True) -> None:
    """Files of each figure for who is given them: HTML that needs no network, and its pictures."""
    files = [Path(folder) / f"{name}.html" for name in named]
    for file, fig in zip(files, named.values()):
        pictures.write_html(fig, file)
    if draw:
        pictures.say(pictures.draw(pictures.undrawn(files)))


def dashboard(board, name: str, *, folder: Path, mode: str) -> None:
    """Live: the dashboard. In a batch: the figures of its state, as files <name>_<part> and as pictures."""
    if mode == "live":
        return display(board.widget)
    for note in board.notices:
        display(Markdown(f"*{note}*"))
    parts = board.figures()
    figures({f"{name}_{part}": drawn for part, drawn in parts.items() if not isinstance(drawn, str)}, folder=folder,
            mode=mode)
    for drawn in parts.values():
        if isinstance(drawn, str):
            display(HTML(drawn))
    return None


class _Page:
    """The notebook that is being written: plotly.js stands in it once, before its first HTML figure."""

    loaded = False

    def load(self) -> None:
        if not self.loaded:
            display(HTML(f"<script>{get_plotlyjs()}</script>"), metadata={executed.TAG: {"script": "plotly.js"}})
        self.loaded = True


_page = _Page()


def _for_a_person(files: dict[Path, go.Figure]) -> None:
    """Write files of figures after the cells, where there are any."""
    shell = get_ipython()
    if shell is None:
        for file, fig in files.items():
            pictures.write_html(fig, file)
        return pictures.say(pictures.draw(pictures.undrawn(files)))
    for file, fig in files.items():
        _later(shell).keep(file, fig)
    return None


@functools.cache
def _later(shell) -> later.Later:
    """The kernel's one; a page is told once that its files will lack pictures."""
    if pictures.browser() is None:
        pictures.say(pictures.WITHOUT)
    return later.Later(shell.events)


def table(frame: pd.DataFrame, grey: pd.DataFrame | None = None) -> None:
    """Display a table, its text escaped, figures to four digits, cells of ``grey`` grey; an empty one says so."""
    if frame.empty:
        return display(Markdown("*none*"))
    return display(HTML(f"<div style='overflow-x:auto'>{as_html(frame, grey)}</div>"))


def claims(frame: pd.DataFrame) -> None:
    """Display a table with a column ``claim``; a claim that all rows share is said once, above it."""
    if len(frame) > 1 and frame.claim.nunique() == 1:
        markdown(f"Of every row: **{frame.claim.iloc[0]}**.")
        frame = frame.drop(columns="claim").replace("", None).dropna(axis="columns", how="all")
    table(frame)


def tables(parts) -> None:
    """Display each part's sentence, and its table below, cells that are no results in grey."""
    for part in parts:
        display(Markdown(part.sentence))
        if len(part.frame):
            display(HTML(f"<div style='overflow-x:auto; font-size:12px'>{as_html(part.frame, part.grey)}</div>"))


def markdown(text: str) -> None:
    """Display a sentence."""
    display(Markdown(text))
