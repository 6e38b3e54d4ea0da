"""sae-probes' k-sparse probing through our wrapper: SAEs whose figures are known, what is kept, what fails."""

import os
import random

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from test_probing import made

from sae_lib import params, runs
from sae_lib.data import activations, tiny_model
from sae_lib.evaluation import evaluate, faults, results
from sae_lib.evaluation.saebench import model_side, per_text
from sae_lib.evaluation.saebench import sae_probes as bench
from sae_lib.metrics import METRICS
from sae_lib.params import ParameterError
from sae_lib.runs import RunError
from sae_lib.training import trainer
from sae_lib.views import further

TOP = "sae_probes_sae_top_1_test_auc"


@pytest.fixture(scope="module")
def directions(tiny_model):
    """(2, D): what the residual stream of words with a, and with b, has more than that of all words."""
    words = tiny_words()
    ids = [tiny_model.tokenizer(" " + word, add_special_tokens=False)["input_ids"][-1] for word in words]
    x = tiny_model.residual(torch.tensor([[tiny_model.bos_id, number] for number in ids]))[:, 1].float()
    return torch.stack([x[[word[0] == letter for word in words]].mean(0) for letter in "ab"]) - x.mean(0)


def tiny_words():
    return tiny_model.words()


@pytest.fixture
def letters(monkeypatch):
    """In place of sae-probes' texts, those whose last word begins with a, or with b; a fifth stands twice."""
    def read(name, *_given):
        draw, rows = random.Random(name), []
        for place in range(300):
            own = [word for word in tiny_words() if word[0] == "ba"[place % 2]]
            rows.append(" ".join([*draw.choices(tiny_words(), k=draw.randint(1, 9)), draw.choice(own)]))
        return bench.Texts(rows[:240] + rows[:60], np.arange(300) % 2)
    monkeypatch.setattr(bench, "read", read)


@pytest.fixture
def planted(directions):
    """A latent for a, one for b, and six that see nothing of them."""
    q = torch.linalg.qr(directions.T).Q
    rows = torch.randn(6, len(q), generator=torch.Generator().manual_seed(0))
    return made(torch.cat([directions, rows - rows @ q @ q.T]), 0.4)


@pytest.fixture
def blind(directions):
    q = torch.linalg.qr(directions.T).Q
    rows = torch.randn(8, len(q), generator=torch.Generator().manual_seed(1))
    return made(rows - rows @ q @ q.T)


def test_a_planted_latent_is_found_and_a_blind_sae_is_at_chance(tiny_model, letters, planted, blind, tmp_path):
    report = bench.sae_probes(planted, tiny_model, "smoke", data=("one", "other"), output_folder=tmp_path)
    found, config = report["metrics"], report["config"]
    assert found[TOP] > 0.95 and found["sae_probes_llm_test_auc"] > 0.95 and set(found) < set(METRICS)
    other = bench.sae_probes(blind, tiny_model, "smoke", data=("one", "other"))
    assert 0.3 < other["metrics"][TOP] < 0.8 < found["sae_probes_sae_top_1_test_accuracy"]
    # The model's own probes are the same, and were not trained again.
    assert other["model_reused"] and all(other["metrics"][name] == found[name] for name in found if "llm" in name)
    assert other["config"]["comparable"] == config["comparable"] and report["note"] is None
    assert config["texts"]["one"] == {"train": 200, "test": 99} and config["k_values"] == [1, 2, 5]
    assert set(config["data"]) == {"one", "other"} and (config["d_sae"], config["hook"]) == (8, tiny_model.hook)
    assert runs.read_json(tmp_path / "sae_probes.json")["metrics"] == found
    low, high = report["within_this_sae"][TOP]
    assert low <= found[TOP] <= high and "test texts" in report["within_this_sae"]["by"]
    assert not any("llm" in name for name in report["within_this_sae"])
    shown = further.tables({"sae_probes": report})["sae_probes"]
    assert list(shown.data) == ["one", "other", "mean"] and "SAE, top 5 (AUC)" in shown
    few = bench.sae_probes(made(planted.W_dec.data[:3], 1e4), tiny_model, "smoke", data=("one", "other"))
    assert few["config"]["k_values"] == [1, 2] and "sae_probes_sae_top_5_test_auc" not in few["metrics"]
    assert few["metrics"][TOP] == 0.5 and "no latent is active" in few["note"]


def test_what_is_in_the_cache_changes_no_figure_and_is_no_pickle(tiny_model, letters, planted, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(torch, "save", lambda *_a, **_o: pytest.fail("pickled"))
    fresh = bench.sae_probes(planted, tiny_model, "smoke", data=("one",))
    kept = {path.name.partition("-")[0] for path in (tmp_path / "cache/evaluation").glob("*.safetensors")}
    assert kept == {"last", "probes"} and not fresh["model_reused"]
    with monkeypatch.context() as patch:
        patch.setattr(model_side, "to_hooked", lambda *_: pytest.fail("the model was run"))
        again = bench.sae_probes(planted, tiny_model, "smoke", data=("one",))
    assert again["model_reused"] and not os.listdir(work)
    for part in ("metrics", "config", "within_this_sae"):
        assert again[part] == fresh[part]
    next((tmp_path / "cache/evaluation").glob("last*.safetensors")).write_bytes(b"damaged")
    mended = bench.sae_probes(planted, tiny_model, "smoke", data=("one",))
    assert not mended["model_reused"] and mended["metrics"] == fresh["metrics"]


def test_the_figures_that_intervals_are_drawn_of_are_those_of_saebench(tiny_model, letters, blind, monkeypatch):
    heard = []
    within = bench.Work.within
    monkeypatch.setattr(bench.Work, "within", lambda self: heard.extend(self.heard.values()) or within(self))
    report = bench.sae_probes(blind, tiny_model, "smoke", data=("one",))
    assert heard[0].n < 99, "texts that stand twice are drawn together"
    drawn = heard[0].figures(np.ones((1, heard[0].n)))
    assert len(drawn) == 9
    for name, (value,) in drawn.items():
        assert value == pytest.approx(report["metrics"][f"sae_probes_{name}"], abs=1e-12)


def test_weighted_figures_are_scikit_learn_s():
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(0, 2, 50), draw.integers(0, 9, 50) / 8
    answers = per_text.Scored([f"text {n}" for n in range(50)], labels)
    answers.scored("probe", scores > 0.5, scores)
    weights = draw.integers(0, 4, (5, 50))
    places = [answers.number[f"text {n}"] for n in range(50)]
    for row, own in enumerate(weights[:, places]):
        expected = {"accuracy": sklearn_metrics.accuracy_score(labels, scores > 0.5, sample_weight=own),
                    "auc": sklearn_metrics.roc_auc_score(labels, scores, sample_weight=own),
                    "f1": sklearn_metrics.f1_score(labels, scores > 0.5, average="weighted", sample_weight=own)}
        for name, value in expected.items():
            assert answers.figures(weights)[f"probe_test_{name}"][row] == pytest.approx(value)


def test_activations_are_those_of_sae_probes_own_code(tiny_model, tmp_path, monkeypatch):
    from sae_probes.generate_model_activations import _process_activations

    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path))
    texts = [" " + " ".join(tiny_words()[start:start + length]) for start, length in ((0, 3), (7, 12), (3, 5), (0, 3))]
    side = model_side.ModelSide(tiny_model, 8)
    found = side.last_token("some", texts, [0, 1, 0, 1])
    model = side._model()
    begins = model.tokenizer("")["input_ids"] != []
    marked = texts if begins else [model.tokenizer.bos_token + text for text in texts]
    own = _process_activations(model, marked, 2, 8 if begins else 99, [tiny_model.hook], None, "cpu")[tiny_model.hook]
    short = [place for place, text in enumerate(texts) if begins or len(text.split()) < 8]
    assert torch.allclose(found[short], own[short], atol=1e-5) and torch.equal(found[0], found[3])
    assert not torch.equal(found, model_side.ModelSide(tiny_model, 4).last_token("some", texts, [0, 1, 0, 1]))


def test_errors_are_sentences_and_everything_is_put_back(tiny_model, letters, planted, monkeypatch):
    from sae_bench.evals.sparse_probing_sae_probes import main

    modules = [bench._module(name) for name in ("utils_data", "run_baselines", "run_sae_evals")]
    before = [dict(vars(module)) for module in modules]
    with monkeypatch.context() as patch:
        patch.setattr(bench._module("run_sae_evals"), "get_sorted_indices", lambda *_a: 1 / 0)
        with pytest.raises(RunError, match="SAEBench sae-probes failed: ZeroDivisionError: .*; it said: "):
            bench.sae_probes(planted, tiny_model, "smoke", data=("one",))
        patch.setattr(main, "run_eval", lambda *_a, **_o: print("nothing to do"))
        with pytest.raises(RunError, match="sae-probes gave no result; it said: nothing to do"):
            bench.sae_probes(planted, tiny_model, "smoke", data=("one",))
    assert [dict(vars(module)) for module in modules] == before
    for preset, says in (("big", "'big' is not known"), ("reported_000", "no configuration of sae_probes")):
        with pytest.raises(ParameterError, match=f"eval_preset: .*{says}"):
            bench.sae_probes(planted, tiny_model, preset)
    monkeypatch.undo()
    with pytest.raises(ParameterError, match="data set '96_spam' is not known.*'96_spam_is'.*113 binary"):
        bench.sae_probes(planted, tiny_model, "smoke", data=("96_spam",))


def test_the_presets_name_sets_that_are_there():
    assert len(bench.known()) == 113 and set(bench.SETS) < set(bench.known())
    held = bench.read(bench.SETS[0], 60)
    assert len(held.texts) == 60 and held.labels.sum() == 30
    whole = bench.read(bench.SETS[0])
    assert set(held.texts) < set(whole.texts) and set(whole.labels) == {0, 1}


def test_03_writes_it_with_nulls_and_a_fault_stands_in_the_table(tiny, tiny_store, monkeypatch):
    p = params.check("train", tiny().model_dump() | {
        "run": "sae_probes/one", "d_sae": 64, "k": 8, "samples": 10_000, "batch_size": 256, "lr": 2e-3,
        "warmup_steps": 5, "dead_after": 5000, "threads": 1})
    trainer.train(p, activations.source(p), runs.start(p))
    asked = params.check("eval", {"run": p.run, "eval_preset": "smoke", "threads": 1, "mode": "batch",
                                  "device": "cpu", "evals": ["sae_probes"], "nulls": ["pca", "residual"]})
    found = evaluate.evaluate(asked)
    run = runs.Run(p.run)
    assert set(found["sae_probes"]["config"]["data"]) == set(bench.SETS[:2]) and found["sae_probes"]["sae_sha256"]
    for null in ("pca", "residual"):
        entry = found["nulls"][null]["sae_probes"]
        assert entry["config"]["comparable"] == found["sae_probes"]["config"]["comparable"], null
        assert entry["metrics"]["sae_probes_llm_test_auc"] == found["sae_probes"]["metrics"]["sae_probes_llm_test_auc"]
    assert run.json("validity.json")["checked"] == ["training", "sae_probes"]
    row = results.collect([p.run]).iloc[0]
    assert row[TOP] == found["sae_probes"]["metrics"][TOP] and row.sae_probes
    further.display(found)
    monkeypatch.setattr(bench.Work, "call", lambda *_a: 1 / 0)
    faults_found = evaluate.evaluate(asked)
    assert "sae-probes failed: ZeroDivisionError" in faults.reason(faults_found["sae_probes"])
    assert "sae-probes failed" in results.collect([p.run]).iloc[0]["no_figure/sae_probes"]
