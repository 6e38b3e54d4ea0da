"""A process that has imported what notebooks use, to be copied: each notebook of a batch then starts at once.

Imports take about five seconds a notebook, a quickstart has eleven. Linux only, and not beside a GPU, whose driver a
copy could not use if an import had touched it: elsewhere, and where this process is gone, ``sae_lib.batch`` runs each
notebook in a process of its own. A copy begins as a fresh process does: nothing but imports has happened, no thread
runs, no seed is drawn, no device is touched. Libraries read some environment variables as they are imported, so whoever
comes with others is declined.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from sae_lib import presence

ADDRESS = "SAE_WORKBOOK_WARM"
"""Environment variable with the socket at which the warm process listens."""

GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""Files that are there where an NVIDIA or AMD driver is."""

OURS = "SAE_WORKBOOK_"
"""How variables begin that the library reads when it needs them, not as it is imported."""
THREADS = ("_NUM_THREADS", "_MAXIMUM_THREADS")
"""How variables end that say how many threads to use: a copy sets them anew."""
OTHERS = ("PWD", "OLDPWD", "SHLVL", "_", "TMPDIR", "TMP", "TEMP", "TEMPDIR", "COLUMNS", "LINES",
          "PS1", "PS2", "PS4", "PROMPT_COMMAND", "PYTEST_CURRENT_TEST")
"""Other variables that no library reads as it is imported."""

MODULES = (
    "papermill.cli", "papermill.clientwrap", "jupyter_client.provisioning.local_provisioner",
    "ipykernel.kernelapp", "ipykernel.zmqshell", "ipywidgets", "anywidget", "pandas", "pyarrow.parquet", "torch",
    "numba", "threadpoolctl", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "sae_lib.params", "sae_lib.verify", "sae_lib.data.activations", "sae_lib.data.page",
    "sae_lib.data.language_model", "sae_lib.training.trainer", "sae_lib.training.coactivation.cost",
    "sae_lib.evaluation.evaluate", "sae_lib.evaluation.faults", "sae_lib.evaluation.latents",
    "sae_lib.evaluation.letters", "sae_lib.evaluation.validity", "sae_lib.evaluation.compare",
    "sae_lib.evaluation.saebench.word_material", "sae_lib.views.dashboards", "sae_lib.views.figures",
    "sae_lib.views.figures_pairs", "sae_lib.views.figures_letters", "sae_lib.views.figures_compare",
    "sae_lib.views.further", "sae_lib.views.executed")
"""What the notebooks of a batch import; a module that is not listed is imported by the copy that uses it."""


def start(environment=None, project: Path | None = None) -> subprocess.Popen | None:
    """Start the warm process, in ``environment`` (by default this process' own), which then names it.

    It has the library of the folder ``project``, by default this one, and ends with this process or once its standard
    input is closed. None where there is none to start: not on Linux, beside a GPU, or one is there already.
    """
    environment = os.environ if environment is None else environment
    if sys.platform != "linux" or environment.get(ADDRESS) or any(map(os.path.exists, GPUS)):
        return None
    folder = tempfile.mkdtemp(prefix="sae-workbook-")
    address = os.path.join(folder, "warm")
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(address)
    except OSError:  # the path is too long for a socket
        os.rmdir(folder)
        return None
    listener.listen(64)
    with listener:
        # In a session of its own: Ctrl-C reaches copies by way of those that asked for them. It watches no engine,
        # for which it would need a thread; its standard input ends with this process.
        without = {name: value for name, value in environment.items() if name != presence.ENGINE}
        process = subprocess.Popen([sys.executable, "-m", "sae_lib.warm", str(listener.fileno()), address],
                                   stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True,
                                   env=without, cwd=project or Path(__file__).parents[1])
    environment[ADDRESS] = address
    return process


def serve(listener: socket.socket, owner: int) -> None:
    """Import everything, then copy this process for each request until the file ``owner`` comes to its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that have ended are not waited for
    ours = _state(os.environ, sys.prefix, __file__)
    _import()
    while True:
        ready = select.select([listener, owner], [], [])[0]
        if owner in ready:
            return
        connection, _ = listener.accept()
        with connection:
            received = _receive(connection)
            if received is None:
                continue
            request, streams = received
            fits = threading.active_count() == 1 and _state(request["environment"], *request["code"]) == ours
            if fits and os.fork() == 0:
                listener.close()
                os.close(owner)
                _work(connection, request, streams)
            for stream in streams:
                os.close(stream)
            if not fits:
                with contextlib.suppress(OSError):
                    connection.sendall(b"no\n")


def _import() -> None:
    """Import MODULES. One that cannot be imported is left to the copy that uses it, which says what is wrong."""
    from sae_lib.data import language_model

    language_model.import_transformers()  # before a package imports it beside a torchvision that does not load
    for name in MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # copies share what is never collected


def _state(environment, python: str, library: str) -> tuple:
    """What must be as it was when this process imported everything: Python, the library and its code, variables."""
    from sae_lib import runs

    counts = {name: value for name, value in environment.items()
              if not name.startswith(OURS) and not name.endswith(THREADS) and name not in OTHERS}
    return python, os.path.realpath(library), runs.library_digest(), counts


def _receive(connection: socket.socket) -> tuple[dict, list[int]] | None:
    """A request and the standard streams of who asks; None if it went away meanwhile."""
    streams: list[int] = []
    with contextlib.suppress(OSError):
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as said, contextlib.suppress(ValueError):
            return json.loads(said.readline()), streams
    for stream in streams:
        os.close(stream)
    return None


def _work(connection: socket.socket, request: dict, streams: list[int]) -> None:
    """In a copy: become what was asked for, run the module, tell its exit status and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    become(request["folder"], request["environment"])
    if request["argv"][0] == "papermill":
        from sae_lib import warm_kernel

        warm_kernel.prepare(connection)
    connection.sendall(b"%d\n" % os.getpid())
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    presence.end_with_engine()
    sys.argv = request["argv"]
    status = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % status)
        os._exit(status)  # without taking down, one by one, everything that was imported


def become(folder: str, environment: dict) -> None:
    """Take on a folder, an environment with its number of threads, and a fresh state of the random numbers."""
    import numba
    import numpy as np
    import threadpoolctl
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    numba.config.reload_config()
    np.random.seed()
    torch.seed()
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))
        threadpoolctl.threadpool_limits(int(threads))


def _end_with(connection: socket.socket) -> None:
    """End this process when the one that asked for it does."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    os._exit(1)


def main() -> None:
    """Serve at the listening socket whose number is the first argument; remove its file, the second, in the end."""
    number, address = int(sys.argv[1]), Path(sys.argv[2])
    with contextlib.suppress(KeyboardInterrupt):
        serve(socket.socket(fileno=number), sys.stdin.fileno())
    with contextlib.suppress(OSError):
        address.unlink()
        address.parent.rmdir()
    os._exit(0)


if __name__ == "__main__":
    main()
