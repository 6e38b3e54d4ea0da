"""JupyterLab in a headless Chromium, for tests: notebooks run as a person runs them, figures are read as data."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat

from sae_lib import runs
from sae_lib.views import pictures

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
IDLE = f"() => ({KERNEL})?.status === 'idle'"
STATE = """el => ({title: el._fullLayout.title.text,
 caption: el._fullLayout.annotations.map(a => a.text), data: el._fullData.map(t => ({type: t.type, name: t.name,
 x: t.x ? Array.from(t.x) : null, y: t.y ? Array.from(t.y) : null, rows: t.z ? t.z.length : 0,
 width: t.z && t.z.length ? t.z[0].length : 0, dims: t._inputLength,
 sum: t.z ? t.z.reduce((s, r) => s + Array.from(r).reduce((a, v) => a + (Number.isFinite(v) ? v : 0), 0), 0) : 0})),
 axes: Object.fromEntries(Object.entries(el._fullLayout).filter(([k]) => /^[xy]axis/.test(k)).map(([k, a]) =>
 [k, {type: a.type, title: a.title.text, range: a.range}]))})"""

PLACE = """(el, [n, i]) => { const t = el._fullData[n], x = el._fullLayout[t.xaxis === 'x' ||
 !t.xaxis ? 'xaxis' : 'xaxis' + t.xaxis.slice(1)], y = el._fullLayout[t.yaxis === 'y' || !t.yaxis ? 'yaxis' :
 'yaxis' + t.yaxis.slice(1)], b = el.getBoundingClientRect(); let px, py;
 if (t.type === 'heatmap') { px = x.c2p(x.type === 'category' ? i : t.x[i]);
   py = y.c2p(y.type === 'category' ? 0 : t.y[0]) }
 else { px = x.c2p(x.d2c(t.x[i])); py = y.c2p(y.d2c(t.y[i]));
   if (t.type === 'bar' && t.orientation === 'h') px = (px + x.c2p(0)) / 2;
   else if (t.type === 'bar') py = (py + y.c2p(0)) / 2 }
 return [b.left + x._offset + px, b.top + y._offset + py] }"""

FORGET = """
def forget():
    import ipywidgets

    from sae_lib.views import show

    ipywidgets.Widget.close_all()
    show._page = show._Page()  # of another notebook, which has no plotly.js yet
forget()
get_ipython().run_line_magic("reset", "-f")
"""
"""What the kernel runs between two notebooks that share it."""

CHROME = pictures.browser() if importlib.util.find_spec("playwright") else None
"""The browser, or None: then these tests cannot run, and say so."""


class Lab:
    """A JupyterLab server on loopback with one page; errors and requests that leave the machine are collected."""

    def __init__(self, root: Path, playwright, shots: Path):
        self.root, self.shots = root, shots
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = os.environ | {name: tempfile.mkdtemp(dir=root) for name in (
            "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
        env["PYTHONPATH"] = f"{runs.project()}{os.pathsep}{env.get('PYTHONPATH', '')}"
        self.log = (root / "lab.log").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
             f"--port={self.port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
             "--ServerApp.disable_check_xsrf=True",
             "--ServerApp.password=", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            stdout=self.log, stderr=subprocess.STDOUT, env=env)
        self._wait()
        self.browser = playwright.chromium.launch(executable_path=CHROME, args=CHROMIUM)
        self.page, self.errors, self.outside = None, [], []
        self.kernel = None
        """The kernel that notebooks share: its start and its imports take longer than most of their cells."""

    def _wait(self):
        for _ in range(240):
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=1)
            assert self.server.poll() is None, (self.root / "lab.log").read_text()
            time.sleep(0.25)
        raise TimeoutError("JupyterLab did not start")

    def close(self):
        self.browser.close()
        self.server.terminate()
        self.server.wait(15)
        self.log.close()

    def _share_kernel(self, path: str):
        """Give the notebook of this path the kernel of those before it, with nothing of theirs."""
        if self.page:
            self.page.evaluate(f"code => ({KERNEL}).requestExecute({{code}}).done", FORGET)
        asked = {"path": path, "name": path, "type": "notebook",
                 "kernel": {"id": self.kernel} if self.kernel else {"name": "python3"}}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/sessions", json.dumps(asked).encode(),
                                         {"Content-Type": "application/json"})
        self.kernel = json.load(urllib.request.urlopen(request, timeout=60))["kernel"]["id"]

    def open(self, name: str, cells: list[str], wait: bool = True, own_kernel: bool = False):
        """Write a notebook of code cells, open it, run all; the page stands when the kernel is idle."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / f"{name}.ipynb")
        if not own_kernel:
            self._share_kernel(f"{name}.ipynb")
        if self.page:
            self.page.close()
        self.page, self.errors, self.outside = self.browser.new_page(viewport={"width": 1500, "height": 2600}), [], []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda r: self.outside.append(r.url)
                     if r.url.startswith(("http", "ws")) and "127.0.0.1" not in r.url else None)
        self.page.goto(f"http://127.0.0.1:{self.port}/lab/workspaces/{name}/tree/{name}.ipynb?reset")
        self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").wait_for(timeout=60_000)
        self.page.wait_for_function(IDLE, timeout=60_000)
        run = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
        self.page.evaluate(run)
        if wait:
            self.page.wait_for_function("n => document.querySelectorAll('.jp-InputPrompt').length >= n && "
                                        "![...document.querySelectorAll('.jp-InputPrompt')].some(p => "
                                        "p.textContent.includes('*') || p.textContent === '[ ]:')",
                                        arg=len(cells), timeout=180_000)
        return self.page

    def plot(self, title: str):
        """The figure whose title begins so, drawn."""
        self.page.wait_for_function(FIND, arg=title, timeout=60_000)
        return self.page.evaluate_handle(FIND, title).as_element()

    def state(self, title: str) -> dict:
        """Title, traces and axes of a figure as plotly.js holds them; found and read at once, as it may be replaced."""
        read = self.page.wait_for_function(f"title => {{ const e = ({FIND})(title); return e && ({STATE})(e) }}",
                                           arg=title, timeout=60_000)
        return read.json_value()

    def changed(self, title: str, before: dict, timeout: float = 20.0) -> dict:
        """The state of a figure once it is another than ``before``."""
        end = time.time() + timeout
        while time.time() < end:
            now = self.state(title)
            if now != before:
                return now
            self.page.wait_for_timeout(100)
        raise AssertionError(f"'{title}' did not change")

    def control(self, label: str):
        """The input of the widget with this description."""
        named = self.page.locator(f"xpath=//label[normalize-space()='{label}']").last
        inside = named.locator("input")
        return inside if inside.count() else named.locator("xpath=..").locator("input, select, .noUi-handle").first

    def choose(self, label: str, value: str):
        """Choose in a drop-down list by the keyboard's way: focus and type are the browser's own."""
        self.control(label).select_option(label=value)

    def click_point(self, title: str, trace: int, point: int = 0):
        """Click where plotly drew a point of a scatter or bar trace, or (heat maps) the middle of a cell."""
        end = time.time() + 60
        while time.time() < end:
            plot = self.plot(title)
            plot.scroll_into_view_if_needed()
            x, y = plot.evaluate(PLACE, [trace, point])
            self.page.mouse.move(x - 3, y)
            self.page.mouse.move(x, y)
            self.page.wait_for_timeout(300)
            # plotly passes on a click only once it has found what lies under the mouse.
            if plot.evaluate("e => e.isConnected && e._hoverdata && e._hoverdata.length"):
                return self.page.mouse.click(x, y)
        raise AssertionError(f"'{title}': nothing under the mouse at point {point} of trace {trace}")

    def shot(self, name: str):
        """A screenshot of the whole notebook, to be looked at."""
        self.shots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(self.shots / f"{name}.png"))

    def clean(self):
        """No console error, nothing asked of another machine."""
        assert self.errors == [] and self.outside == []


FIND = """title => [...document.querySelectorAll('.js-plotly-plot')].find(e => e._fullLayout && e._fullLayout.title &&
 e._fullLayout.title.text && e._fullLayout.title.text.startsWith(title) && e._fullData && e.offsetParent)"""


def remove(path: Path):
    """A folder that may be in use."""
    shutil.rmtree(path, ignore_errors=True)
