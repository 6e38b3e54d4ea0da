"""Pictures of figures: PNG, SVG and PDF beside each HTML file, drawn from it, many by one browser.

A figure's pictures are removed when its HTML is written anew. So a picture never shows another figure than the HTML
does, and what is still to be drawn is what has no pictures: whoever was killed in between, drawing again goes on.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_lib import runs

KINDS = ("png", "svg", "pdf")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WITHOUT = "PNG skipped: no Chrome or Chromium (BROWSER_PATH names one, or none); the HTML files hold the figures"
TABS, AT_ONCE = 2, 4
"""Tabs of the browser; figures handed to it at once, whose files are in their place before others are begun."""
SECONDS = 30
"""For one picture, at most."""


def browser() -> str | None:
    """The Chrome that draws pictures: $BROWSER_PATH (``none`` for none), or one on the PATH."""
    if os.environ.get("BROWSER_PATH") == "none":
        return None
    return os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def write_html(fig, file: Path) -> None:
    """Write a figure as HTML that needs no network, and remove the pictures of what stood there.

    Where the same figure stands there already, file and pictures are left as they are.
    """
    text = fig.to_html(include_plotlyjs=True, full_html=True, div_id="figure")
    if file.exists() and file.read_bytes() == text.encode():
        return
    for kind in KINDS:
        file.with_suffix(f".{kind}").unlink(missing_ok=True)
    runs.write_text(file, text)


def figure_of(file: Path) -> dict[str, Any]:
    """Data and layout of the figure in an HTML file. Raises RunError if the file has no figure."""
    try:
        text = file.read_text(encoding="utf-8")
        began = list(re.finditer(r'Plotly\.newPlot\(\s*"[\w-]+",\s*(?=\[)', text))[-1].end()
        data, end = json.JSONDecoder().raw_decode(text, began)
        layout, _ = json.JSONDecoder().raw_decode(text, text.index("{", end))
    except (OSError, ValueError, IndexError) as error:
        raise runs.RunError(f"{file}: holds no figure ({type(error).__name__})") from None
    return {"data": data, "layout": layout}


def undrawn(files: Iterable[Path]) -> list[Path]:
    """Those HTML files that lack a picture."""
    return [file for file in files if not all(file.with_suffix(f".{kind}").exists() for kind in KINDS)]


def draw(files: list[Path]) -> str | None:
    """PNG, SVG and PDF beside each HTML file, by one browser; what went wrong, in words. Never raises, never hangs."""
    path = browser()
    if path is None or not files:
        return WITHOUT if files else None
    answer: list[str | None] = []
    with tempfile.TemporaryDirectory() as scratch:
        drawing = _Drawing(files, path, Path(scratch))
        # The event loop is a thread's own, as a notebook's is busy. Not kaleido's server: whose thread dies with a
        # browser that does not start, and then every call waits for ever.
        thread = threading.Thread(target=lambda: answer.append(drawing.run()), daemon=True)
        thread.start()
        while thread.is_alive():
            before = drawing.turns
            thread.join(15 + drawing.patience)
            if thread.is_alive() and drawing.turns == before:
                break
    fault = answer[0] if answer else "no answer"
    return f"PNG skipped: {path} did not draw ({fault})" if fault else None


def say(fault: str | None) -> None:
    """Tell the reader what ``draw`` answered."""
    if fault:
        print(fault, file=sys.stderr, flush=True)


def small(file: Path) -> bytes:
    """A PNG for a notebook, with a palette of 256 colours: a third of the size, hardly to be told apart."""
    import PIL.Image

    with PIL.Image.open(file) as picture:
        held = io.BytesIO()
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(held, "png", optimize=True)
    return held.getvalue()


class _Drawing:
    """Pictures of some files by one start of the browser, a few files at a turn."""

    patience = 60 + SECONDS * AT_ONCE * len(KINDS) / TABS
    """Seconds for a turn, at most."""

    def __init__(self, files: list[Path], path: str, scratch: Path):
        self.files, self.path, self.scratch = files, path, scratch
        self.turns, self.faults = 0, []

    def run(self) -> str | None:
        """All turns; what went wrong, in words."""
        try:
            asyncio.run(self._all())
        except BaseException as error:  # whatever a browser can do wrong must not cost the run its results
            self.faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return "; ".join(dict.fromkeys(self.faults)) or None

    async def _all(self) -> None:
        import kaleido

        # MathJax would come from the network, and no label needs it.
        async with kaleido.Kaleido(n=TABS, path=self.path, mathjax=False, timeout=SECONDS) as held:
            for first in range(0, len(self.files), AT_ONCE):
                some = self._read(self.files[first:first + AT_ONCE])
                jobs = [{"fig": fig, "path": self._scratch(file, kind), "opts": {"format": kind, "scale": 2}}
                        for file, (fig, _) in some.items() for kind in KINDS]
                found = await asyncio.wait_for(held.write_fig_from_object(jobs), self.patience)
                self.faults += [f"{type(fault).__name__}: {fault}" for fault in found]
                drawn = [self._place(file, stamp) for file, (_, stamp) in some.items()]
                self.turns += 1
                if some and not any(drawn):  # nor will it draw the others
                    break

    def _read(self, files: list[Path]) -> dict[Path, tuple[dict[str, Any], tuple[int, int]]]:
        """Each file's figure, and which version of the file it is."""
        found = {}
        for file in files:
            try:
                stamp = _stamp(file)
                found[file] = figure_of(file), stamp
            except runs.RunError as error:
                self.faults.append(str(error))
        return found

    def _scratch(self, file: Path, kind: str) -> Path:
        return self.scratch / f"{self.files.index(file)}.{kind}"

    def _place(self, file: Path, stamp: tuple[int, int]) -> bool:
        """Put a file's pictures beside it, unless it was written anew meanwhile; whether there are any."""
        drawn = {kind: made for kind in KINDS if (made := self._scratch(file, kind)).exists() and made.stat().st_size}
        if _stamp(file) == stamp:
            for kind, made in drawn.items():
                with runs.whole(file.with_suffix(f".{kind}")) as temporary:
                    shutil.copyfile(made, temporary)
        return bool(drawn)


def _stamp(file: Path) -> tuple[int, int]:
    """Which version of a file it is; none where it is gone."""
    try:
        held = file.stat()
    except OSError:
        return 0, 0
    return held.st_mtime_ns, held.st_ino
