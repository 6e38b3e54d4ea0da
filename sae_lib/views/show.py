"""Show a figure to whoever reads: a person in JupyterLab, a batch, or the reader of a shared file.

The runner says which (``mode``); nothing guesses. Files are always written: self-contained HTML, and PNG where a
Chrome can be found.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, Image, Markdown, display

from sae_lib import runs

KINDS = ("png", "svg")
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
    """PNG and SVG of each figure; the PNGs by name; none (and a sentence) without a Chrome that draws.

    Never raises, never hangs.

    A picture of an earlier run that is not drawn anew is removed: it would show other figures than the HTML does.
    """
    path, written = browser(), {}
    if path is None:
        print("PNG skipped: no Chrome or Chromium found (set BROWSER_PATH to one); the HTML files hold the figures",
              file=sys.stderr)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            files = {(name, kind): Path(scratch) / f"{number}.{kind}" for number, name in enumerate(named)
                     for kind in KINDS}
            fault = _draw([{"fig": named[name], "path": file, "opts": {"format": kind, "scale": 2}}
                           for (name, kind), file in files.items()], path)
            for (name, kind), file in files.items():
                if file.exists() and file.stat().st_size:
                    with runs.whole(folder / f"{name}.{kind}") as temporary:
                        shutil.copyfile(file, temporary)
                    written[name, kind] = folder / f"{name}.{kind}"
        if fault:
            print(f"PNG skipped: {path} did not draw ({fault})", file=sys.stderr)
    for name in named:
        for kind in KINDS:
            if (name, kind) not in written:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return {name: file for (name, kind), file in written.items() if kind == "png"}


def _draw(jobs: list[dict], path: str) -> str | None:
    """Run kaleido once over all pictures; what went wrong, in words.

    Not its server: whose thread dies with a browser that does not start, and then every call waits forever. The
    event loop is a thread's own, as a notebook's is busy.
    """
    import kaleido

    answer: list[str | None] = []

    def work():
        try:
            # MathJax would come from the network, and no label needs it.
            options = {"path": path, "mathjax": False, "timeout": 30}
            drawing = kaleido.write_fig_from_object(jobs, kopts=options)
            faults = asyncio.run(asyncio.wait_for(drawing, 60 + 30 * len(jobs)))
            answer.append("; ".join(f"{type(fault).__name__}: {fault}" for fault in faults) or None)
        except BaseException as error:  # whatever a browser can do wrong must not cost the run its results
            answer.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(75 + 30 * len(jobs))
    return answer[0] if answer else "no answer"


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
