"""Copies of the warm process: each does what a process of its own would, and ends when that would."""

import json
import os
import signal
import subprocess
import sys
import time

import checkouts
import nbformat
import psutil
import pytest

from sae_lib import warm

TELLS = """
import json, os, sys
imported = "torch" in sys.modules
import numpy, random, torch
print(json.dumps({"imported": imported, "arguments": sys.argv[1:], "folder": os.getcwd(), "name": __name__,
                  "threads": torch.get_num_threads(), "home": os.environ.get("SAE_WORKBOOK_HOME"),
                  "torch draws": torch.rand(1).item(), "numpy draws": numpy.random.rand(),
                  "random draws": random.random()}))
print("beside", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
LASTS = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
pathlib.Path('begun').touch()
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux" or any(map(os.path.exists, warm.GPUS)),
                                reason="processes are copied on Linux only, and not beside a GPU")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the project with two modules to run, the environment of its warm process, and that process."""
    folder = tmp_path_factory.mktemp("project")
    checkouts.copy(folder, "sae_lib")
    (folder / "tells.py").write_text(TELLS)
    (folder / "lasts.py").write_text(LASTS)
    environment = {name: value for name, value in os.environ.items() if name != warm.ADDRESS}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    process = warm.start(environment, folder)
    yield folder, environment, process
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert not os.path.exists(os.path.dirname(environment[warm.ADDRESS]))


def call(place, *words, **changed):
    """``python -m sae_lib.batch`` with ``words``, and what it did."""
    folder, environment, _ = place
    return subprocess.run([sys.executable, "-m", "sae_lib.batch", *words], cwd=folder, env=environment | changed,
                          capture_output=True, text=True, timeout=120)


def test_a_copy_does_what_a_process_of_its_own_does(place):
    told = []
    for address in (place[1][warm.ADDRESS], ""):
        done = call(place, "tells", "3", "a b", SAE_WORKBOOK_HOME="/elsewhere", **{warm.ADDRESS: address})
        assert done.returncode == 3 and done.stderr.endswith("beside\n"), done.stderr
        told.append(json.loads(done.stdout))
    copied, alone = told
    assert (copied.pop("imported"), alone.pop("imported")) == (True, False)
    for name in ("numpy draws", "torch draws", "random draws"):
        assert copied.pop(name) != alone.pop(name)
    assert copied == alone and copied["threads"] == 1 and copied["arguments"] == ["3", "a b"]


def test_copies_draw_numbers_of_their_own_and_take_their_number_of_threads(place):
    first, second = (json.loads(call(place, "tells", "0", OMP_NUM_THREADS="2").stdout) for _ in range(2))
    assert first["imported"] and first["threads"] == second["threads"] == 2
    assert all(first[name] != second[name] for name in ("numpy draws", "torch draws", "random draws"))


def test_what_imports_depend_on_is_as_it_was_or_nothing_is_copied(place):
    assert json.loads(call(place, "tells", "0", HF_HUB_OFFLINE="1").stdout)["imported"] is False
    file = place[0] / "sae_lib/batch.py"
    text = file.read_text()
    try:
        file.write_text(text + "# changed\n")
        assert json.loads(call(place, "tells", "0").stdout)["imported"] is False
    finally:
        file.write_text(text)
    assert json.loads(call(place, "tells", "0").stdout)["imported"] is True


def test_a_fault_in_a_copy_is_told_where_it_was_asked_for(place):
    done = call(place, "tells", "not a number")
    assert done.returncode == 1 and "ValueError: invalid literal" in done.stderr and "beside" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_copy_ends_with_the_one_that_asked_for_it(place, how):
    folder, environment, process = place
    (folder / "begun").unlink(missing_ok=True)
    # What a shell has put into the background ignores Ctrl-C: here it shall be heard.
    asking = subprocess.Popen([sys.executable, "-m", "sae_lib.batch", "lasts"], cwd=folder, env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    until(lambda: (folder / "begun").exists())
    copies = psutil.Process(process.pid).children(recursive=True)
    assert copies
    asking.send_signal(how)
    assert asking.wait(timeout=20) != 0
    assert psutil.wait_procs(copies, timeout=20)[1] == []


def test_a_notebook_runs_in_a_copied_kernel_that_ends_with_papermill(place):
    folder, environment, process = place
    cells = ["folder: str = 'x'", "import sys, os\nprint('torch' in sys.modules, os.getcwd(), folder)", "{last}"]
    for name, last, status in (("good", "print('end')", 0), ("bad", "1 / 0", 1)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.format(last=last)) for cell in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
        done = call(place, "papermill", f"{name}.ipynb", f"{name}.out.ipynb", "-p", "folder", "given")
        assert done.returncode == status, done.stderr
        outputs = [cell.get("outputs") for cell in nbformat.read(folder / f"{name}.out.ipynb", as_version=4).cells]
        assert any(f"True {folder} given" in one[0].text for one in outputs if one and "text" in one[0])
    assert "ZeroDivisionError" in done.stderr
    until(lambda: psutil.Process(process.pid).children(recursive=True) == [])


def test_a_killed_papermill_takes_its_copied_kernel_along(place):
    folder, environment, process = place
    (folder / "begun").unlink(missing_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LASTS)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "long.ipynb")
    asking = subprocess.Popen([sys.executable, "-m", "sae_lib.batch", "papermill", "long.ipynb", "long.out.ipynb"],
                              cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: (folder / "begun").exists())
    copies = psutil.Process(process.pid).children(recursive=True)
    assert len(copies) == 2, "papermill and its kernel"
    asking.kill()
    asking.wait()
    assert psutil.wait_procs(copies, timeout=20)[1] == []


def test_without_a_name_there_is_one_line(place):
    done = call(place)
    assert done.returncode == 2 and done.stderr.startswith("expected the name of a module")


def until(true, seconds=60):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
