"""A module run as ``python -m`` runs it, in a batch: ``python -m sae_lib.batch papermill IN.ipynb OUT.ipynb``.

Where the batch engine keeps a process that has imported everything (``sae_lib.warm``), the module runs in a copy of it,
several seconds sooner. It has this process' arguments, folder, environment and standard streams, and ends when this
process does; this process passes signals on and ends with the copy's exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import BinaryIO

from sae_lib import warm

PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run the module that the command line names: in a copy of the warm process, or here."""
    if len(sys.argv) < 2:
        print("expected the name of a module, as in python -m sae_lib.batch papermill", file=sys.stderr)
        return 2
    connection = _connect(os.environ.get(warm.ADDRESS, ""))
    answers = connection.makefile("rb") if connection else None
    copy = _ask(connection, answers) if connection else None
    if copy is None:
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return 0
    return _follow(copy, answers)


def _connect(address: str) -> socket.socket | None:
    """A connection to the warm process, if there is one."""
    if not address:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection


def _ask(connection: socket.socket, answers: BinaryIO) -> int | None:
    """The process id of a copy that now runs the module; None where the warm process declines or ends."""
    request = json.dumps({"argv": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ),
                          "code": [sys.prefix, warm.__file__]}).encode()
    with contextlib.suppress(OSError):
        socket.send_fds(connection, [b"3"], [0, 1, 2])
        connection.sendall(request + b"\n")
        answer = answers.readline().strip()
        return int(answer) if answer.isdigit() else None
    return None


def _follow(copy: int, answers: BinaryIO) -> int:
    """Wait for a copy: its exit status, 1 if it was killed."""
    for number in PASSED_ON:
        if signal.getsignal(number) == signal.SIG_IGN:  # as for what a shell has put into the background
            continue
        signal.signal(number, lambda received, _: _pass_on(copy, received))
    answer = answers.readline()
    return int(answer) if answer else 1


def _pass_on(copy: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(copy, number)


if __name__ == "__main__":
    sys.exit(main())
