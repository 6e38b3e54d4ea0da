"""papermill on one kernel that is kept: its start and its imports take longer than most notebooks of the tiny model do.

Before each notebook the kernel's names and its history of cells are cleared, and its folder and environment become
those of the test. What a kernel of its own means (its start, its end, its lock) is what test_snakefile tries.
"""

import atexit
import functools
import os

import papermill
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from sae_lib import runs

NAME = "kept"
BEGIN = """
get_ipython().run_line_magic("reset", "-f")
get_ipython().history_manager.input_hist_parsed[:] = [""]
def begin():
    import os

    from sae_lib.views import show

    for name in [name for name in os.environ if name.startswith("SAE_WORKBOOK_")]:
        del os.environ[name]
    os.environ.update({environment!r})
    os.chdir({folder!r})
    show._page = show._Page()  # of another notebook, which has no plotly.js yet
begin()
del begin
"""


@functools.cache
def _kernel():
    """The one kernel of this process and a client of it, started when they are first asked for."""
    manager = AsyncKernelManager(kernel_name="python3")
    run_sync(manager.start_kernel)()
    client = manager.client()
    client.start_channels()
    run_sync(client.wait_for_ready)(timeout=60)
    client.allow_stdin = False
    atexit.register(lambda: (client.stop_channels(), run_sync(manager.shutdown_kernel)(now=True)))
    return manager, client


class Kept(NBClientEngine):
    """papermill's own engine, but that the kernel stays."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **_options):
        manager, client = _kernel()
        environment = {name: value for name, value in os.environ.items()
                       if name.startswith("SAE_WORKBOOK_") or name == "BROWSER_PATH"}
        begin = BEGIN.format(environment=environment, folder=os.getcwd())
        content = run_sync(client.execute_interactive)(begin, silent=True, timeout=120)["content"]
        assert content["status"] == "ok", content
        notebook = PapermillNotebookClient(nb_man, km=manager, kernel_name=kernel_name)
        notebook.kc = client
        return notebook.execute()


papermill_engines.register(NAME, Kept)


def execute(name, out, folder, parameters):
    """Run notebooks/<name>.ipynb into the file ``out``, in ``folder``, as ``papermill`` does."""
    return papermill.execute_notebook(str(runs.project() / f"notebooks/{name}.ipynb"), str(out), parameters=parameters,
                                      engine_name=NAME, cwd=str(folder), progress_bar=False)
