"""Faults inside evaluations, injected: each is a failure with its reason in the table, never a hole or a zero."""

import json
import math
import re
from pathlib import Path

import kept_kernel
import pandas as pd
import papermill
import pytest
import torch
from safetensors.torch import save_file

from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.evaluation import evaluate, faults, letters, results, validity
from sae_lib.evaluation.saebench import absorption as bench
from sae_lib.training import trainer
from sae_lib.views import figures_compare

SMALL = {"d_sae": 192, "k": 8, "samples": 30_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 10,
         "dead_after": 20_000, "threads": 1}
VALUES = {"run": "faults/one-s1", "threads": 1, "mode": "batch", "device": "cpu", "nulls": []}
EVALS = ["core", "sparse_probing", "scr", "tpp"]


@pytest.fixture(scope="module")
def run(tiny, tiny_store):
    """A trained run with every evaluation done once, so that only the faults are new."""
    for name, seed in (("faults/one-s1", 1), ("faults/other-s2", 2)):
        p = params.check("train", tiny().model_dump() | SMALL | {"run": name, "seed": seed})
        trainer.train(p, activations.source(p), runs.start(p))
    found = measure()
    assert not any(map(faults.reason, found.values())) and judged()["status"] == "valid"
    return runs.Run("faults/one-s1")


def measure(evals=EVALS, **changes):
    return evaluate.evaluate(params.check("eval", VALUES | {"evals": evals, "eval_preset": "smoke"} | changes))


def measure_letters(**changes):
    return letters.evaluate(params.check("letters", VALUES | {"absorption_preset": "smoke"} | changes))


def judged():
    return runs.Run("faults/one-s1").json("validity.json")


def modules():
    from sae_bench.evals.absorption import main as absorption_main
    from sae_bench.evals.core import main as core_main
    from sae_bench.evals.scr_and_tpp import main as scr_main
    from sae_bench.evals.sparse_probing import main as probing_main

    return {"core": core_main, "sparse_probing": probing_main, "scr": scr_main, "tpp": scr_main,
            "absorption": absorption_main}


def broken(*_args, **_options):
    raise ValueError("broken inside")


def seen_in_the_table(name, *words):
    """The way to 05: the row's verdict and reason, no figure, the cell's word, and the picture."""
    table = results.compared(results.collect(["faults/one-s1"]), None)
    row = table.iloc[0]
    assert row.status == "failed" and row.reasons.startswith(f"{name}: ") and row[f"no_figure/{name}"]
    assert results.results(table).empty
    own = [metric for metric, of in results.EVALUATION.items() if of == name]
    assert own and table[own].isna().all(axis=None)
    page = figures_compare.readable(table).iloc[0]
    assert page.verdict == "failed" and all(word in page.reasons for word in words)
    assert "failed" in page.drop(["verdict", "reasons"]).tolist()
    drawn = re.sub(r"<br>", " ", str(figures_compare.comparison_table(table).data[0].cells["values"]))
    assert f"failed: {name}:" in drawn
    kept = results.masked(table)
    figures = [column for column in results.FIGURES if column in kept]
    assert kept[figures].isna().all(axis=None)


def in_json(change):
    """SAEBench's JSON is changed when it is read."""
    real = runs.read_json

    def read(path):
        found = real(path)
        if Path(path).name.endswith("_eval_results.json"):
            change(found)
        return found
    return read


INNER = {"core": "run_evals", "sparse_probing": "run_eval_single_sae", "scr": "run_eval_single_sae",
         "tpp": "run_eval_single_sae"}


@pytest.mark.parametrize("name", EVALS)
def test_an_exception_inside_fails_that_evaluation_alone(run, name, monkeypatch):
    module = modules()[name]
    if name == "tpp":  # SCR runs the same function
        real = module.run_eval_single_sae
        monkeypatch.setattr(module, "run_eval_single_sae", lambda config, *a, **o: real(config, *a, **o)
                            if config.perform_scr else broken())
    else:
        monkeypatch.setattr(module, INNER[name], broken)
    asked = EVALS if name in ("core", "tpp") else [name, "tpp"] if name == "sparse_probing" else ["core", name]
    found = measure(asked)
    assert set(found) == set(asked)
    held = json.loads((run.path / f"evals/{name}.json").read_text())
    assert held["status"] == "failed" and held["metrics"] == {} and "broken inside" in held["reason"]
    assert held["config"]["preset"] == "smoke" and "traceback" in held
    others = [other for other in asked if other != name and faults.reason(found[other])]
    assert others == ([] if name != "scr" else [])
    assert judged()["status"] == "failed" and judged()["reasons"][0].startswith(f"{name}: ")
    assert not (run.path / "evals/done.json").exists()
    with pytest.raises(runs.RunError, match=f"1 of {len(asked)} evaluations failed; {name}: .*broken inside"):
        faults.insist(found)
    seen_in_the_table(name, "broken inside")
    monkeypatch.undo()
    measure([name])
    assert judged()["status"] == "valid" and (run.path / "evals/done.json").exists()


@pytest.mark.parametrize("name", EVALS)
def test_no_json_is_a_failure(run, name, monkeypatch):
    module = modules()[name]
    if name == "core":
        monkeypatch.setattr(module, "save_single_eval_result", lambda *_a: None)
    else:
        monkeypatch.setattr(module, "run_eval", lambda *_a, **_o: print("nothing to do"))
        from sae_lib.evaluation.saebench import scr_tpp, sparse_probing

        for ours in (scr_tpp, sparse_probing):
            monkeypatch.setattr(ours, "mean_l0", lambda *_a: 1.0)
    found = measure([name])
    assert "gave no result" in found[name]["reason"]
    seen_in_the_table(name, "gave no result")
    monkeypatch.undo()
    measure([name])


@pytest.mark.parametrize("name, change, says", [
    ("sparse_probing", lambda raw: raw["eval_result_metrics"]["sae"].update(sae_top_1_test_accuracy=math.nan),
     "sae_top_1_test_accuracy is nan"),
    ("sparse_probing", lambda raw: raw["eval_result_metrics"]["sae"].update(sae_top_5_test_accuracy=None),
     "no sae_top_5_test_accuracy"),
    ("sparse_probing", lambda raw: raw["eval_config"].update(k_values=[1]), r"k_values \[1\] instead of \[1, 2, 5\]"),
    ("sparse_probing", lambda raw: raw.update(eval_result_details=[]), "gave nothing for tiny_letters"),
    ("scr", lambda raw: raw["eval_result_metrics"]["scr_metrics"].update(scr_metric_threshold_2=math.inf),
     "scr_metric_threshold_2 is inf"),
    ("scr", lambda raw: raw["eval_config"].update(train_set_size=7), "train_set_size 7 instead of 160"),
    ("tpp", lambda raw: raw["eval_result_metrics"]["tpp_metrics"].pop("tpp_threshold_2_total_metric"),
     "no tpp_threshold_2_total_metric"),
    ("core", lambda raw: raw["eval_config"].update(context_size=7), "context_size 7 instead of 32")])
def test_a_result_that_is_not_what_was_asked_for_is_a_failure(run, name, change, says, monkeypatch):
    monkeypatch.setattr(runs, "read_json", in_json(change))
    found = measure([name])
    monkeypatch.undo()
    assert re.search(says, found[name]["reason"])
    seen_in_the_table(name)
    measure([name])
    assert judged()["status"] == "valid"


def test_a_figure_of_core_that_is_no_number_is_named(run):
    report, training = run.json("evals/core.json"), run.json("training.json")
    report["metrics"]["cossim"] = None
    verdict = validity.judge(training, report)
    assert verdict.status == "invalid" and verdict.reasons == ["not finite: SAEBench core's cossim"]


def test_what_stops_all_of_them_leaves_no_older_figure(run, monkeypatch):
    monkeypatch.setattr(evaluate, "_loaded", broken)
    with pytest.raises(ValueError, match="broken inside"):
        measure()
    assert all(run.json(f"evals/{name}.json")["status"] == "failed" for name in EVALS)
    assert validity.update(run).status == "failed"  # also after 03's own words are overwritten
    seen_in_the_table("core", "broken inside")
    monkeypatch.undo()
    measure()
    assert judged()["status"] == "valid"


# -- absorption ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where, says", [
    ("run_k_sparse_probing_experiment", "ValueError: broken inside"),
    ("_aggregate_results_df", "ValueError: broken inside"), ("run_eval", "gave no result")])
def test_absorption_that_breaks_is_a_failure(run, where, says, monkeypatch):
    measure_letters()
    monkeypatch.setattr(modules()["absorption"], where, broken)
    if where == "run_eval":
        monkeypatch.setattr(bench, "_run", lambda *_a: (pd.DataFrame(), None, None, "nothing to do"))
    with pytest.raises((ValueError, runs.RunError)):
        measure_letters()
    assert says in run.json("evals/absorption.json")["reason"]
    assert not list(run.path.glob("evals/absorption*.parquet")) and not (run.path / "evals/letters_done.json").exists()
    seen_in_the_table("absorption", says)
    monkeypatch.undo()
    measure_letters()
    assert judged()["status"] == "valid"


def _drop_details(raw):
    raw["eval_result_details"] = [row for row in raw["eval_result_details"] if row["first_letter"] != "b"]


@pytest.mark.parametrize("change, says", [
    (_drop_details, "no result for the letters b"),
    (lambda raw: raw["eval_result_details"][1].update(full_absorption_rate=math.nan), "no result for the letters b"),
    (lambda raw: raw["eval_result_metrics"]["mean"].update(mean_full_absorption_score=math.nan),
     "mean_full_absorption_score is nan"),
    (lambda raw: raw["eval_config"].update(max_k_value=4), "max_k_value 4 instead of 3")])
def test_a_letter_or_a_figure_that_is_missing_is_a_failure(run, change, says, monkeypatch):
    monkeypatch.setattr(runs, "read_json", in_json(change))
    with pytest.raises(runs.RunError, match=says):
        measure_letters()
    monkeypatch.undo()
    seen_in_the_table("absorption", says)


def test_a_letter_that_saebench_loses_on_the_way_is_a_failure(run, monkeypatch):
    main = modules()["absorption"]
    real = main.run_feature_absortion_experiment

    def losing(**options):
        found = real(**options)
        return found[found.letter != "b"]
    monkeypatch.setattr(main, "run_feature_absortion_experiment", losing)
    with pytest.raises(runs.RunError, match="no result for the letters b"):
        measure_letters()


def test_too_few_letters_read_as_a_failure_in_the_table(run, monkeypatch):
    monkeypatch.setattr(bench, "PROBE_F1", 0.97)
    measure_letters()
    table = results.compared(results.collect(["faults/one-s1"]), None)
    page = figures_compare.readable(table).iloc[0]
    cell = next(value for name, value in page.items() if name.startswith("Full absorption"))
    assert page.verdict == "valid" and cell == "failed" and "SAEBench wants 20" in page["no absorption"]
    drawn = re.sub(r"<br>", " ", str(figures_compare.comparison_table(table).data[0].cells["values"]))
    assert "SAEBench wants 20" in drawn and "['failed']" in drawn
    monkeypatch.undo()
    measure_letters()


# -- what lies in the way ------------------------------------------------------------------------------------------

def test_a_stale_cache_is_not_read(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path))
    fresh = {name: one["metrics"] for name, one in measure().items()}
    measure_letters()
    absorbed = run.json("evals/absorption.json")["metrics"]
    files = sorted((tmp_path / "evaluation").glob("*.safetensors"))
    kinds = {re.sub(r"[0-9a-f]{24}", "*", file.stem) for file in files}
    assert kinds == {"*", "labelled-*", "letters-*", "probes-*"}
    for file in files:  # another's, well formed
        save_file({"rows train a": torch.ones(3)}, file, {"about": "{}", "made_for": "another"})
    again = measure()
    assert not any(one["model_reused"] for one in again.values())
    assert {name: one["metrics"] for name, one in again.items()} == fresh
    found = measure_letters()
    assert not found.report["words_reused"] and found.report["metrics"] == absorbed


def test_results_of_another_sae_or_seed_are_not_the_run_s(run):
    other = evaluate.evaluate(params.check("eval", VALUES | {
        "run": "faults/other-s2", "evals": ["tpp"], "eval_preset": "smoke"}))["tpp"]
    own = (run.path / "evals/tpp.json").read_text()
    runs.write_json(run.path / "evals/tpp.json", other)
    assert validity.update(run).reasons == ["evals/tpp.json is of another SAE than the run's"]
    assert results.collect([run.name]).status[0] == "failed"
    (run.path / "evals/tpp.json").write_text(own)
    assert validity.update(run).status == "valid"
    (run.path / "evals/tpp.json").unlink()
    assert "there is no evals/tpp.json" in results.collect([run.name]).reasons[0]
    (run.path / "evals/tpp.json").write_text(own[:100])
    assert "tpp.json: damaged JSON" in results.collect([run.name]).reasons[0]
    (run.path / "evals/tpp.json").write_text(own)


def test_03_shows_what_is_there_and_ends_with_an_error(run, tiny_store, tmp_path):
    from test_notebooks import page

    # A file of SAEBench's own settings that cannot be: text is too short for any block of this context.
    values = {"run": run.name, "evals": ["core", "tpp"], "eval_preset": "smoke", "mode": "batch", "device": "cpu",
              "threads": 1}
    texts = tiny_store.path / "heldout.jsonl"
    held = texts.read_bytes()
    texts.write_text("")
    try:
        with pytest.raises(papermill.PapermillExecutionError, match="1 of 2 evaluations failed; core: "):
            kept_kernel.execute("03_eval", tmp_path / "03.ipynb", tmp_path, values)
    finally:
        texts.write_bytes(held)
    text = page(tmp_path / "03.ipynb")
    assert "**failed** – core: " in text and "Targeted probe perturbation" in text
    assert judged()["status"] == "failed"
    measure(["core", "tpp"])
    assert judged()["status"] == "valid"
