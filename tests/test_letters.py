"""04 on the tiny model: SAEBench's absorption per letter and word, its seeds, what is shared, and what is no score."""

import random
import threading
from pathlib import Path

import kept_kernel
import numpy as np
import pandas as pd
import pytest
import torch

from sae_lib import params, runs
from sae_lib.data import activations, language_model, words
from sae_lib.evaluation import letter_reports, letters, sharing
from sae_lib.evaluation.hooked_model import to_hooked
from sae_lib.evaluation.saebench import absorption as bench
from sae_lib.evaluation.saebench import adapter, letter_words
from sae_lib.params import ParameterError
from sae_lib.training import trainer
from sae_lib.views import figures_letters

SMALL = {"d_sae": 192, "k": 8, "samples": 40_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 10,
         "dead_after": 20_000, "threads": 1}
RUNS = {"first": {}, "second": {"seed": 7}, "dead": {"architecture": "standard", "l1": 3000.0, "l1_warmup": 0.0,
                                                   "lr": 0.02}}


NULLS = ["random", "untrained"]


def measure(run, **changes):
    values = {"run": f"letters/{run}", "absorption_preset": "smoke", "threads": 1, "mode": "batch", "device": "cpu",
              "nulls": []}
    return letters.evaluate(params.check("letters", values | changes))


@pytest.fixture(scope="module")
def trained(tiny, tiny_store):
    """Three SAEs of the tiny store: two good ones and a dead one."""
    for name, changes in RUNS.items():
        p = params.check("train", tiny().model_dump() | SMALL | changes | {"run": f"letters/{name}"})
        trainer.train(p, activations.source(p), runs.start(p))


@pytest.fixture(scope="module")
def first(trained):
    """What 04 found of the first SAE, before any other."""
    return measure("first", nulls=NULLS)


@pytest.fixture(scope="module")
def material(first, tiny_model):
    """The first seed's words and probes, as the cache holds them."""
    tokenizer, bos_id = language_model.load_tokenizer("tiny")
    chosen = letter_words.choose(tokenizer, 250)
    info = language_model.describe("tiny")
    return chosen, letter_words.prepare(
        chosen, tokenizer, bos_id, lambda: pytest.fail("the model was loaded"),
        identity=[info.identity, "blocks.1.hook_resid_post", "float32", "cpu"], d_model=info.d_model, seed=42)


def test_figures_are_saebenchs_and_the_tables_agree_with_them(first):
    report, table, tested = first.report, first.letters, first.words
    assert first.verdict.status == "valid" and first.verdict.checked == ["training", "absorption"]
    kept = table[table.kept]
    assert len(kept) >= 20 and len(table) == 26
    raw = report["raw"][42]["eval_result_metrics"]["mean"]
    for name, column in (("mean_full_absorption_score", "full_absorption"), ("mean_num_split_features", "splits"),
                         ("mean_absorption_fraction_score", "absorption_fraction")):
        assert report["metrics"][name] == raw[name] == pytest.approx(kept[column].astype(float).mean())
    assert 0 < report["metrics"]["mean_full_absorption_score"] < 1
    assert not np.allclose(kept.full_absorption.astype(float), kept.absorption_fraction)
    by_letter = tested.groupby("letter")
    for row in kept.itertuples():
        own = by_letter.get_group(row.letter)
        assert len(own) == row.true_positives <= row.test_words
        assert own.full_absorption.sum() == row.fully_absorbed
        assert own.absorption_fraction.mean() == pytest.approx(row.absorption_fraction)
        assert len(row.split_latents) == row.splits and len(row.f1_by_k) == bench.PRESETS["smoke"].max_k
        assert row.train_words + row.test_words <= 250
    assert (tested.absorbing_latent.notna() == tested.full_absorption).all()
    assert (tested.word.str.strip().str[0].str.lower() == tested.letter).all()
    for name in letter_reports.BOOTSTRAP:
        low, high = report["within_this_sae"][name]
        assert low < report["metrics"][name] < high


def test_files_are_whole_and_nothing_is_written_elsewhere(first, tmp_path, monkeypatch):
    import sae_bench

    evals = first.run.path / "evals"
    assert runs.read_json(evals / "absorption.json")["metrics"] == first.report["metrics"]
    pd.testing.assert_frame_equal(pd.read_parquet(evals / "absorption_letters.parquet")[["letter", "kept"]],
                                  first.letters[["letter", "kept"]])
    assert len(pd.read_parquet(evals / "absorption_words.parquet")) == len(first.words)
    assert runs.read_json(evals / "letters_done.json") == {"evals": ["absorption"], "status": "valid"}
    assert runs.read_json(first.run.path / "validity.json")["checked"] == ["training", "absorption"]
    before = sorted(Path(sae_bench.__file__).parent.rglob("*"))
    monkeypatch.chdir(tmp_path)
    measure("first")
    assert sorted(Path(sae_bench.__file__).parent.rglob("*")) == before and not list(tmp_path.iterdir())


def test_dropped_letters_say_why(first):
    dropped = first.letters[~first.letters.kept]
    assert len(dropped) and dropped.reason.str.len().min() > 0
    assert dropped[list(letter_reports.FIGURES)].isna().all(axis=None)
    assert first.report["seeds"][42]["dropped"] == dict(zip(dropped.letter, dropped.reason))
    # The gate: at 0.6 or less the model's own probe does not know the letter.
    low = first.letters.probe_f1 <= 0.6
    assert (first.letters.reason[low].str.startswith("probe F1")).all() and not first.letters.kept[low].any()


def test_a_further_sae_trains_no_probe_and_loads_no_model(first, monkeypatch):
    from sae_bench.evals.absorption import probing

    monkeypatch.setattr(language_model, "load", lambda *_a, **_o: pytest.fail("the model was loaded"))
    monkeypatch.setattr(probing, "train_linear_probe_for_task", lambda *_a, **_o: pytest.fail("probes were trained"))
    other = measure("second", nulls=NULLS)
    assert other.report["words_reused"] and not first.report["words_reused"]
    assert other.report["seconds_setup"] < first.report["seconds_setup"] / 3
    assert other.report["config"]["comparable"] == first.report["config"]["comparable"]
    assert (other.letters.reason == first.letters.reason).all()
    assert other.report["metrics"] != first.report["metrics"]
    # Nor does it measure a null baseline again: both are of one shape.
    assert other.nulls == first.nulls == runs.Run("letters/second").json("evals/absorption_nulls.json")
    assert list(first.nulls) == NULLS
    random = first.nulls["random"]["absorption"]
    assert random["config"]["comparable"] == first.report["config"]["comparable"]
    if random["metrics"]:
        metric = "mean_full_absorption_score"
        low, high = random["within_this_sae"][metric]
        assert low <= random["metrics"][metric] <= high
        shown = figures_letters.summary(first)
        assert random["metrics"][metric] in shown["random SAE (topk, 192 latents)"].tolist()
        drawn = str(figures_letters.all_figures(first)["letter_absorption"].layout.annotations)
        assert f"random SAE {random['metrics'][metric]:.3f}" in drawn


def test_seeds_are_applied_and_leave_no_trace(first):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    again = measure("first")
    assert again.report["metrics"] == first.report["metrics"]
    both = measure("first", absorption_seeds=[42, 45])
    one, two = (both.report["seeds"][seed]["metrics"] for seed in (42, 45))
    assert one == first.report["metrics"] != two
    for name, value in both.report["metrics"].items():
        assert value == pytest.approx((one[name] + two[name]) / 2)
    assert len(both.letters) == 52 and set(both.words.seed) == {42, 45}
    tests = [set(both.words.word[both.words.seed == seed]) for seed in (42, 45)]
    assert tests[0] != tests[1]
    assert states[0] == random.getstate() and (states[1] == np.random.get_state()[1]).all()
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_dead_sae_has_no_score(trained):
    found = measure("dead")
    assert found.verdict.status == "invalid" and "absorption" in found.verdict.checked
    report = found.report
    assert report["metrics"] == {} and report["seeds"][42]["metrics"] == {} and "within_this_sae" not in report
    assert report["status"] == "invalid" and "mean L0" in report["not_a_result"]
    raw = report["raw"][42]
    assert raw["eval_result_metrics"]["mean"]["mean_full_absorption_score"] == 0.0  # what SAEBench says of it
    assert "mean L0" in raw["not_a_result"]
    for name, columns in (("letters", letter_reports.FIGURES), ("words", ("full_absorption", "absorption_fraction"))):
        frame = pd.read_parquet(found.run.path / f"evals/absorption_{name}.parquet")
        assert len(frame) and frame[list(columns)].isna().all(axis=None) and (frame.status == "invalid").all()
    assert figures_letters.summary(found).empty and figures_letters.absorbed(found.words).empty
    for fig in figures_letters.all_figures(found).values():
        assert "invalid" in fig.to_json()
    bars = [trace for trace in figures_letters.all_figures(found)["letter_absorption"].data if trace.type == "bar"]
    assert bars and all(np.isnan(np.asarray(trace.y, dtype=float)).all() for trace in bars)


def test_an_sae_that_is_not_finite_is_not_evaluated(trained, monkeypatch, capsys):
    run = runs.Run("letters/second")
    training = run.json("training.json")
    runs.write_json(run.path / "training.json", training | {"nonfinite": "the loss at step 3"})
    try:
        found = measure("second")
        assert found.report == {} and found.verdict.status == "invalid"
        assert "not evaluated" in capsys.readouterr().out
        assert not (run.path / "evals/absorption.json").exists()
        assert runs.read_json(run.path / "evals/letters_done.json")["evals"] == []
        assert figures_letters.all_figures(found) == {} and figures_letters.by_letter(found.letters).empty
    finally:
        runs.write_json(run.path / "training.json", training)


def test_too_few_letters_are_said(trained, monkeypatch):
    monkeypatch.setattr(bench, "PROBE_F1", 0.97)
    found = measure("second")
    note = found.report["note"]
    assert "letters have a probe of F1 above 0.97; SAEBench wants 20" in note
    assert found.report["metrics"] == {} and f"absorption: {note}" in found.verdict.flags
    assert found.verdict.status == "valid" and not found.letters.kept.any()
    assert "SAEBench wants 20" in figures_letters.all_figures(found)["letter_absorption"].to_json().replace("<br>", " ")
    monkeypatch.setattr(letter_words, "FEWEST", 50)
    found = measure("second")
    assert "letters have enough words; SAEBench wants 20" in found.report["note"]
    assert found.letters.reason.str.contains("words, at least 50 are needed").any()
    assert figures_letters.all_figures(found)


def test_another_layer_than_the_trained_one_is_invalid(trained):
    found = measure("second", layer=0)
    assert found.verdict.status == "invalid" and found.report["metrics"] == {}
    assert "evaluated hook 'blocks.0.hook_resid_post' is not the trained one" in found.report["not_a_result"]
    with pytest.raises(ParameterError, match="layer: model 'tiny' has 2 layers"):
        measure("second", layer=5)
    measure("second")


# -- words, probes and their cache ---------------------------------------------------------------------------------

def test_words_are_the_evaluations_own_and_always_the_same(tiny_model):
    tokenizer = tiny_model.tokenizer
    all_words, capped = letter_words.choose(tokenizer, None), letter_words.choose(tokenizer, 20)
    plain = {token.strip().lower() for token in all_words.tokens}
    assert not plain & set(words.split(tokenizer).prompts)
    assert set(capped.tokens) < set(all_words.tokens) and capped.tokens == sorted(capped.tokens)
    counts = pd.Series([token.strip()[0].lower() for token in capped.tokens]).value_counts()
    assert counts.max() == 20 and len(counts) == 26
    assert len(letter_words.choose(tokenizer, None, held_out=False).tokens) > len(all_words.tokens)


def test_activations_and_probes_are_what_saebench_makes_of_the_whole_model(material, tiny_model, tmp_path):
    """SAEBench's own training of the probes, on a HookedTransformer, with the same words and the same seed."""
    from sae_bench.evals.absorption import common

    chosen, ours = material
    model = to_hooked(tiny_model._replace(hook="blocks.1.hook_resid_post"))
    with (adapter.seeded(42), letter_words.examples_of("smoke", 42),
          adapter.in_place(common, get_alpha_tokens=lambda _tokenizer: chosen.tokens)):
        common.train_and_save_probes(model, [1], letter_words.TEMPLATE, letter_words.POSITION, tmp_path, device="cpu")
    theirs = np.load(next(tmp_path.rglob("data.npz")))
    assert torch.allclose(ours.x[:ours.train], torch.from_numpy(theirs["X_train"]), atol=1e-3)
    assert ours.labels[ours.train:] == theirs["y_test"].tolist()
    probe = common.load_probe(model.cfg.model_name, 1, tmp_path, device="cpu").weights
    assert torch.nn.functional.cosine_similarity(ours.weight, probe.detach()).min() > 0.999


def test_one_word_of_each_letter_shares_its_examples_and_a_letters_words_never_do(material):
    chosen, _ = material
    for preset, most in (("smoke", 26), ("paper", 1)):
        with adapter.seeded(3):
            _, _, train, test = letter_words._splits(chosen, preset, 3)
        for split in (train, test):
            examples = [prompt.base.rpartition("\n")[0] for prompt, _ in split]
            counts = pd.DataFrame({"examples": examples, "label": [label for _, label in split]})
            assert not counts.duplicated().any()
            assert (len(split) / counts.examples.nunique() > 8) == (most > 1)
            assert counts.examples.value_counts().max() <= most
            assert not any(f"\n{prompt.word} has" in prompt.base.rpartition("\n")[0] for prompt, _ in split)
        assert not {prompt.word for prompt, _ in train} & {prompt.word for prompt, _ in test}


def test_a_damaged_cache_is_computed_again(first):
    files = sorted((runs.cache() / "evaluation").glob("letters-*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    again = measure("first")
    assert not again.report["words_reused"] and again.report["metrics"] == first.report["metrics"]


def test_one_process_computes_and_the_others_wait(tmp_path):
    order, started = [], threading.Event()

    def second():
        started.set()
        with sharing.alone(tmp_path / "x.safetensors", "words"):
            order.append("second")
    with sharing.alone(tmp_path / "x.safetensors", "words"):
        thread = threading.Thread(target=second)
        thread.start()
        started.wait()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# -- parameters and the page ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, says", [
    ({"absorption_seeds": []}, "absorption_seeds"), ({"absorption_seeds": [1, 1]}, "each once"),
    ({"absorption_words_per_letter": 3}, "absorption_words_per_letter"), ({"absorption_preset": "quick"}, "'smoke'"),
    ({"absorption_seed": [1]}, "did you mean 'absorption_seeds'")])
def test_wrong_parameters_are_named(values, says):
    with pytest.raises(ParameterError, match=says):
        params.check("letters", values)


def test_an_untrained_run_is_one_clear_error(elsewhere):
    with pytest.raises(runs.RunError, match="02_train_variant"):
        measure("nothing")


def test_sparse_probes_take_as_many_steps_as_on_a_whole_vocabulary():
    assert bench.sparse_batch(5000, 47_000, "default") == 500  # 10 batches, as 37,600 words at 4096
    assert bench.sparse_batch(5000, 100_000, "default") == 250
    assert bench.sparse_batch(80_000, 100_000, "default") == 4000
    assert bench.sparse_batch(5000, 47_000, "paper") == 4096
    assert bench.sparse_batch(900, 1600, "default") == 90


@pytest.mark.parametrize("run, word", [("first", "**valid**"), ("dead", "**invalid**")])
def test_the_page(trained, tmp_path, run, word):
    from test_notebooks import page

    out = tmp_path / "04.ipynb"
    kept_kernel.execute("04_letter_absorption", out, tmp_path, {
        "run": f"letters/{run}", "absorption_preset": "smoke", "mode": "batch", "device": "cpu", "threads": 1})
    text = page(out)
    assert word in text and ("<td>Full absorption</td>" in text) == (run == "first")
    assert (runs.folder_of(f"letters/{run}") / "figures/letter_absorption.html").exists()
    assert "jupyter-widgets" not in out.read_text()  # SAEBench's progress bars


def test_the_figure_greys_what_is_dropped(first):
    figure = figures_letters.letter_absorption(first.letters, first.report)
    texts = [note.text for note in figure.layout.annotations]
    for reason in set(first.letters.reason[~first.letters.kept]):
        assert reason.replace("<", "&lt;") in texts
    heat = figures_letters.split_latents(first.letters, first.report).data[0]
    assert np.asarray(heat.z).shape == (26, bench.PRESETS["smoke"].max_k)
