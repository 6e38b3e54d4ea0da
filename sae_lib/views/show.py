"""Show a figure to whoever reads: a person in JupyterLab, a batch, or the reader of a shared file.

The runner says which (``mode``); nothing guesses. Files are always written: self-contained HTML, and PNG where a
Chrome can be found.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, Image, Markdown, display

from sae_lib import runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browser() -> str | None:
    """The Chrome that draws PNGs: $BROWSER_PATH, or one on the PATH."""
    return os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def figure(fig: go.Figure, name: str, *, folder: Path, mode: str, live=None) -> None:
    """Write <folder>/<name>.html and .png and display the figure (live: the widget that ``live()`` makes)."""
    figures({name: fig}, folder=folder, mode=mode, live=live)


def figures(named: dict[str, go.Figure], *, folder: Path, mode: str, live=None) -> None:
    """The same for several figures with one start of the browser."""
    folder = Path(folder)
    for name, fig in named.items():
        runs.write_text(folder / f"{name}.html", fig.to_html(include_plotlyjs=True, full_html=True))
    pictures = _pictures(named, folder)
    for name, fig in named.items():
        if mode == "live":
            display(live() if live else fig)
        elif name in pictures:
            display(Image(filename=pictures[name], width=int(fig.layout.width or 960)))
        else:
            display(HTML(fig.to_html(include_plotlyjs=True, full_html=False)))


def _pictures(named: dict[str, go.Figure], folder: Path) -> dict[str, Path]:
    """PNG of each figure, by name; none (and a sentence) without a Chrome that starts."""
    path = browser()
    if path is None:
        print("PNG skipped: no Chrome or Chromium found (set BROWSER_PATH to one); the HTML files hold the figures",
              file=sys.stderr)
        return {}
    import kaleido

    os.environ.setdefault("BROWSER_PATH", path)
    written = {}
    try:
        kaleido.start_sync_server(silence_warnings=True)
        for name, fig in named.items():
            with runs.whole(folder / f"{name}.png") as temporary:
                temporary.write_bytes(kaleido.calc_fig_sync(fig, opts={"format": "png", "scale": 2}))
            written[name] = folder / f"{name}.png"
    except Exception as error:  # whatever a browser can do wrong must not cost the run its results
        print(f"PNG skipped: {path} did not draw ({type(error).__name__}: {error})", file=sys.stderr)
    finally:
        with contextlib.suppress(Exception):
            kaleido.stop_sync_server(silence_warnings=True)
    return written


def table(frame: pd.DataFrame) -> None:
    """Display a table, its text escaped, figures to four digits; an empty one says so."""
    if frame.empty:
        return display(Markdown("*none*"))
    text = frame.to_html(index=False, escape=True, na_rep="–", float_format=lambda v: f"{v:.4g}", border=0,
                         justify="left", classes="workbook")
    style = "<style>.workbook td, .workbook th {text-align: left !important; vertical-align: top}</style>"
    return display(HTML(f"{style}<div style='overflow-x:auto'>{text}</div>"))


def markdown(text: str) -> None:
    """Display a sentence."""
    display(Markdown(text))
