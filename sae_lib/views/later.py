"""Live: a figure's files are written when the kernel rests, so that no cell waits for them."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from pathlib import Path

from sae_lib.views import pictures

REST = 3.0
"""Seconds without a cell after which nobody waits for the next one."""


class Later:
    """Figures whose files are to be written: HTML, then pictures of those that have none.

    A kernel that ends before writes the HTML; ``python -m sae_lib pictures`` draws what it left.
    """

    def __init__(self, events):
        """``events`` are IPython's."""
        self.waiting: dict[Path, object] = {}
        self.written: list[Path] = []
        self.one, self.thread = threading.RLock(), None
        self.busy, self.since = True, time.monotonic()
        events.register("pre_run_cell", lambda *_: self._cell(True))
        events.register("post_run_cell", lambda *_: self._cell(False))
        atexit.register(self.write)

    def keep(self, file: Path, fig) -> None:
        """Write ``fig`` as ``file``, later."""
        with self.one:
            self.waiting[file] = fig
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._work, daemon=True, name="figures-later")
                self.thread.start()

    def write(self) -> None:
        """Write the HTML of all that waits."""
        while self._write_one():
            pass

    def _cell(self, busy: bool) -> None:
        self.busy, self.since = busy, time.monotonic()

    def _rests(self) -> bool:
        return not self.busy and time.monotonic() - self.since > REST

    def _write_one(self) -> bool:
        with self.one:
            if not self.waiting:
                return False
            file, fig = next(iter(self.waiting.items()))
            del self.waiting[file]
            try:
                pictures.write_html(fig, file)
                self.written.append(file)
            except Exception as error:  # no cell to raise it in
                print(f"{file}: not written ({error})", file=sys.stderr)
            return True

    def _work(self) -> None:
        while self._more():
            while not self._rests():
                time.sleep(0.2)
            if not self._write_one():
                files, self.written = self.written, []
                pictures.draw(pictures.undrawn(files))  # without a browser the page has said so

    def _more(self) -> bool:
        with self.one:
            if not self.waiting and not self.written:
                self.thread = None
            return self.thread is not None
