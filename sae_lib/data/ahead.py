"""Batches one step ahead: a thread gathers the next while the current one is trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

DEPTH = 2
"""Batches that wait; with the one in use, what reading ahead costs in memory."""


def ahead(batches: Iterable, depth: int = DEPTH) -> Iterator:
    """The same items in the same order, up to ``depth`` of them made in advance; an error comes where it belongs."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in batches:
                if not offer((item, None)):
                    return
            offer((None, StopIteration()))
        except BaseException as error:  # whatever it is, the reader must hear of it
            offer((None, error))

    thread = threading.Thread(target=work, daemon=True, name="batches-ahead")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()
