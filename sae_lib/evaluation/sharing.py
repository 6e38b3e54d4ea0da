"""What several evaluations that start at once need only one of: one computes it, on all cores, and the others wait."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import torch

from sae_lib import presence


@contextlib.contextmanager
def alone(file: Path, what: str):
    """One process at a time on ``file``; the lock ends with its process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another evaluation that computes the same {what}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def all_cores():
    """The cores of the whole batch, while others of it wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, int(os.environ.get(presence.CORES, 0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
