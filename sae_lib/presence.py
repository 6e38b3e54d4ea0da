"""Who works here: one process at a time on a folder, and none whose batch engine has gone.

The lock belongs to the process and ends with it, however it ends: there is nothing for a person to clean up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock of this kind
    fcntl = None

ENGINE = "SAE_WORKBOOK_ENGINE"
"""Environment variable with the process id of the batch engine that started this process' ancestors."""

CORES = "SAE_WORKBOOK_CORES"
"""Environment variable with the cores that the batch engine may use in all."""


class Busy(RuntimeError):
    """Another living process works on the same folder."""


def hold(path: Path, what: str, patience: float = 15.0):
    """Take the lock of ``path`` (a hidden file beside it) and return it open: it is held until closed or the end.

    Waits ``patience`` seconds, in which a process whose engine was killed ends. Raises Busy naming ``what`` and
    the process that holds it. Where the file system knows no locks, nothing is held.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = (path.parent / f".{path.name}.lock").open("a+")
    began, said = time.monotonic(), False
    while fcntl:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
        except OSError:
            return handle
        if time.monotonic() - began > patience:
            handle.close()
            raise Busy(f"{what}: process {holder} works on it; wait for it or end it")
        if not said:
            print(f"{what}: waiting for process {holder}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.2)
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


@contextlib.contextmanager
def alone(path: Path, what: str, patience: float = 15.0):
    """Work on ``path`` alone; see ``hold``."""
    with hold(path, what, patience):
        yield


def end_with_engine(every: float = 0.5) -> None:
    """End this process soon after the batch engine named in the environment does.

    A killed Snakemake leaves its shells, papermill and the kernels behind, which would go on and write into the
    folders that the next command works on. Papermill ends when its kernel does.
    """
    number = os.environ.get(ENGINE, "")
    if not number.isdigit() or int(number) == os.getpid():
        return
    import psutil

    try:
        engine = psutil.Process(int(number))
    except psutil.NoSuchProcess:
        os._exit(1)

    def watch():
        with contextlib.suppress(psutil.NoSuchProcess):
            while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
                time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-engine").start()
