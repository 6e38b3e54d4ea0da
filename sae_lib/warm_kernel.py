"""The kernel of a notebook that runs in a copy of the warm process: a copy too, made before anything else happens.

It waits for papermill to say which kernel it is to be. papermill's own engine starts it, by a provisioner of
jupyter_client, in place of a new process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from papermill.engines import NBClientEngine, papermill_engines

waiting = None
"""The copy that is to be a kernel, in the process that prepared it, until it is one."""


def prepare(connection) -> None:
    """Make a copy that waits to be a kernel, and have papermill use it. It does not keep ``connection``."""
    global waiting
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        connection.close()
        os.close(writer)
        _wait(reader)
    os.close(reader)
    waiting = Copy(process, writer)
    papermill_engines.register(None, Engine)


def _wait(reader: int) -> None:
    """In the copy: become the kernel that is named, or end if none is."""
    os.setsid()
    with os.fdopen(reader) as told:
        text = told.read()
    if not text:
        os._exit(0)
    from ipykernel.kernelapp import IPKernelApp

    from sae_lib import presence, warm

    asked = json.loads(text)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    warm.become(asked["folder"], asked["environment"])
    presence.end_with_engine()
    status = 1
    try:
        # By its parent it knows when to end; the environment variable for that is read as ipykernel is imported.
        IPKernelApp.launch_instance(argv=[*asked["arguments"], f"--IPKernelApp.parent_handle={os.getppid()}"])
        status = 0
    finally:
        os._exit(status)


class Copy:
    """A forked child, with the part of subprocess.Popen's interface that jupyter_client uses."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, told: int):
        self.pid, self.told, self.returncode = pid, told, None

    def begin(self, arguments: list[str], folder: str, environment: dict) -> None:
        """Say which kernel it is to be."""
        with os.fdopen(self.told, "w") as told:
            json.dump({"arguments": arguments, "folder": folder, "environment": environment}, told)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # it was waited for elsewhere
                pid, status = self.pid, 1 << 8
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended."""
        while self.poll() is None:
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class Provisioner(LocalProvisioner):
    """jupyter_client's own, but that the process is there already."""

    async def launch_kernel(self, cmd, **given):
        """Have the copy be the kernel of this connection, if it is one of this Python."""
        global waiting
        ours = os.path.dirname(cmd[0]) == os.path.dirname(sys.executable) and cmd[1:3] == ["-m", "ipykernel_launcher"]
        if waiting is None or not ours:
            return await super().launch_kernel(cmd, **given)
        folder = str(given.get("cwd") or os.getcwd())
        waiting.begin(cmd[cmd.index("-f"):], folder, dict(given.get("env") or os.environ))
        self.process, self.pid, self.pgid, self.cwd = waiting, waiting.pid, waiting.pid, folder
        waiting = None
        return self.connection_info


class Manager(AsyncKernelManager):
    """jupyter_client's own, with that provisioner."""

    async def _async_pre_start_kernel(self, **given):
        self.provisioner = Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**given)


class Engine(NBClientEngine):
    """papermill's own, with that manager."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        """Run the notebook in the kernel that waits."""
        return super().execute_managed_notebook(nb_man, kernel_name, kernel_manager_class=Manager, **options)
