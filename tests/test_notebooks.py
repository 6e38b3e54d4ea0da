"""Every notebook under papermill on the tiny model: good runs and bad ones, each named for what it is."""

import kept_kernel
import nbformat
import pandas as pd
import papermill
import pytest

from sae_lib import params, runs

SMALL = {"d_sae": 256, "k": 8, "samples": 60_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 10,
         "dead_after": 20_000, "threads": 1, "eval_preset": "smoke"}
RUNS = {
    "trial/topk-s1": {},
    "trial/progressive_orthogonality-s1": {"ingredients": [{"name": "progressive_orthogonality", "weight": 0.05}]},
    "trial/dead-s1": {"architecture": "standard", "l1": 3000.0, "l1_warmup": 0.0, "lr": 0.02},
    "trial/untrained-s1": {"stop_after_steps": 0},
    "trial/dense-s1": {"architecture": "standard", "l1": 0.0},
}


def execute(name, folder, home, **values):
    """Run a notebook as a user would from the shell; return all text that its page shows."""
    model = params.load_yaml(runs.project() / "params/models/tiny.yaml")
    declared = papermill.inspect_notebook(str(runs.project() / f"notebooks/{name}.ipynb"))
    values = {key: value for key, value in {**model, **SMALL, **values}.items() if key in declared}
    out = folder / f"{name}.ipynb"
    kept_kernel.execute(name, out, home, values)
    return page(out)


def page(path):
    """All text of an executed notebook's outputs."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts += [output.get("text", ""), *(data.get(kind, "") for kind in ("text/markdown", "text/html"))]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def workbook(tmp_path_factory):
    """A home with a store and every run of RUNS trained and evaluated; the pages by run and notebook."""
    home, patch = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    patch.setenv("SAE_WORKBOOK_HOME", str(home))
    pages = {("", "01"): execute("01_extract", home, home)}
    for run, values in RUNS.items():
        pages[run, "02"] = execute("02_train_variant", home, home, run=run, **values)
        pages[run, "03"] = execute("03_eval", home, home, run=run)
    pages["", "05"] = execute("05_compare", home, home, study="trial", baseline="topk")
    yield home, pages
    patch.undo()


def verdict(home, run):
    return runs.read_json(home / "runs" / run / "validity.json")


def test_the_page_of_01_shows_what_was_extracted(workbook):
    home, pages = workbook
    store = next((home / "activations").glob("*/manifest.json")).parent
    assert (store / "figures/norm_histogram.html").exists()
    assert "has the first letter" in pages["", "01"]


@pytest.mark.parametrize("run", ["trial/topk-s1", "trial/progressive_orthogonality-s1"])
def test_good_runs_are_valid_and_leave_everything(workbook, run):
    home, pages = workbook
    assert verdict(home, run)["status"] == "valid", verdict(home, run)
    assert verdict(home, run)["checked"] == ["training", "core"]
    for name in ("params.yaml", "provenance.json", "history.parquet", "training.json", "evals/core.json",
                 "sae/cfg.json", "figures/training_curves.html", "figures/schedules.html"):
        assert (home / "runs" / run / name).exists(), name
    assert "**valid**" in pages[run, "02"] and "**valid**" in pages[run, "03"]
    assert "Cross-entropy recovered" in pages[run, "03"]
    core = runs.read_json(home / "runs" / run / "evals/core.json")
    assert core["provenance"]["packages"]["sae-bench"] == "0.6.0"


@pytest.mark.parametrize("run, word", [("trial/dead-s1", "mean L0 is 0.0"),
                                       ("trial/untrained-s1", "never trained: 0 steps")])
def test_bad_runs_are_named_for_what_they_are_in_02_03_and_05(workbook, run, word):
    home, pages = workbook
    assert verdict(home, run)["status"] == "invalid"
    for number in ("02", "03"):
        assert "**invalid**" in pages[run, number] and word in pages[run, number], number
    table = pd.read_csv(home / "runs/trial/compare/table.csv").set_index("run")
    assert table.loc[run, "status"] == "invalid" and word in table.loc[run, "reasons"]
    assert word in pages["", "05"]


def test_a_code_that_is_not_sparse_is_flagged_in_02_03_and_05(workbook):
    home, pages = workbook
    flags = verdict(home, "trial/dense-s1")["flags"]
    assert flags and flags[0].startswith("not sparse: L0")
    assert all("not sparse" in pages["trial/dense-s1", number] for number in ("02", "03"))
    assert "not sparse" in pages["", "05"]


def test_nan_weights_are_invalid_and_not_evaluated(workbook):
    """Weights that became NaN: 02 says so, 03 measures nothing, 05 greys it."""
    home, _ = workbook
    text = execute("02_train_variant", home, home, run="trial/nan-s1", lr=1e30)
    assert "**invalid**" in text and "not finite" in text
    text = execute("03_eval", home, home, run="trial/nan-s1")
    assert "not evaluated" in text and "**invalid**" in text
    assert not (home / "runs/trial/nan-s1/evals/core.json").exists()
    assert "not finite" in execute("05_compare", home, home, study="trial", baseline="topk")


def test_the_comparison_keeps_invalid_figures_out(workbook):
    home, pages = workbook
    folder = home / "runs/trial/compare"
    for name in ("comparison_table", "training_curves_by_run", "final_losses", "compression_panels"):
        text = (folder / f"figures/{name}.html").read_text()
        assert "<script src=" not in text and "cdn.plot.ly" not in text.split("</script>")[-2]
    differences = pd.read_csv(folder / "differences.csv")
    assert set(differences.variant) == {"progressive_orthogonality"}
    assert differences.claim.str.startswith("no claim possible: 1 paired seed").all()
    assert "L0" in pages["", "05"]


def test_a_person_is_shown_figures_to_move_and_files_are_written_all_the_same(workbook):
    """mode: live displays plotly figures and dashboards instead of pictures."""
    home, _ = workbook
    execute("05_compare", home, home, study="trial", mode="live")
    outputs = [output for cell in nbformat.read(home / "05_compare.ipynb", as_version=4).cells
               for output in cell.get("outputs", [])]
    shown = sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    boards = sum("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    parts = ("compare_explore", "curves_curves", "coactivation_overview", "coactivation_block")
    files = {path.stem for path in home.glob("runs/trial/compare/figures/*.html")}
    assert boards == 3 and files.issuperset(parts) and shown == len(files) - len(parts) == 11
    assert not any("image/png" in output.get("data", {}) for output in outputs)


def test_a_misspelt_parameter_stops_the_notebook_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'kk'; did you mean 'k'"):
        kept_kernel.execute("02_train_variant", tmp_path / "out.ipynb", tmp_path, {"kk": 64})
    assert not (tmp_path / "runs").exists()
