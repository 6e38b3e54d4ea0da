"""Show a figure to whoever reads: a person in JupyterLab, a batch, or the reader of a shared file.

The runner says which (``mode``); nothing guesses. Files are always written: self-contained HTML, and PNG, SVG and PDF
where a Chrome can be found. A notebook holds pictures of few colours; without a Chrome its figures are HTML that share
one plotly.js.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pandas as pd
import PIL.Image
import plotly.graph_objects as go
from IPython.display import HTML, Image, Markdown, display

from sae_lib import runs
from sae_lib.views.template import as_html

KINDS = ("png", "svg", "pdf")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browser() -> str | None:
    """The Chrome that draws pictures: $BROWSER_PATH (``none`` for none), or one on the PATH."""
    if os.environ.get("BROWSER_PATH") == "none":
        return None
    return os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def figure(fig: go.Figure, name: str, *, folder: Path, mode: str) -> None:
    """Write <folder>/<name>.html and its pictures, and display the figure."""
    figures({name: fig}, folder=folder, mode=mode)


def figures(named: dict[str, go.Figure], *, folder: Path, mode: str) -> None:
    """The same for several figures with one start of the browser."""
    pictures = write(named, folder) if named else {}
    for name, fig in named.items():
        if mode == "live":
            display(fig)
        elif name in pictures:
            display(Image(data=_few_colours(pictures[name]), width=int(fig.layout.width or 960)))
        else:
            display(HTML(_page.html(fig)))


def write(named: dict[str, go.Figure], folder: Path) -> dict[str, Path]:
    """Files of each figure for who is given them: HTML that needs no network, pictures; the PNGs by name."""
    for name, fig in named.items():
        runs.write_text(Path(folder) / f"{name}.html", fig.to_html(include_plotlyjs=True, full_html=True))
    return _pictures(named, Path(folder))


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
    """The notebook that is being written: plotly.js goes into its first HTML figure alone."""

    loaded = False

    def html(self, fig: go.Figure) -> str:
        text = fig.to_html(include_plotlyjs=not self.loaded, full_html=False)
        self.loaded = True
        return text


_page = _Page()


def _few_colours(file: Path) -> bytes:
    """A PNG with a palette of 256 colours: a third of the size, hardly to be told apart."""
    with PIL.Image.open(file) as picture:
        held = io.BytesIO()
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(held, "png", optimize=True)
    return held.getvalue()


def _pictures(named: dict[str, go.Figure], folder: Path) -> dict[str, Path]:
    """PNG, SVG and PDF of each figure; the PNGs by name; none (and a sentence) without a Chrome that draws.

    Never raises, never hangs.

    A picture of an earlier run that is not drawn anew is removed: it would show other figures than the HTML does.
    """
    path, written = browser(), {}
    if path is None:
        print("PNG skipped: no Chrome or Chromium (BROWSER_PATH names one, or none); the HTML files hold the figures",
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


def table(frame: pd.DataFrame, grey: pd.DataFrame | None = None) -> None:
    """Display a table, its text escaped, figures to four digits, cells of ``grey`` grey; an empty one says so."""
    if frame.empty:
        return display(Markdown("*none*"))
    return display(HTML(f"<div style='overflow-x:auto'>{as_html(frame, grey)}</div>"))


def tables(parts) -> None:
    """Display each part's sentence, and its table below, cells that are no results in grey."""
    for part in parts:
        display(Markdown(part.sentence))
        if len(part.frame):
            display(HTML(f"<div style='overflow-x:auto; font-size:12px'>{as_html(part.frame, part.grey)}</div>"))


def markdown(text: str) -> None:
    """Display a sentence."""
    display(Markdown(text))
