"""The dashboards in JupyterLab and a real Chromium: every control is moved, and the figures' data answer.

On runs of the model ``tiny`` made on the spot; with $WORKBOOK_BROWSER_STUDY (a study's folder under a home's runs/) on
its runs, as CI does with the embedded default. Screenshots go to $WORKBOOK_SHOTS.
"""

import os
import re
from pathlib import Path

import lab as labs
import pandas as pd
import pytest

from sae_lib import params, runs

pytestmark = [pytest.mark.skipif(labs.CHROME is None, reason="no Chromium (or playwright): dashboards not tried in "
                                 "a browser"), pytest.mark.timeout(600)]
MEASURES = ("count", "rate", "Jaccard", "lift", "decoder cosine", "stability")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(home, runs of a study): of $WORKBOOK_BROWSER_STUDY, or made here."""
    given, patch = os.environ.get("WORKBOOK_BROWSER_STUDY"), pytest.MonkeyPatch()
    home = Path(given).resolve().parents[1] if given else tmp_path_factory.mktemp("home")
    patch.setenv("SAE_WORKBOOK_HOME", str(home))
    names = [f"{Path(given).name}/{path.parent.name}" for path in sorted(Path(given).glob("*/params.yaml"))] if given \
        else _made(home)
    yield home, [name for name in names if runs.Run(name).json("validity.json")["status"] == "valid"]
    patch.undo()


def _made(home):
    """Two small runs, by the functions that the notebooks call."""
    from test_notebooks import SMALL

    from sae_lib.data import activations
    from sae_lib.evaluation import evaluate, latents, letters
    from sae_lib.training import trainer

    model = params.load_yaml(runs.project() / "params/models/tiny.yaml")

    def asked(stage, **values):
        names = params.STAGES[stage].model_fields
        return params.check(stage, {key: value for key, value in {**model, **SMALL, **values}.items() if key in names},
                            "test_browser")
    found = {"trial/topk-s1": {}, "trial/topk-s2": {"d_sae": 512, "seed": 2}}
    few = {"absorption_preset": "smoke", "absorption_words_per_letter": 60}
    activations.extract(asked("extract"))
    for name, values in found.items():
        p = asked("train", run=name, **values)
        run, source = runs.start(p), activations.source(p)
        trainer.train(p, source, run)
        latents.record(run, source)
        evaluate.evaluate(asked("eval", run=name, nulls=[], **values))
        letters.evaluate(asked("letters", run=name, nulls=[], **few, **values))
    return list(found)


@pytest.fixture(scope="module")
def lab(study, tmp_path_factory):
    """JupyterLab beside the study's home."""
    from playwright.sync_api import sync_playwright

    root = tmp_path_factory.mktemp("lab")
    with sync_playwright() as playwright:
        opened = labs.Lab(root, playwright, Path(os.environ.get("WORKBOOK_SHOTS", root / "shots")))
        yield opened
        opened.close()


def test_the_latent_inspector(lab, study):
    lab.open("latents", ["from sae_lib.views import dashboards", f"dashboards.latents({study[1][0]!r}).widget"])
    before = lab.state("Latent ")
    assert [trace["type"] for trace in before["data"]].count("bar") == 4 and sum(before["data"][0]["y"]) > 0
    number = lab.control("latent")
    number.fill("3")
    number.press("Enter")
    after = lab.changed("Latent ", before)
    assert after["title"].startswith("Latent 3:")
    lab.control("log tokens").click()
    assert lab.changed("Latent ", after)["axes"]["yaxis"]["type"] == "log"
    contexts = lab.page.locator(".contexts table").inner_text()
    lab.choose("contexts", "over the range")
    lab.page.wait_for_function("t => document.querySelector('.contexts table').innerText !== t", arg=contexts)
    neighbour = lab.state("Latent 3:")["data"][-2]["y"][-1]
    lab.click_point("Latent 3:", len(after["data"]) - 2, len(after["data"][-2]["y"]) - 1)
    lab.plot(f"Latent {neighbour}:")
    table(lab)
    lab.shot("latents")
    lab.clean()


def table(lab):
    """Sort, search and filter the table of latents, and open the row that is clicked."""
    page = lab.page
    rows = page.locator("table.dataTable tbody tr")
    head = page.locator("table.dataTable thead th", has_text="density %").first.get_by_role("button")
    for order in ("ascending", "descending"):
        head.click()
        page.locator(f"table.dataTable thead th[aria-sort={order}]").first.wait_for()
    shown = [float(text) for text in page.locator("table.dataTable tbody tr td:nth-child(2)").all_inner_texts()]
    assert len(shown) > 3 and shown == sorted(shown, reverse=True) and shown[0] > 0
    wanted = rows.first.locator("td").first.inner_text()
    rows.first.click()
    lab.plot(f"Latent {wanted}:")
    word = rows.first.locator("td").nth(6).inner_text().split()[0]
    page.locator(".dt-search input").fill(word)
    page.wait_for_function("word => [...document.querySelectorAll('table.dataTable tbody tr')].every("
                           "row => row.innerText.toLowerCase().includes(word))", arg=word.lower())
    page.locator(".dt-search input").fill("")
    page.locator(".dtsb-add").first.click()
    page.locator("select.dtsb-data").select_option(label="density %")
    page.locator("select.dtsb-condition").select_option(label="Greater Than")
    page.locator("input.dtsb-value").fill(str(shown[3]))
    page.wait_for_function("top => [...document.querySelectorAll('table.dataTable tbody td:nth-child(2)')].every("
                           "cell => Number(cell.innerText) > top)", arg=shown[3])


def test_co_activation(lab, study):
    name, other = study[1][:2]
    lab.open("pairs", ["from sae_lib.views import dashboards", f"dashboards.coactivation({name!r}).widget"])
    block, whole = " around latent ", " of all pairs"
    state = lab.state("Jaccard of all pairs")
    assert state["data"][0]["rows"] == state["data"][0]["width"] > 100
    for measure in MEASURES[:2] + MEASURES[3:]:
        lab.choose("measure", measure)
        title = measure[0].upper() + measure[1:]
        assert lab.state(title + whole)["data"][0]["sum"] != 0
        assert lab.state(title + block)["data"][0]["rows"] > 2
    lab.choose("measure", "Jaccard")
    before = lab.state("Jaccard of all pairs")
    handle = lab.control("snapshot")
    handle.focus()
    lab.page.keyboard.press("ArrowLeft")
    before = lab.changed("Jaccard of all pairs", before)
    lab.choose("order by", "number")
    before = lab.changed("Jaccard of all pairs", before)
    assert before["axes"]["xaxis"]["title"] == "Latent"
    near = lab.state("Jaccard" + block)
    lab.choose("block of", "32")
    near = lab.changed("Jaccard" + block, near)
    assert near["data"][0]["rows"] <= 32 and len(near["data"][1]["x"]) == near["data"][0]["rows"]
    number = lab.control("latent")
    number.fill("7")
    number.press("Enter")
    assert lab.changed("Jaccard" + block, near)["title"].startswith("Jaccard around latent 7")
    lab.click_point("Jaccard of all pairs", 0, 40)
    lab.page.wait_for_function("f => !eval(f)('Jaccard around latent 7:')", arg=labs.FIND)
    near = lab.state("Jaccard around latent ")
    lab.choose("less that of", other)
    assert f"less that of {other}" in lab.changed("Jaccard around latent ", near)["title"]
    lab.choose("less that of", "no other run")
    lab.page.wait_for_function("f => !(eval(f)('Jaccard around latent') || {_fullLayout: {title: {text: 'less'}}})"
                               "._fullLayout.title.text.includes('less')", arg=labs.FIND)
    lab.click_point("Jaccard around latent ", 1, 1)
    chosen = re.search(r"latent (\d+)", lab.plot("Latent ").evaluate("e => e._fullLayout.title.text"), re.I)[1]
    lab.plot(f"Jaccard around latent {chosen}")
    lab.page.get_by_role("button", name="inspect latent").click()
    lab.shot("coactivation")
    lab.clean()


def test_feature_splits(lab, study):
    name = next(name for name in study[1] if (runs.Run(name).path / "evals/absorption_letters.parquet").exists())
    lab.open("splits", ["from sae_lib.views import dashboards", f"dashboards.splits({name!r}).widget"])
    state = lab.state("Letter ")
    assert len(state["data"][0]["y"]) >= 3 and max(state["data"][3]["x"]) > 0.05 and state["data"][4]["rows"] > 1
    options = lab.control("letter").locator("option").all_inner_texts()
    letter = next(text for text in options if not state["title"].startswith(f"Letter {text.upper()}"))
    lab.choose("letter", letter)
    after = lab.state(f"Letter {letter.upper()}")
    assert after["data"][0]["y"] != state["data"][0]["y"]
    assert {after["axes"][name]["type"] for name in ("yaxis2", "xaxis3", "yaxis3")} == {"category"}
    lab.page.get_by_text(f"Words in {letter.upper()} on which latent").wait_for()  # drawn after the figure above it
    lab.choose("in run", "no other run")
    lab.page.get_by_text("choose another run of this model").wait_for()
    other = next(text for text in lab.control("in run").locator("option").all_inner_texts() if "/" in text)
    lab.choose("in run", other)
    assert other in lab.state("Latent ")["title"]
    number = lab.control("latent")
    number.fill("5")
    number.press("Enter")
    assert max(lab.state("Latent 5 ")["data"][0]["y"]) > 0
    lab.page.get_by_role("button", name="inspect latent").click()
    lab.plot("Latent 5: ")
    lab.shot("splits")
    lab.clean()


def test_training_curves_of_a_run(lab, study):
    lab.open("curves", ["from sae_lib.views import dashboards", f"dashboards.curves({study[1][0]!r}).widget"])
    before = lab.state("Training curves")
    assert before["axes"]["yaxis"]["type"] == "log" and len(before["data"][0]["y"]) > 20
    lab.control("log losses and shares").click()
    before = lab.changed("Training curves", before)
    assert before["axes"]["yaxis"]["type"] == "linear"
    lab.choose("along", "samples")
    before = lab.changed("Training curves", before)
    assert before["axes"]["xaxis5"]["title"] == "Training samples"
    lab.control("smoothing").focus()
    lab.page.keyboard.press("End")
    after = lab.changed("Training curves", before)
    roughness = [sum(abs(b - a) for a, b in zip(s["data"][0]["y"], s["data"][0]["y"][1:])) for s in (before, after)]
    assert roughness[1] < roughness[0]
    lab.shot("curves")
    lab.clean()


@pytest.fixture
def compared(study):
    """Cells that show 05's dashboards."""
    folder, _, _ = study[1][0].rpartition("/")
    return ["from sae_lib import params", "from sae_lib.evaluation import compare",
            "from sae_lib.views import dashboards",
            f"held = compare.compare(params.check('compare', {{'study': {folder!r}, 'mode': 'live'}}))"]


def test_curves_by_run(lab, study, compared):
    lab.open("byrun", [*compared, "dashboards.curves_by_run(held, 'note').widget"])
    before = lab.state("Training curves")
    lab.control("show").select_option(label=["L0", "Loss: reconstruction"])
    before = lab.changed("Training curves", before)
    assert set(before["axes"]) == {"xaxis", "yaxis", "xaxis2", "yaxis2"}
    for label in ("seeds as bands", "log losses and shares"):
        lab.control(label).click()
        before = lab.changed("Training curves", before)
    lab.choose("along", "step")
    before = lab.changed("Training curves", before)
    lab.control("smoothing").focus()
    lab.page.keyboard.press("ArrowRight")
    lab.changed("Training curves", before)
    lab.shot("curves_by_run")
    lab.clean()


def test_compare_and_the_way_into_a_run(lab, study, compared):
    lab.open("compare", [*compared, "dashboards.compare(held).widget"])
    before = lab.state("Explained variance against L0")
    marks = sum(len(trace["x"] or []) for trace in before["data"] if trace["name"] != "set apart")
    assert marks >= 1
    lab.choose("up", "Squared error (lower is better)")
    before = lab.state("Squared error against L0")
    lab.choose("along", "Width F")
    before = lab.state("Squared error against Width F")
    lab.control("log axis").click()
    before = lab.changed("Squared error", before)
    assert before["axes"]["xaxis"]["type"] == "log"
    lab.control("runs set apart").click()
    lab.click_point("Squared error", 0, 0)
    lab.page.get_by_role("tab", name="co-activation").wait_for()
    assert lab.state("Latent ")["data"]
    lab.page.get_by_role("tab", name="co-activation").click()
    lab.plot("Jaccard of all pairs")
    lab.page.get_by_role("tab", name="training curves").click()
    lab.plot("Training curves")
    lab.page.get_by_role("tab", name="feature splits").click()
    tables = [runs.Run(name).path / "evals/absorption_letters.parquet" for name in study[1]]
    judged = [frame.letter[frame.kept] for frame in map(pd.read_parquet, filter(Path.exists, tables))]
    if judged:
        lab.state("Full absorption by letter")
        lab.choose("letters", "absorption fraction")
        cells = lab.state("Absorption fraction by letter")["data"][0]
        assert cells["rows"] >= 1 and cells["width"] >= 20
        lab.choose("letters", "split latents")
        letter = min(set.intersection(*map(set, judged)))
        column = lab.state("Split latents by letter")["data"][0]["x"].index(letter)
        lab.click_point("Split latents by letter", 0, column)
        lab.plot(f"Letter {letter.upper()}")
    lab.choose("open run", "no run")
    lab.shot("compare")
    lab.clean()


WAITING = """
import importlib, os, pathlib, time
os.environ["SAE_WORKBOOK_HOME"] = {home!r}
from sae_lib.training.trainer import Trainer
curves = importlib.import_module("sae_lib.views.dashboards.curves")  # the package has a function of this name

def one_step(self, batch, log=False, step=Trainer.one_step):
    time.sleep(0.01)
    while 3 * self.step > 2 * self.total_steps and not pathlib.Path({seen!r}).exists():
        time.sleep(0.05)
    return step(self, batch, log)
Trainer.one_step = one_step
curves.BUDGET, curves.EVERY = 1e9, 0.3  # drawing may take all of the time
del curves
"""
"""The first cell of 02 in a browser: training slower, and no further than two thirds until there is a file."""


def test_curves_grow_while_02_trains(lab, study, tmp_path_factory):
    """02 itself, in JupyterLab: the curves have part of their points before training has ended, all of them after.

    Training waits at two thirds until the test has seen them, and drawing may take all of the time here.
    """
    import nbformat

    home = tmp_path_factory.mktemp("live")
    given = params.load_yaml(runs.project() / "params/models/tiny.yaml") | {
        "run": "live/topk-s1", "mode": "live", "d_sae": 256, "k": 8, "samples": 150_000, "batch_size": 256,
        "lr": 2e-3, "warmup_steps": 10, "threads": 1, "checkpoint_every": 0}
    cells = [WAITING.format(home=str(home), seen=str(home / "seen"))]
    for number, stage in (("01_extract", "extract"), ("02_train_variant", "train")):
        names = params.STAGES[stage].model_fields
        held = nbformat.read(runs.project() / f"notebooks/{number}.ipynb", as_version=4).cells
        code = [cell.source for cell in held if cell.cell_type == "code"]
        cells += [code[0] + "\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items() if k in names), *code[1:]]
    lab.open("live", cells, wait=False, own_kernel=True)
    lab.page.wait_for_function("""f => { const e = eval(f)('Training curves'); return e && e._fullData.length &&
      e._fullData[0].x && e._fullData[0].x.length > 3 }""", arg=labs.FIND, timeout=180_000)
    early = len(lab.state("Training curves")["data"][0]["x"])
    assert not (home / "runs/live/topk-s1/training.json").exists()
    (home / "seen").touch()
    lab.page.wait_for_function("() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => "
                               "p.textContent.includes('*') || p.textContent === '[ ]:')", timeout=240_000)
    late = len(lab.state("Training curves: live/topk-s1")["data"][0]["x"])
    assert 3 < early < late and late >= 100
    lab.plot("Latent ")
    lab.plot("Jaccard of all pairs")
    lab.shot("live")
    lab.clean()


def test_a_shared_figure_draws_with_the_network_cut(lab, study, tmp_path):
    from sae_lib.views import dashboards, show

    figures = dashboards.coactivation(study[1][0]).figures()
    show.write(figures, tmp_path)
    page = lab.browser.new_page()
    page.context.set_offline(True)
    for name in figures:
        page.goto((tmp_path / f"{name}.html").as_uri())
        page.wait_for_function("() => { const e = document.querySelector('.js-plotly-plot'); "
                               "return e && e._fullData[0].z.length > 2 && e.querySelector('image, .hm') }")
    page.close()
