"""Sparse probing, SCR and TPP through our wrapper: SAEs whose figures are known, what is shared, what fails."""

import os

import numpy as np
import pytest
import torch

from sae_lib import params, runs
from sae_lib.data import activations, labelled, tiny_model
from sae_lib.evaluation import evaluate, faults, validity
from sae_lib.evaluation.saebench import model_side, per_text, scr_tpp, sparse_probing
from sae_lib.params import ParameterError
from sae_lib.runs import RunError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training import trainer
from sae_lib.views import further

LETTERS = labelled.TINY_LETTERS + labelled.TINY_CROSSED[1]


def made(rows, threshold=0.0):
    """An SAE whose latents are projections on unit ``rows`` (F, D) above a threshold."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    bias = torch.full((len(rows),), -threshold)
    return SparseAutoencoder(rows.clone(), bias, rows, torch.zeros(rows.shape[1]), architectures.get("standard")())


@pytest.fixture(scope="module")
def directions(tiny_model):
    """(letters, D): what the residual stream of a letter's words has more than that of all words."""
    ids = {word: tiny_model.tokenizer(" " + word, add_special_tokens=False)["input_ids"][-1] for word in words()}
    tokens = torch.tensor([[tiny_model.bos_id, number] for number in ids.values()])
    x = tiny_model.residual(tokens)[:, 1].float()
    first = [word[0] for word in ids]
    return torch.stack([x[[one == letter for one in first]].mean(0) for letter in LETTERS]) - x.mean(0)


def words():
    return tiny_model.words()


@pytest.fixture
def planted(directions):
    """Six latents, one a letter."""
    return made(directions, 0.4)


@pytest.fixture
def blind(directions):
    """Sixteen latents that see nothing of the letters."""
    q = torch.linalg.qr(directions.T).Q
    rows = torch.randn(16, len(q), generator=torch.Generator().manual_seed(0))
    return made(rows - rows @ q @ q.T)


@pytest.fixture
def dead(directions):
    return made(directions, 1e4)


def test_a_planted_latent_is_found_and_a_blind_sae_is_at_chance(tiny_model, planted, blind, tmp_path):
    report = sparse_probing.sparse_probing(planted, tiny_model, output_folder=tmp_path)
    found, config = report["metrics"], report["config"]
    assert found["sae_top_1_test_accuracy"] > 0.95 and found["llm_test_accuracy"] > 0.95
    assert found["llm_top_1_test_accuracy"] < found["sae_top_1_test_accuracy"]
    assert found["sae_top_1_test_accuracy"] == report["raw"]["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"]
    other = sparse_probing.sparse_probing(blind, tiny_model)
    assert 0.4 < other["metrics"]["sae_top_1_test_accuracy"] < 0.65
    # The model's own probes are the same, and were not trained again.
    assert {key: value for key, value in other["metrics"].items() if key.startswith("llm")} == {
        key: value for key, value in found.items() if key.startswith("llm")}
    assert other["model_reused"] and other["config"]["comparable"] == config["comparable"]
    assert (config["model_identity"], config["hook"], config["d_sae"]) == (tiny_model.identity, tiny_model.hook, 6)
    assert set(config["data"]) == set(config["texts"]) == {"tiny_letters"}
    assert config["texts"]["tiny_letters"][0] == dict.fromkeys("abcd", 200)
    assert runs.read_json(tmp_path / "sparse_probing.json")["metrics"] == found
    assert "sae_bench_commit_hash" not in report["raw"] and report["note"] is None


def test_a_dead_sae_is_at_chance_and_says_so(tiny_model, dead):
    report = sparse_probing.sparse_probing(dead, tiny_model, "smoke")
    assert all(report["metrics"][f"sae_top_{k}_test_accuracy"] == 0.5 for k in (1, 2, 5))
    assert report["l0_texts"] == 0 and "no latent is active" in report["note"]
    for name, function in (("scr", scr_tpp.scr), ("tpp", scr_tpp.tpp)):
        report = function(dead, tiny_model, "smoke")
        assert report["metrics"] and not any(report["metrics"].values()), name
        assert "no latent is active" in report["note"]


@pytest.mark.parametrize("function", [sparse_probing.sparse_probing, scr_tpp.scr, scr_tpp.tpp],
                         ids=lambda function: function.__name__)
def test_what_is_in_the_cache_changes_no_figure(tiny_model, planted, tmp_path, monkeypatch, function):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    draw = torch.get_rng_state()
    with torch.no_grad():
        fresh = function(planted, tiny_model, "smoke")
        assert not torch.is_grad_enabled()
    kept = sorted((tmp_path / "cache/evaluation").glob("*.safetensors"))
    assert kept and not fresh["model_reused"]
    monkeypatch.setattr(model_side, "to_hooked", lambda *_: pytest.fail("the model was run"))
    again = function(planted, tiny_model, "smoke")
    assert again["model_reused"] and torch.is_grad_enabled()
    assert again["metrics"] == fresh["metrics"] and again["config"] == fresh["config"]
    assert again["within_this_sae"] == fresh["within_this_sae"]
    monkeypatch.undo()
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path / "cache"))
    next(file for file in kept if file.name.startswith("labelled")).write_bytes(b"damaged")
    mended = function(planted, tiny_model, "smoke")
    assert not mended["model_reused"] and mended["metrics"] == fresh["metrics"]
    assert torch.equal(torch.get_rng_state(), draw) and not os.listdir(work)


def test_planted_latents_are_targeted_and_remove_what_is_spurious(tiny_model, planted, blind):
    targeted = scr_tpp.tpp(planted, tiny_model, "smoke")
    name = "tpp_threshold_2_total_metric"
    unseen = scr_tpp.tpp(blind, tiny_model, "smoke")["metrics"][name]
    assert targeted["metrics"][name] > 0.1 and abs(unseen) < 0.05
    assert targeted["config"]["ablated"] == [2]  # it has six latents
    assert targeted["metrics"]["tpp_threshold_2_unintended_diff_only"] < 0.1
    removed = scr_tpp.scr(planted, tiny_model, "smoke")
    assert removed["metrics"]["scr_metric_threshold_2"] > 0.3
    assert removed["config"]["texts"] == {"tiny_crossed a b": {"train": 80, "test": 32}}
    shown = further.tables({"scr": removed, "tpp": targeted})
    assert list(shown["tpp"].data) == ["tiny_letters_tpp", "mean"] and "n = 2" in shown["scr"]


def test_errors_are_raised_and_everything_is_put_back(tiny_model, planted, monkeypatch):
    from sae_bench.evals.scr_and_tpp import main as scr_main
    from sae_bench.evals.sparse_probing import main

    class Broken(SparseAutoencoder):
        def encode(self, x):
            raise ValueError("the encoder is broken")

    before = [getattr(module, name) for module in (main, scr_main) for name in
              ("HookedTransformer", "probe_training", "get_dataset_activations", "tqdm")]
    broken = Broken(planted.W_enc.data, planted.b_enc.data, planted.W_dec.data, planted.b_dec.data,
                    planted.architecture)
    monkeypatch.setattr(sparse_probing, "mean_l0", lambda *_: 1.0)
    with pytest.raises(RunError, match="sparse probing failed: ValueError: the encoder is broken; it said: .*"):
        sparse_probing.sparse_probing(broken, tiny_model, "smoke")
    monkeypatch.setattr(scr_tpp, "mean_l0", lambda *_: 1.0)
    with pytest.raises(RunError, match="TPP failed: ValueError: the encoder is broken"):
        scr_tpp.tpp(broken, tiny_model, "smoke")
    assert torch.is_grad_enabled() and before == [
        getattr(module, name) for module in (main, scr_main) for name in
        ("HookedTransformer", "probe_training", "get_dataset_activations", "tqdm")]
    monkeypatch.setattr(main, "run_eval", lambda *_a, **_o: print("nothing to do"))
    with pytest.raises(RunError, match="gave no result; it said: nothing to do"):
        model_side.run("sparse probing", lambda folder: main.run_eval(), 0, main.SparseProbingEvalConfig())
    with pytest.raises(ParameterError, match="eval_preset: 'big'"):
        scr_tpp.scr(planted, tiny_model, "big")
    with pytest.raises(ParameterError, match="'nope' is not known"):
        sparse_probing.sparse_probing(planted, tiny_model, "smoke", data=("nope",))
    planted.W_dec.data[0] *= 1.1
    with pytest.raises(ParameterError, match="not of unit norm"):
        sparse_probing.sparse_probing(planted, tiny_model, "smoke")


def test_a_hub_model_reads_saebenchs_own_data_in_paper_alone(tiny_model, planted, monkeypatch):
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    assert sparse_probing.data_of("google/gemma-2-2b", "default", ("x",), ("y",)) == ("x",)
    assert sparse_probing.data_of("google/gemma-2-2b", "paper", ("x",), ("y",)) is None
    assert sparse_probing.data_of("smollm2", "paper", ("x",), ("y",)) == ("x",)
    asked = []

    def loaded(name, train, test, seed):
        asked.append((name, train, test))
        names = dataset_info.chosen_classes_per_dataset[name]
        return tuple({label: [f"{label} {part} {word}" for word in words()[:6]] for label in (*names, "another")}
                     for part in ("one", "two"))

    monkeypatch.setattr(dataset_utils, "get_multi_label_train_test_data", loaded)
    monkeypatch.setitem(sparse_probing.PRESETS, "paper", sparse_probing.Preset(12, 12, 16))
    report = sparse_probing.sparse_probing(planted, tiny_model._replace(name="owner/name"), "paper")
    assert len(asked) == 8 and ("fancyzhx/ag_news", 12, 12) in asked
    assert report["config"]["data"]["Helsinki-NLP/europarl"] == "SAEBench's own, of the hub"
    classes = report["raw"]["eval_result_unstructured"]["fancyzhx/ag_news_results"]["llm_test_accuracy"]
    assert set(classes) == set("0123")


def test_03_writes_each_and_a_fault_leaves_what_was_there(tiny, tiny_store, monkeypatch):
    p = params.check("train", tiny().model_dump() | {
        "run": "probing/one", "d_sae": 64, "k": 8, "samples": 10_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 5,
        "dead_after": 5000, "threads": 1})
    trainer.train(p, activations.source(p), runs.start(p))
    values = {"run": p.run, "eval_preset": "smoke", "threads": 1, "mode": "batch", "device": "cpu"}
    results = evaluate.evaluate(params.check("eval", values | {"evals": ["unlearning", "sparse_probing", "tpp"]}))
    run = runs.Run(p.run)
    assert list(results) == ["sparse_probing", "tpp", "unlearning", "nulls"]
    assert runs.read_json(run.path / "evals/done.json")["evals"] == ["sparse_probing", "tpp", "unlearning"]
    entries = results["nulls"]["pca"]
    assert entries["sparse_probing"]["metrics"] and entries["tpp"]["status"] == "not applicable"
    assert set(results["nulls"]["random"]) == {"heldout", "sparse_probing", "tpp"}
    checked = runs.read_json(run.path / "validity.json")["checked"]
    assert checked == ["training", "sparse_probing", "tpp"]
    further.display(results)

    def fails(*_args, **_options):
        raise RunError("SAEBench SCR failed: as planned")

    (run.path / "evals/sparse_probing.json").unlink()
    monkeypatch.setattr(scr_tpp, "scr", fails)
    results = evaluate.evaluate(params.check("eval", values | {"evals": ["scr", "sparse_probing"]}))
    with pytest.raises(RunError, match="1 of 2 evaluations failed; scr: .* as planned"):
        faults.insist(results)
    assert results["sparse_probing"]["metrics"] and not (run.path / "evals/done.json").exists()
    assert runs.read_json(run.path / "validity.json")["reasons"] == ["scr: SAEBench SCR failed: as planned"]
    evaluate.evaluate(params.check("eval", values | {"evals": ["sparse_probing"]}))  # scr is not asked for any more
    assert not (run.path / "evals/scr.json").exists() and (run.path / "evals/done.json").exists()

    report = runs.read_json(run.path / "evals/tpp.json")
    report["config"]["hook"] = "blocks.9.hook_resid_post"
    runs.write_json(run.path / "evals/tpp.json", report)
    assert "evaluated hook 'blocks.9.hook_resid_post'" in "; ".join(validity.update(run).reasons)
    with pytest.raises(ParameterError, match="evals"):
        params.check("eval", {"evals": []})


@pytest.mark.parametrize("function", [sparse_probing.sparse_probing, scr_tpp.scr, scr_tpp.tpp],
                         ids=lambda function: function.__name__)
def test_intervals_are_drawn_from_the_answers_behind_saebench_s_own_values(tiny_model, monkeypatch, function):
    """Every text counted once, the answers give SAEBench's values; their intervals lie about them."""
    rows = torch.randn(48, tiny_model.d_model, generator=torch.Generator().manual_seed(1))
    held, own = [], per_text.within
    monkeypatch.setattr(per_text, "within", lambda parts: held.extend(parts) or own(parts))
    report = function(made(rows, 0.2), tiny_model, "smoke")
    whole, within = per_text.point(held), report["within_this_sae"]
    asked = {name for name in report["metrics"] if not name.startswith("llm")}
    assert asked == set(whole) and set(within) <= {"level", "by", *whole}
    for name in asked:
        assert whole[name] == pytest.approx(report["metrics"][name], abs=1e-6), name
    inside = [within[name][0] <= whole[name] <= within[name][1] for name in asked if name in within]
    assert len(inside) > len(asked) / 2 and np.mean(inside) > 0.8
    assert within["by"].startswith("bootstrap over test texts")


def test_a_text_s_answers_are_those_of_its_own_row():
    """A probe that reads a text's number off its row is right on the texts that it is made to be right on, alone."""
    from sae_bench.evals.sparse_probing.probe_training import prepare_probe_data

    texts = {label: [f"{label} {n}" for n in range(30)] for label in "abc"}
    answers = per_text.Answers(texts)
    acts = {label: torch.arange(30.0)[:, None] + 30 * place for place, label in enumerate(texts)}
    torch.manual_seed(0)
    expected = prepare_probe_data(acts, "b")
    torch.manual_seed(0)
    x, labels = answers.preparing(prepare_probe_data, acts, "b")
    assert torch.equal(x, expected[0]) and torch.equal(labels, expected[1])
    answers.answered(x[:, 0] % 3 == 0)
    asked = torch.zeros(90).index_add(0, x[:, 0].long(), torch.ones(60)).numpy()
    assert asked[30:60].tolist() == [1] * 30
    weights = np.random.default_rng(0).integers(0, 4, (5, 90))
    right = (np.arange(90) % 3 == 0) * asked
    assert np.allclose(answers.accuracies(weights)[:, 0], weights @ right / (weights @ asked))
    assert [len(places) for places in answers.strata] == [30, 30, 30]


def test_a_text_of_several_classes_is_drawn_for_all_of_them():
    answers = per_text.Answers({"one": ["x", "y"], "other": ["y", "z"], "third": ["y", "w", "w"]})
    assert answers.n == 4 and [places.tolist() for places in answers.strata] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("name", ["scr", "tpp"])
def test_one_encoding_of_each_text_gives_saebench_s_own_figures(tiny_model, directions, monkeypatch, name):
    from sae_lib.evaluation.saebench import latent_sums

    rows = torch.randn(64, directions.shape[1], generator=torch.Generator().manual_seed(1))
    sae = made(torch.cat([directions, rows]), 0.2)
    own, heard = latent_sums.LatentSums.ablated, []

    def both(self, x, wrapped, to_ablate, batch):
        fast = own(self, x, wrapped, to_ablate, batch)
        from sae_bench.evals.scr_and_tpp import main

        slow = originals["ablated_precomputed_activations"](x, wrapped, to_ablate, batch)
        assert main.ablated_precomputed_activations is not originals["ablated_precomputed_activations"]
        heard.append(float((fast - slow).abs().max() / slow.abs().max()))
        return fast

    def effects(self, wrapped, probe, *args):
        state = torch.get_rng_state()
        slow = originals["get_effects_per_class_precomputed_acts"](wrapped, probe, *args)
        torch.set_rng_state(state)
        fast = own_effects(self, wrapped, probe, *args)
        assert torch.allclose(fast, slow, atol=1e-5 * float(slow.abs().max()))
        return fast

    from sae_bench.evals.scr_and_tpp import main as scr_main

    originals = {one: getattr(scr_main, one) for one in ("ablated_precomputed_activations",
                                                         "get_effects_per_class_precomputed_acts")}
    own_effects = latent_sums.LatentSums.effects
    monkeypatch.setattr(latent_sums.LatentSums, "ablated", both)
    monkeypatch.setattr(latent_sums.LatentSums, "effects", effects)
    found = getattr(scr_tpp, name)(sae, tiny_model, "smoke")
    assert heard and max(heard) < 1e-5
    monkeypatch.setattr(latent_sums.LatentSums, "applies", staticmethod(lambda _: False))
    slow = getattr(scr_tpp, name)(sae, tiny_model, "smoke")
    assert slow["metrics"] == pytest.approx(found["metrics"], abs=0.02)
