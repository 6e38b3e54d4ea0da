"""Pictures are drawn from what the HTML holds, by one browser for many notebooks, and whatever is killed goes on."""

import base64
import io
import json
import os
import subprocess
import sys
import time

import kaleido
import nbformat
import numpy as np
import PIL.Image
import plotly.graph_objects as go
import pytest

from sae_lib import presence, runs
from sae_lib.views import executed, later, pictures, show


def png(colour=128):
    held = io.BytesIO()
    PIL.Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(held, "png")
    return held.getvalue()


class Browser:
    """In kaleido's place: counts its starts, draws what it is asked for."""

    starts, asked, draws = 0, [], True

    def __init__(self, **options):
        assert options["path"] == "/a/chrome" and options["mathjax"] is False
        type(self).starts += 1

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def write_fig_from_object(self, jobs):
        for job in jobs:
            self.asked.append(job["fig"])
            if self.draws:
                job["path"].write_bytes(png() if job["opts"]["format"] == "png" else b"drawn")
        return () if self.draws else (RuntimeError("no tab"),)


@pytest.fixture
def chrome(monkeypatch):
    kind = type("Browser", (Browser,), {"starts": 0, "asked": [], "draws": True})
    monkeypatch.setattr(kaleido, "Kaleido", kind)
    monkeypatch.setenv("BROWSER_PATH", "/a/chrome")
    return kind


def some_figure(number=1, name="a <b> 'c' \"d\" </script>"):
    fig = go.Figure([go.Heatmap(z=np.arange(12.0).reshape(3, 4) * number), go.Scatter(y=[1, None, 3], name=name)])
    return fig.update_layout(title=name, width=700, annotations=[{"text": "Plotly.newPlot(\"x\", [1])"}])


def kinds(folder):
    return sorted(path.suffix for path in folder.iterdir() if not path.name.startswith("."))


def test_a_figure_is_read_back_from_its_html(tmp_path):
    fig = some_figure()
    pictures.write_html(fig, tmp_path / "a.html")
    assert pictures.figure_of(tmp_path / "a.html") == json.loads(fig.to_json())
    old = go.Figure(go.Scatter(y=[2]))  # as files of before were written
    (tmp_path / "b.html").write_text(old.to_html(include_plotlyjs=True, full_html=True))
    assert pictures.figure_of(tmp_path / "b.html") == json.loads(old.to_json())
    (tmp_path / "c.html").write_text("<html></html>")
    with pytest.raises(runs.RunError, match="c.html: holds no figure"):
        pictures.figure_of(tmp_path / "c.html")


def test_pictures_go_when_their_figure_changes_and_stay_when_it_is_the_same(tmp_path):
    file = tmp_path / "a.html"
    pictures.write_html(some_figure(), file)
    for kind in pictures.KINDS:
        file.with_suffix(f".{kind}").write_bytes(b"picture")
    written = file.stat().st_mtime_ns
    pictures.write_html(some_figure(), file)
    assert file.stat().st_mtime_ns == written and pictures.undrawn([file]) == []
    pictures.write_html(some_figure(2), file)
    assert kinds(tmp_path) == [".html"] and pictures.undrawn([file]) == [file]


def test_many_figures_are_drawn_by_one_browser(tmp_path, chrome):
    files = [tmp_path / f"{number}.html" for number in range(11)]
    for number, file in enumerate(files):
        pictures.write_html(some_figure(number), file)
    assert pictures.draw(files) is None
    assert chrome.starts == 1 and len(chrome.asked) == 33 and pictures.undrawn(files) == []
    assert chrome.asked[3]["data"] == json.loads(some_figure(1).to_json())["data"]
    files[4].with_suffix(".svg").unlink()
    assert pictures.draw(pictures.undrawn(files)) is None and len(chrome.asked) == 36
    assert pictures.draw([]) is None and chrome.starts == 2


def test_a_browser_that_draws_nothing_is_asked_once(tmp_path, chrome):
    chrome.draws = False
    files = [tmp_path / f"{number}.html" for number in range(11)]
    for file in files:
        pictures.write_html(some_figure(), file)
    assert pictures.draw(files) == "PNG skipped: /a/chrome did not draw (RuntimeError: no tab)"
    assert len(chrome.asked) == 3 * pictures.AT_ONCE and pictures.undrawn(files) == files


def test_a_damaged_file_costs_no_other_its_pictures(tmp_path, chrome):
    files = [tmp_path / f"{number}.html" for number in range(9)]
    for file in files:
        pictures.write_html(some_figure(), file)
    for file in files[:4]:
        file.write_text("cut")
    assert "0.html: holds no figure" in pictures.draw(files)
    assert pictures.undrawn(files) == files[:4]


def test_a_figure_written_while_it_is_drawn_gets_no_picture_of_what_it_was(tmp_path, chrome, monkeypatch):
    file, draws = tmp_path / "a.html", chrome.write_fig_from_object
    pictures.write_html(some_figure(), file)

    async def meanwhile(self, jobs):
        pictures.write_html(some_figure(2), file)
        return await draws(self, jobs)
    monkeypatch.setattr(chrome, "write_fig_from_object", meanwhile)
    assert pictures.draw([file]) is None and kinds(tmp_path) == [".html"]


@pytest.fixture
def page(monkeypatch):
    """What a notebook displays, as its outputs."""
    outputs = []

    def display(shown, metadata=None):
        picture = isinstance(shown, show.Image)
        data = {"image/png": base64.b64encode(shown.data).decode()} if picture else {"text/html": shown.data}
        outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata or {}))
    monkeypatch.setattr(show, "display", display)
    monkeypatch.setattr(show, "_page", show._Page())
    return outputs


def saved(outputs, file):
    cell = nbformat.v4.new_code_cell("show", outputs=outputs)
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)


def held(file):
    return nbformat.read(file, as_version=4).cells[0].outputs


def test_notebooks_of_a_batch_engine_leave_pictures_to_the_end(elsewhere, chrome, page, monkeypatch, capsys):
    """One browser for two notebooks; pictures then stand where they stood when each notebook drew its own."""
    monkeypatch.setenv(presence.ENGINE, str(os.getpid()))
    for name in ("s/m-a-s1", "s/m-b-s1"):
        monkeypatch.setattr(show, "_page", show._Page())
        show.figures({"one": some_figure(1), "two": some_figure(2)}, folder=elsewhere / "runs" / name / "figures",
                     mode="batch")
        saved(page, elsewhere / "runs" / name / "notebooks/02_train_variant.ipynb")
        assert ["plotly-graph-div" in output.data["text/html"] for output in page] == [False, True, True]
        page.clear()
    assert chrome.starts == 0
    assert executed.draw("s") == 0 and chrome.starts == 1
    assert "4 figures, 4 to draw" in (said := capsys.readouterr().out) and "4 drawn, 4 put into" in said
    for name in ("s/m-a-s1", "s/m-b-s1"):
        outputs = held(elsewhere / "runs" / name / "notebooks/02_train_variant.ipynb")
        assert [list(output.data)[0] for output in outputs] == ["image/png"] * 2
        assert outputs[0].metadata == {"image/png": {"width": 700}}
        assert PIL.Image.open(io.BytesIO(base64.b64decode(outputs[0].data["image/png"]))).size == (40, 30)
    assert executed.draw("s") == 0 and chrome.starts == 1, "nothing is left to draw"


def test_what_was_not_drawn_stays_a_figure_that_finds_plotly(elsewhere, page, monkeypatch, chrome):
    monkeypatch.setenv(presence.ENGINE, str(os.getpid()))
    folder, book = elsewhere / "runs/s/compare/figures", elsewhere / "runs/s/compare/05_compare.ipynb"
    show.figures({"one": some_figure(1), "two": some_figure(2)}, folder=folder, mode="batch")
    saved(page, book)
    (folder / "two.png").write_bytes(png())
    assert executed.fill_in(book) == 1
    assert [list(output.data)[0] for output in held(book)] == ["text/html", "text/html", "image/png"]
    (folder / "one.png").write_bytes(png())
    assert executed.fill_in(book) == 1 and executed.fill_in(book) == 0
    assert [list(output.data)[0] for output in held(book)] == ["image/png", "image/png"]


def test_without_an_engine_a_batch_draws_at_once(elsewhere, page, chrome):
    show.figures({"one": some_figure()}, folder=elsewhere / "figures", mode="batch")
    assert chrome.starts == 1 and list(page[0].data) == ["image/png"]


def test_a_damaged_notebook_is_named_and_the_others_are_filled_in(elsewhere, page, chrome, monkeypatch, capsys):
    monkeypatch.setenv(presence.ENGINE, str(os.getpid()))
    show.figures({"one": some_figure()}, folder=elsewhere / "runs/s/compare/figures", mode="batch")
    saved(page, elsewhere / "runs/s/compare/05_compare.ipynb")
    (elsewhere / "runs/s/compare/04.ipynb").write_text("{cut")
    assert executed.draw("s") == 0
    said = capsys.readouterr().out
    assert "04.ipynb: not filled in" in said and "1 drawn, 1 put into" in said


def test_the_command_names_what_is_not_there(elsewhere):
    code = subprocess.run([sys.executable, "-m", "sae_lib", "pictures", "nothing"], capture_output=True, text=True)
    assert code.returncode == 2 and "runs/nothing: not there" in code.stderr


class Events:
    def __init__(self):
        self.calls = {}

    def register(self, name, call):
        self.calls[name] = call


@pytest.fixture
def kernel(monkeypatch):
    events = Events()
    monkeypatch.setattr(later, "REST", 0.3)
    monkeypatch.setattr(later.atexit, "register", lambda call: None)
    shell = type("Shell", (), {"events": events})()
    monkeypatch.setattr(show, "get_ipython", lambda: shell)
    show._later.cache_clear()
    yield events
    show._later.cache_clear()


def wait(done, seconds=20):
    began = time.monotonic()
    while not done() and time.monotonic() - began < seconds:
        time.sleep(0.05)
    return done()


def test_a_person_s_files_are_written_when_the_kernel_rests(tmp_path, kernel, chrome, monkeypatch):
    """No cell waits for them: while one runs, nothing is written; the browser starts once, for all."""
    monkeypatch.setattr(show, "display", lambda fig: None)
    files = [tmp_path / f"{name}.html" for name in "abc"]
    for file in files:
        show.figure(some_figure(), file.stem, folder=tmp_path, mode="live")
        kernel.calls["post_run_cell"]()
        kernel.calls["pre_run_cell"]()
    assert not wait(lambda: kinds(tmp_path), seconds=1)
    kernel.calls["post_run_cell"]()
    assert wait(lambda: not pictures.undrawn(files)) and chrome.starts == 1
    kernel.calls["pre_run_cell"]()
    show.figure(some_figure(2), "a", folder=tmp_path, mode="live")
    kernel.calls["post_run_cell"]()
    assert wait(lambda: chrome.starts == 2 and not pictures.undrawn(files))
    assert pictures.figure_of(files[0]) == json.loads(some_figure(2).to_json())


def test_a_kernel_that_ends_writes_its_html(tmp_path, kernel, monkeypatch, capsys):
    monkeypatch.setattr(show, "display", lambda fig: None)
    for name in "ab":
        show.figure(some_figure(), name, folder=tmp_path, mode="live")
    show._later(show.get_ipython()).write()
    assert kinds(tmp_path) == [".html", ".html"]
    assert capsys.readouterr().err.count("PNG skipped") == 1, "the page says once that it has no pictures"
