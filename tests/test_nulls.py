"""Null baselines: what they are, that they are measured once, and where their figures go and do not go."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from synthetic import Planted

from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.evaluation import compare, embedded_nulls, evaluate, null_saes, null_table, nulls, results, validity
from sae_lib.metrics import METRICS, explained_variance
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training import measure, trainer
from sae_lib.training.ingredients import load_sae
from sae_lib.views import beside_nulls, figures, figures_absorption, figures_compare, further

SMALL = {"d_sae": 192, "k": 8, "samples": 40_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 10,
         "dead_after": 20_000, "threads": 1}
ALL = list(null_saes.LABELS)


@pytest.fixture(scope="module")
def planted():
    """A source with a planted dictionary, its ground, and all of its training rows."""
    source = Planted()
    rows = next(iter(source.batches(source.n_train, source.n_train))).x
    return source, null_saes.ground(source), rows


def shaped(name="topk", k=4):
    """An SAE of 64 latents, of which a null takes the shape alone."""
    made = architectures.get(name)(k=k, threshold_start=0.3)
    return SparseAutoencoder.initialise(64, torch.zeros(32), made, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 4, 20])
def test_components_explain_what_their_eigenvalues_say(planted, k):
    source, held, rows = planted
    null = null_saes.make("pca", shaped(), k + 0.2, held)
    said = float(held.eigenvalues[:k].sum() / held.eigenvalues.sum())
    assert explained_variance(rows, null(rows)) == pytest.approx(said, abs=1e-5)
    exact = torch.linalg.svdvals((rows - rows.mean(0)).double()) ** 2
    assert said == pytest.approx(float(exact[:k].sum() / exact.sum()), abs=1e-5)
    codes = null.encode(rows)
    assert codes.shape[1] == k and (codes < 0).any() and (codes > 0).any()
    assert measure.heldout(null, source._batch(rows), 1.0)["l0"] == k


def test_the_residual_stream_in_place_of_itself_loses_nothing(planted):
    _, held, rows = planted
    null = null_saes.make("residual", shaped(), 4, held)
    assert torch.equal(null(rows), rows) and explained_variance(rows, null(rows)) == 1


@pytest.mark.parametrize("name", sorted(architectures.REGISTRY))
def test_nulls_are_as_sparse_as_the_run_in_every_architecture(planted, name):
    source, held, _ = planted
    for null in ("random", "untrained"):
        made = null_saes.make(null, shaped(name), 4.3, held)
        assert measure.heldout(made, source.heldout(), source.scale)["l0"] == pytest.approx(4, rel=0.1), null
        again = null_saes.make(null, shaped(name), 3.8, held)
        assert nulls.weights_digest(again) == nulls.weights_digest(made), "runs of nearly equal L0 share it"
    cosines = (made.W_enc * made.W_dec).sum(1)
    assert torch.allclose(cosines, torch.ones(64)), "training starts tied"
    random = null_saes.make("random", shaped(name), 4, held)
    assert float((random.W_enc * random.W_dec).sum(1).abs().mean()) < 0.3
    assert nulls.weights_digest(random) != nulls.weights_digest(made)


def test_a_dictionary_that_is_the_truth_is_above_all_of_them(planted):
    source, held, rows = planted
    truth = SparseAutoencoder(source.dictionary.clone(), torch.full((64,), -0.6), source.dictionary.clone(),
                              torch.full((32,), 0.3), architectures.get("standard")())
    found = {name: explained_variance(rows, null_saes.make(name, truth, 3, held)(rows))
             for name in ("random", "untrained", "pca")}
    assert found["random"] < 0 < found["untrained"] and max(found.values()) < explained_variance(rows, truth(rows))


@pytest.fixture(scope="module")
def evaluated(tiny, tiny_store, tmp_path_factory):
    """A trained run and its 03 with every null, in a cache of its own; then a second seed of the same shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        for seed in (1, 2):
            p = params.check("train", tiny().model_dump() | SMALL | {"run": f"nulls/topk-s{seed}", "seed": seed})
            trainer.train(p, activations.source(p), runs.start(p))
        yield measured("topk-s1")


def measured(run, **changes):
    return evaluate.evaluate(params.check("eval", {
        "run": f"nulls/{run}", "eval_preset": "smoke", "evals": ["core", "sparse_probing"], "threads": 1,
        "mode": "batch", "device": "cpu", **changes}))


def test_each_null_goes_through_the_run_s_own_evaluations(evaluated):
    first = evaluated
    found, own = first["nulls"], first["core"]["metrics"]
    assert list(found) == ALL and found == json.loads(json.dumps(runs.Run("nulls/topk-s1").json("evals/nulls.json")))
    for null in ALL:
        assert set(found[null]) == {"heldout", "core", "sparse_probing"}
        for name in ("core", "sparse_probing"):
            assert found[null][name]["config"]["comparable"] == first[name]["config"]["comparable"]
    core = {null: entries["core"]["metrics"] for null, entries in found.items()}
    assert core["residual"]["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert core["residual"]["explained_variance"] == 1 and core["pca"]["l0"] == 8
    assert core["random"]["explained_variance"] < own["explained_variance"] > core["untrained"]["explained_variance"]
    raw = found["residual"]["sparse_probing"]["metrics"]
    assert raw["sae_top_1_test_accuracy"] == first["sparse_probing"]["metrics"]["llm_top_1_test_accuracy"]


def test_a_second_sae_evaluates_no_null_and_a_damaged_file_is_computed_again(evaluated, monkeypatch):
    calls = []

    def counted(name, function):
        def call(p, asked, sae, model):
            calls.append((name, sae.architecture.name, sae.d_sae))
            return function(p, asked, sae, model)
        return call

    monkeypatch.setattr(evaluate, "EVALS", {name: counted(name, one) for name, one in evaluate.EVALS.items()})
    second = measured("topk-s2")
    assert calls == [("core", "topk", 192), ("sparse_probing", "topk", 192)], "its own alone"
    assert second["nulls"] == evaluated["nulls"]
    assert second["core"]["metrics"] != evaluated["core"]["metrics"]
    files = [file for file in sorted((runs.cache() / "evaluation").glob("nulls-*.json"))
             if "ce_loss_score" in runs.read_json(file)["metrics"]]
    before = {file: runs.read_json(file)["metrics"] for file in files}
    assert len(files) == 4
    (files[0].write_text("{dam"), files[1].write_text('{"metrics": 3}'))
    again = measured("topk-s2", evals=["core"])["nulls"]
    assert {file: runs.read_json(file)["metrics"] for file in files} == before
    assert {null: entries["core"]["metrics"] for null, entries in again.items()} == {
        null: entries["core"]["metrics"] for null, entries in second["nulls"].items()}
    assert len(calls) == 2 + 1 + 2


def test_what_comes_with_the_workbook_is_not_measured_and_another_text_shape_or_preset_is(evaluated, monkeypatch):
    ours = evaluated["nulls"]["random"]["core"]
    monkeypatch.setattr(embedded_nulls, "_all", lambda: {ours["key"]: {"metrics": {"ce_loss_score": 0.25},
                                                                       "note": None}})
    monkeypatch.setattr(evaluate, "EVALS", evaluate.EVALS | {"core": counted(calls := [], evaluate.EVALS["core"])})
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(runs.cache() / "shipped"))
    shutil.copytree(runs.folder_of("nulls/topk-s2"), runs.folder_of("nulls/shipped"))
    found = measured("shipped", evals=["core"], nulls=["random", "pca"])["nulls"]
    assert found["random"]["core"]["metrics"] == {"ce_loss_score": 0.25} and calls == ["topk", "linear"]
    assert found["random"]["core"]["origin"] == embedded_nulls.SHIPPED and "origin" not in found["pca"]["core"]
    assert found["random"]["core"]["config"] == ours["config"]

    asked = evaluate.trained(runs.Run("nulls/topk-s1"))
    sae, held = load_sae(runs.folder_of("nulls/topk-s1") / "sae"), null_saes.ground(activations.source(asked))
    comparable = ours["config"]["comparable"]

    def key(name="random", l0=8, said=comparable, **changes):
        return embedded_nulls.key(asked.model_copy(update=changes), name, null_saes.make(name, sae, l0, held), "core",
                                  said)
    assert key() == ours["key"] == key(dtype="bfloat16", seed=7, samples=5)
    others = [key("untrained"), key("pca"), key("pca", l0=9), key(said="another preset"), key(tokens=6001),
              key(corpus_seed=3), key(layer=0)]
    assert len({*others, ours["key"]}) == len(others) + 1
    assert key(activations="elsewhere") == "" and embedded_nulls.find("") is None


def test_the_workbook_s_own_nulls_are_figures_of_the_quickstart_and_of_ci():
    held = runs.read_json(embedded_nulls.FILE)
    # Of a shape 4 on held-out rows and 4 in core; the quickstart's two shapes share components and raw stream. Of each
    # of the three shapes 2 in absorption, by the model in bfloat16 and in float32, and of the quickstart's at the
    # default's words too.
    assert len(held) == 20 + 2 * 6 + 4
    for entry in held.values():
        assert entry["metrics"] and all(value is None or math.isfinite(value) for value in entry["metrics"].values())
    absorptions = [entry["metrics"]["mean_full_absorption_score"] for entry in held.values()
                   if "mean_full_absorption_score" in entry["metrics"]]
    recovered = [entry["metrics"]["ce_loss_score"] for entry in held.values() if "ce_loss_score" in entry["metrics"]]
    assert min(absorptions) > 0 and max(recovered) == pytest.approx(1, abs=1e-3), "the raw residual stream's"


def counted(calls, function):
    def call(p, asked, sae, model):
        calls.append(sae.architecture.name)
        return function(p, asked, sae, model)
    return call


def test_a_null_that_fails_is_a_sentence_and_no_figure(evaluated, monkeypatch):
    own = evaluate.EVALS["core"]

    def failing(p, asked, sae, model):
        if sae.architecture.name == "linear":
            raise runs.RunError("nothing came of it")
        return own(p, asked, sae, model)

    shutil.copytree(runs.folder_of("nulls/topk-s1"), runs.folder_of("nulls/failing"))
    monkeypatch.setattr(evaluate, "EVALS", evaluate.EVALS | {"core": failing})
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(runs.cache() / "other"))
    found = measured("failing", evals=["core"], nulls=["random", "pca"])
    assert found["nulls"]["pca"]["core"] == {"status": "failed", "reason": "RunError: nothing came of it"}
    assert found["nulls"]["random"]["core"]["metrics"] and found["core"]["metrics"]
    assert "sparse_probing" in found["nulls"]["random"], "what an earlier 03 measured stays"
    assert "principal components, core: failed" in beside_nulls.without(found["nulls"], "core")
    table = figures.evaluation(found)
    assert "random SAE (topk, 192 latents)" in table and not any("component" in name for name in table)
    monkeypatch.setattr(null_saes, "ground_of", lambda *_: (_ for _ in ()).throw(runs.RunError("no store")))
    assert measured("failing", evals=["core"])["nulls"]["random"]["core"]["reason"] == "RunError: no store"
    assert "nulls" not in measured("failing", evals=["core"], nulls=[])


def test_what_a_null_has_no_figure_in_says_why():
    assert nulls.NOT_APPLICABLE["pca", "absorption"].startswith("absorption asks which latents stay silent")
    assert all(null in ALL and name in nulls.EVALUATIONS for null, name in nulls.NOT_APPLICABLE)


def test_tables_of_03_and_05_show_nulls_apart_from_runs(evaluated):
    first = evaluated
    table = figures.evaluation(first)
    assert table.columns[2] == "within this SAE"
    assert list(table.columns[3:7]) == ["random SAE (topk, 192 latents)", "untrained SAE (topk, 192 latents)",
                                        "8 principal components", "raw residual stream"]
    probing = further.tables(first)["sparse_probing"]
    assert probing.data.tolist()[-5:] == ["mean", *(f"mean, {what}" for what in table.columns[3:7])]
    names = ["nulls/topk-s1", "nulls/topk-s2"]
    found = compare.compare(params.check("compare", {"study": "nulls", "runs": names}))
    assert found.nulls.null.tolist() == ALL and set(found.nulls.beside) == {", ".join(names)}
    residual = found.nulls.set_index("null").loc["residual"]
    assert residual.explained_variance == 1 and residual.sae_top_1_test_accuracy == first["sparse_probing"]["metrics"][
        "llm_top_1_test_accuracy"]
    assert found.table.run.tolist() == names and len(results.results(found.table)) == 2
    assert pd.read_csv(found.folder / "table.csv").explained_variance.tolist() == pytest.approx(
        found.table.explained_variance.tolist())
    assert pd.read_csv(found.folder / "nulls.csv").run.str.startswith("null: ").all()
    shown = figures_compare.readable(found.table, found.nulls)
    assert shown.verdict.tolist() == ["valid"] * 2 + ["null"] * 4
    pca, ends = found.nulls.set_index("null").loc["pca"], "within/explained_variance/"
    assert pca[ends + "low"] < pca.explained_variance < pca[ends + "high"]
    assert " to " in shown[METRICS["explained_variance"].called].iloc[-2], "nulls have intervals too"
    assert figures_compare.grey(shown, found.nulls).all(axis=1).tolist() == [False] * 2 + [True] * 4
    picture = figures_compare.all_figures(found)["comparison_table"].data[0].cells
    assert len(picture["values"][0]) == 6 and picture.font.color[0][-1] == figures_compare.GREY_INK
    figures_absorption.all_figures(found, "")


def test_a_null_of_another_evaluation_is_another_row(elsewhere):
    for number, comparable in enumerate("aab"):
        folder = runs.folder_of(f"s/x-s{number}")
        runs.write_text(folder / "params.yaml", "model: tiny\n")
        about = {"what": "random SAE", "weights": "w", "comparable": comparable}
        runs.write_json(folder / "evals/nulls.json", {"random": {"core": {"metrics": {"ce_loss_score": 0.1},
                                                                          "config": about}}})
    runs.write_text(runs.folder_of("s/x-s0") / "evals/absorption_nulls.json", json.dumps({"random": {"absorption": {
        "status": "failed", "reason": "why"}}}))
    table = null_table.collect(["s/x-s0", "s/x-s1", "s/x-s2", "s/absent-s1"])
    assert table.beside.tolist() == ["s/x-s0, s/x-s1", "s/x-s2"]
    assert "absorption: failed, why" in table.without[0]


TRAINED = {"metrics": {"explained_variance": 0.6, "ce_loss_score": 0.9}, "config": {"comparable": "c"}}


def beside(value, metric="explained_variance", evaluation="core", comparable="c"):
    return {evaluation: {"metrics": {metric: value}, "config": {"comparable": comparable, "what": "random SAE"}}}


@pytest.mark.parametrize("report, entry, flagged", [
    (TRAINED, beside(0.5), False), (TRAINED, beside(0.6), True), (TRAINED, beside(0.7), True),
    (TRAINED | {"within_this_sae": {"explained_variance": [0.45, 0.75]}}, beside(0.5), True),
    (TRAINED | {"within_this_sae": {"explained_variance": [0.55, 0.75]}}, beside(0.5), False),
    (TRAINED, beside(0.7, comparable="other"), False), (TRAINED, beside(None), False),
    (TRAINED, {"core": {"status": "failed", "reason": "why"}}, False)])
def test_what_is_not_better_than_a_null_is_flagged_by_its_interval(report, entry, flagged):
    found = validity._not_better({"core": report}, {"random": entry})
    assert bool(found) == flagged
    if flagged:
        other = entry["core"]["metrics"]["explained_variance"]
        assert found[0].startswith("explained variance 0.600")
        assert found[0].endswith(f"not above that of null baselines: random SAE {other:.3f}")
    assert validity._not_better({"core": report}, {"residual": entry}) == []


def test_absorption_is_better_below_and_a_flag_leaves_a_run_valid():
    from test_validity import CORE, GOOD

    metric = "mean_full_absorption_score"
    report = {"metrics": {metric: 0.3}, "config": {"comparable": "c"}}
    assert validity._not_better({"absorption": report}, {"random": beside(0.4, metric, "absorption")}) == []
    assert "not below" in validity._not_better({"absorption": report}, {"random": beside(0.2, metric, "absorption")})[0]
    core = CORE | {"config": CORE["config"] | {"comparable": "c"}}
    verdict = validity.judge(GOOD, core, nulls={"random": beside(0.97, "ce_loss_score")})
    assert verdict.status == "valid" and METRICS["ce_loss_score"].label.lower() in verdict.flags[0]
    assert validity.judge(GOOD | {"l0": 0.0}, core, nulls={"random": beside(0.97, "ce_loss_score")}).flags == []
    assert validity.judge(GOOD, core, "null", nulls={"random": beside(0.97, "ce_loss_score")}).flags == []
