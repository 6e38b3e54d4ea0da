"""Shares of the latents kept, against independent computations; what the latents of one corpus know of another."""

import itertools
import random

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lib import params, runs
from sae_lib.data import activations, assets, corpus, newsgroups, sources
from sae_lib.data import tiny_model as planted
from sae_lib.evaluation import compare, compression, evaluate, importance, letters, masked_passes
from sae_lib.params import ParameterError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.kept import keep
from sae_lib.training import trainer
from sae_lib.views import figures_compression

D, CONTEXT = planted.D_MODEL, 32
SMALL = {"d_sae": 128, "k": 8, "samples": 40_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 10,
         "dead_after": 20_000, "threads": 1}
RATIOS = [1.0, 0.5, 0.1]


def some_sae(kind="topk", d_sae=96, seed=0, **config):
    """An SAE of random unit rows for width D, no training."""
    g = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder.initialise(d_sae, 0.1 * torch.randn(D, generator=g),
                                       architectures.get(kind)(**config or {"k": 8}), g)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def text(tiny_model):
    documents = list(itertools.islice(planted.documents(5), 12))
    held = importance.HeldOut(documents, ["one", "two"] * 6, "")
    return compression.text_of(tiny_model, held, {"one": 0.03, "two": 0.03}, CONTEXT)[0]


# -- keeping latents ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, config", [("topk", {"k": 8}), ("standard", {})])
def test_all_latents_kept_is_the_whole_sae_and_a_mask_is_exact(kind, config):
    sae, x = some_sae(kind, **config), torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(keep(sae, torch.ones(96, dtype=torch.bool))(x), sae(x))
    kept = torch.rand(96, generator=torch.Generator().manual_seed(2)) < 0.4
    part = keep(sae, kept)
    latents = sae.encode(x)
    assert torch.equal(part.encode(x), latents * kept) and not sae.hooks
    expected = (latents * kept) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(part(x), expected)
    torch.testing.assert_close(part.decode(latents * kept), expected)
    with pytest.raises(ValueError, match="a mask of"):
        keep(sae, kept[:5])


def test_most_takes_the_ceiling_and_the_first_of_equals():
    scores = torch.tensor([0.0, 3.0, 1.0, 3.0, 0.0])
    assert importance.most(scores, 0.2).tolist() == [False, True, False, False, False]
    assert importance.most(scores, 0.21).sum() == 2 and importance.most(scores, 1.0).all()
    assert importance.most(torch.zeros(100), 0.07).sum() == 7  # 0.07 * 100 is above 7 in floating point
    with pytest.raises(ParameterError, match="compression_ratios: expected .* got 0"):
        importance.most(scores, 0)


def test_documents_rank_or_measure_never_both():
    rank = importance.ranking_documents(["a", "b", "a", "a", "c"]).tolist()
    assert rank == [True, False, False, True, False]


@pytest.mark.parametrize("way", ["training", "halves", "unknown"])
def test_latents_are_ranked_by_text_that_is_not_measured(tiny, trained, monkeypatch, way):
    asked, sae = evaluate.trained(runs.Run("kept/good-s1")), some_sae()
    store = activations.source(asked)
    monkeypatch.setattr(activations, "source", lambda _: store)
    if way != "training":
        monkeypatch.setattr(store, "train_sources", lambda: None)
    if way == "unknown":
        monkeypatch.setattr(store, "heldout_sources", lambda: None)
    found, held = importance.of_run(sae, asked)
    whole = store.manifest["counts"]["heldout"]["tokens"]
    if way == "training":
        assert held.texts == store.heldout_texts() and sum(found.tokens.values()) == min(32_768, store.n_train)
        assert found.tokens[trained[0]] == pytest.approx(0.4 * 32_768, rel=0.05)
    elif way == "halves":
        assert 0.35 < len(held.texts) / len(store.heldout_texts()) < 0.65
        assert all(0 < found.tokens[name] < whole[name] for name in whole)
    else:
        assert found.tokens == {"held-out text": store.n_heldout} and set(held.sources) == {"held-out text"}


def test_importance_is_the_mean_latent_by_corpus():
    sae, x = some_sae(), torch.randn(300, D, generator=torch.Generator().manual_seed(3))
    of = torch.arange(300) % 3 % 2
    found = importance.importance(sae, x, of, ["even", "odd"])
    latents = sae.encode(x).double()
    torch.testing.assert_close(found.overall, latents.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.by_corpus["odd"], latents[of == 1].mean(0), rtol=1e-6, atol=1e-9)
    assert found.tokens == {"even": 200, "odd": 100}


# -- against independent computations ----------------------------------------------------------------------------

def by_hand(lm, sae, blocks, kept):
    """Explained variance, L0 and loss recovered by transformers' own model, a hook on its block, and dense algebra."""
    layer, text = lm.hf.model.layers[0], ~torch.isin(blocks, torch.tensor([0, 1, 2]))
    state = {}

    def losses(change):
        def hook(_module, _args, out):
            state["x"] = out[0] if isinstance(out, tuple) else out
            new = change(state["x"])
            return (new, *out[1:]) if isinstance(out, tuple) else new
        handle = layer.register_forward_hook(hook)
        try:
            logits = lm.hf(input_ids=blocks).logits
        finally:
            handle.remove()
        every = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(),
                                                  reduction="none").view(len(blocks), -1)
        return every[text[:, :-1]].double().mean()

    def dense(x):
        a = torch.relu((x.double() - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double())
        top = a.topk(8, dim=-1)
        f = torch.zeros_like(a).scatter_(-1, top.indices, top.values) * kept
        return f, f @ sae.W_dec.double() + sae.b_dec.double()

    clean, ablated = losses(lambda x: x), losses(torch.zeros_like)
    with_sae = losses(lambda x: torch.where(text[..., None], dense(x)[1].float(), x))
    losses(lambda x: x)
    f, x_hat = dense(state["x"])
    x = state["x"][text].double()
    variance = 1 - (x - x_hat[text]).square().sum() / (x - x.mean(0)).square().sum()
    return {"explained_variance": float(variance), "l0": float((f[text] > 0).sum(1).double().mean()),
            "loss_recovered": float((ablated - with_sae) / (ablated - clean))}


@torch.no_grad()
def test_figures_are_those_of_a_computation_by_hand(tiny_model, text):
    sae = some_sae()
    masks = [torch.rand(96, generator=torch.Generator().manual_seed(n)) < share
             for n, share in enumerate((2, 0.5, 0.1))]
    sums = masked_passes.run(sae, tiny_model, text.blocks, text.corpora, [(kept, {"one", "two"}) for kept in masks])
    for chosen in ([True] * len(text.corpora), [name == "two" for name in text.corpora]):
        for number, kept in enumerate(masks):
            found = sums.figures(number, chosen)
            expected = by_hand(tiny_model, sae, text.blocks[torch.tensor(chosen)], kept)
            assert found["explained_variance"] == pytest.approx(expected["explained_variance"], abs=1e-6)
            assert found["l0"] == expected["l0"]
            assert found["loss_recovered"] == pytest.approx(expected["loss_recovered"], abs=1e-4)
            for name, (low, high) in found["interval"].items():
                assert low < found[name] < high, name


def test_intervals_are_a_bootstrap_over_blocks_and_null_for_one(tiny_model, text):
    sae, every = some_sae(), torch.ones(96, dtype=torch.bool)
    sums = masked_passes.run(sae, tiny_model, text.blocks, text.corpora, [(every, {"one"})])
    one = [name == "one" for name in text.corpora]
    assert np.isnan(sums.loss[0][~np.array(one)]).all()  # the model did not run there
    own, draw = np.flatnonzero(one), np.random.default_rng(1)
    drawn = [draw.choice(own, len(own)) for _ in range(4000)]
    gained = [(sums.ablated[i] - sums.loss[0, i]).sum() / (sums.ablated[i] - sums.clean[i]).sum() for i in drawn]
    assert sums.figures(0, one)["interval"]["loss_recovered"] == pytest.approx(np.quantile(gained, [0.025, 0.975]),
                                                                              abs=0.02)
    first = [number == own[0] for number in range(len(one))]
    assert sums.figures(0, first)["interval"] == {"explained_variance": None, "loss_recovered": None}


def test_equal_masks_run_once(tiny_model, text, monkeypatch):
    sae, seen = some_sae(), []
    real = masked_passes.run
    monkeypatch.setattr(masked_passes, "run", lambda *a, **o: seen.append(len(a[4])) or real(*a, **o))
    x = tiny_model.residual(text.blocks)[:, 1:].flatten(0, 1)
    of = torch.arange(len(x)) % 2
    found = importance.importance(sae, x, of, ["one", "two"])
    measured = compression.measure(sae, tiny_model, text, found, RATIOS, ["one", "two"])
    assert seen == [1 + 3 * 2]  # all latents are the same ones in every order
    assert [row["kept"] for row in measured["curve"]] == [96, 48, 10]
    assert len(measured["localization"]) == 2
    whole = measured["by_corpus"]["one"][0]
    assert all(part["on"]["one"][0] == whole for part in measured["localization"])


# -- localization on a planted example ---------------------------------------------------------------------------

def test_the_latents_of_one_corpus_explain_it_and_not_the_other(tiny_model):
    """Two corpora of disjoint words, a latent a word: those of the one say everything of it, nothing of the other."""
    vocabulary, draw = planted.words(), random.Random(0)
    spoken = {"one": vocabulary[5:800:40], "two": vocabulary[805:1600:40]}
    texts = {name: [" ".join(draw.choices(words, k=300)) for _ in range(2)] for name, words in spoken.items()}
    ids = tiny_model.tokenizer([" " + word for words in spoken.values() for word in words],
                               add_special_tokens=False)["input_ids"]
    streams = tiny_model.residual(torch.tensor([[tiny_model.bos_id, *one] for one in ids]))[:, 1]
    rows = torch.nn.functional.normalize(streams, dim=1)
    sae = SparseAutoencoder(rows.clone(), torch.zeros(len(rows)), rows, torch.zeros(D), architectures.get("topk")(k=1))
    held = importance.HeldOut([text for own in texts.values() for text in own], ["one", "one", "two", "two"], "")
    text, _ = compression.text_of(tiny_model, held, {"one": 0.03, "two": 0.03}, CONTEXT)
    x, of = tiny_model.residual(text.blocks)[:, 1:], torch.tensor([name == "two" for name in text.corpora])
    of = of[:, None].expand(x.shape[:2]).flatten().long()
    found = importance.importance(sae, x.flatten(0, 1), of, ["one", "two"])
    measured = compression.measure(sae, tiny_model, text, found, [1.0, 0.5], ["one", "two"])
    for part, own, other in zip(measured["localization"], ("one", "two"), ("two", "one")):
        known, unknown = (part["on"][name][1] for name in (own, other))
        whole = {name: part["on"][name][0] for name in (own, other)}
        assert part["kept_for"] == own and known["kept"] == len(rows) // 2
        assert known["explained_variance"] == pytest.approx(whole[own]["explained_variance"], abs=0.02) and (
            known["explained_variance"] > 0.7)
        assert unknown["explained_variance"] <= 0 and unknown["l0"] < 0.05
        assert known["loss_recovered"] - unknown["loss_recovered"] > 0.3


def test_a_latent_that_fired_once_does_not_lead():
    own, other = torch.tensor([1e-6, 2.0, 0.5, 0.0]), torch.tensor([0.0, 0.1, 0.5, 2.0])
    assert importance.leaning(own, other).argsort(descending=True).tolist() == [1, 0, 2, 3]
    assert torch.equal(importance.leaning(torch.zeros(3), torch.zeros(3)), torch.ones(3))


# -- the stages --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run on two corpora of files, and a dead one."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("left", "right")):
        documents = itertools.islice(planted.documents(seed), 900)
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    mixed = {str(folder / f"{name}.txt"): 1.0 for name in ("left", "right")}
    for name, changes in {"good": {}, "dead": {"architecture": "standard", "l1": 3000.0, "l1_warmup": 0.0,
                                               "lr": 0.02}}.items():
        p = params.check("train", tiny(corpus=mixed, spelling_share=0.2, tokens=40_000).model_dump() | SMALL | changes
                         | {"run": f"kept/{name}-s1"})
        activations.extract(p)
        trainer.train(p, activations.source(p), runs.start(p))
    return list(mixed)


def evaluated(name, **changes):
    values = {"run": f"kept/{name}-s1", "eval_preset": "smoke", "threads": 1, "mode": "batch", "device": "cpu",
              "compression_ratios": RATIOS}
    return evaluate.evaluate(params.check("eval", values | changes))


@pytest.fixture(scope="module")
def report(trained):
    return evaluated("good")["compression"]


def test_03_writes_curves_and_localization_of_a_run(report, trained):
    run = runs.Run("kept/good-s1")
    written = runs.read_json(run.path / "evals/compression.json")
    assert written["curve"] == report["curve"] and written["status"] == "valid"
    assert runs.read_json(run.path / "evals/done.json")["evals"] == ["compression", "core"]
    curve = pd.DataFrame(report["curve"])
    assert curve.ratio.tolist() == RATIOS and curve.kept.tolist() == [128, 64, 13]
    assert curve.explained_variance.is_monotonic_decreasing and curve.l0.is_monotonic_decreasing
    assert curve.loss_recovered[0] > 0.5 and curve.l0[0] == 8
    assert set(report["by_corpus"]) == {*trained, "spelling"}
    assert [(part["kept_for"], part["against"]) for part in report["localization"]] == list(
        itertools.permutations(trained, 2))
    assert report["config"]["blocks"].keys() == report["by_corpus"].keys()
    assert min(report["config"]["ranked_on_tokens"].values()) > 0


def test_03_with_all_latents_agrees_with_core(report):
    """The same measure on other tokens of the same text: near, and the rule of special tokens is core's."""
    core = runs.read_json(runs.Run("kept/good-s1").path / "evals/core.json")["metrics"]
    assert report["curve"][0]["loss_recovered"] == pytest.approx(core["ce_loss_score"], abs=0.1)
    assert report["curve"][0]["explained_variance"] == pytest.approx(core["explained_variance"], abs=0.1)


def test_an_invalid_runs_curve_is_no_result(trained):
    found = evaluated("dead")["compression"]
    assert found["status"] == "invalid" and found["not_a_result"]
    assert found["curve"] == [] and found["localization"] == [] and found["by_corpus"] == {}
    assert found["raw"]["curve"] and found["raw"]["not_a_result"] == found["not_a_result"]
    figure = figures_compression.of_run("dead", found)["compression_curves"]
    assert "left out: dead" in figure.layout.annotations[-1].text.replace("<br>", " ")
    assert not any(trace.y is not None for trace in figure.data)


def test_without_ratios_nothing_is_measured(trained):
    assert set(evaluated("good", compression_ratios=[])) == {"core", "nulls"}


def test_too_little_text_is_one_error(tiny_model):
    held = importance.HeldOut(["w"], ["one"], "")
    with pytest.raises(ParameterError, match="compression_ratios: one: held-out documents fill 0"):
        compression.text_of(tiny_model, held, {"one": 1.0}, CONTEXT)


@pytest.mark.parametrize("stage, key", [("eval", "compression_ratios"), ("letters", "absorption_ratios")])
@pytest.mark.parametrize("value", [[0.0], [1.5], [-0.5], [0.5, 0.5]])
def test_bad_ratios_are_one_clear_error(stage, key, value):
    with pytest.raises(ParameterError, match=f"{key}: expected shares of the latents, each above 0 and at most 1"):
        params.check(stage, {key: value})


def test_04_measures_absorption_by_share_of_latents(trained):
    values = {"run": "kept/good-s1", "absorption_preset": "smoke", "threads": 1, "mode": "batch", "device": "cpu"}
    found = letters.evaluate(params.check("letters", values | {"absorption_ratios": [1.0, 0.3]}))
    whole, part = found.by_ratio["by_ratio"]
    assert whole["metrics"] == found.report["metrics"] and whole["kept"] == 128 and part["kept"] == 39
    assert part["metrics"] != whole["metrics"]
    low, high = whole["interval"]["mean_full_absorption_score"]
    assert low <= whole["metrics"]["mean_full_absorption_score"] <= high
    assert runs.read_json(found.run.path / "evals/compression_absorption.json")["status"] == "valid"


def test_05_draws_what_some_run_holds(report, trained):
    found = compare.compare(params.check("compare", {"study": "kept", "runs": ["kept/good-s1", "kept/dead-s1"]}))
    drawn = figures_compression.of_study(found)
    assert set(drawn) == {"compression_curves", "localization"}
    lines = [trace for trace in drawn["localization"].data if trace.y is not None]
    assert len(lines) == 2 * 2 * 2  # rankings, corpora, metrics
    other = compare.compare(params.check("compare", {"study": "none", "runs": ["kept/absent-s1"]}))
    assert figures_compression.of_study(other) == {}


def test_bounds_are_drawn_or_said():
    bounds = [{"applicable": True, "holds": True, "tightness": {"mean": 0.6, "worst": 0.9}, "by_ratio": [
        {"ratio": 0.9, "mean": 0.5, "worst": 0.8, "holds": True}, {"ratio": 0.5, "mean": 0.6, "worst": 0.9}]},
        {"applicable": False, "reason": "latents are mixed"}, {"tightness": {"mean": 0.7}},
        {"holds": False, "by_ratio": [{"ratio": 0.5, "mean": 1.1, "worst": 1.3, "holds": False}]}]
    runs_ = [figures_compression.Kept(f"run{n}", {}, {}, {"bounded_mask": bound}) for n, bound in enumerate(bounds)]
    figure = figures_compression.all_figures(runs_)["bound_tightness"]
    said = " ".join(note.text for note in figure.layout.annotations).replace("<br>", " ")
    assert "latents are mixed" in said and "run3: the bound does NOT hold" in said and "run2: mean 0.7" in said
    assert [trace.name for trace in figure.data][:2] == ["run0, mean", "run0, worst"]


# -- corpora -----------------------------------------------------------------------------------------------------

TABLE = "Category\tText\nd\tstring\nclass\t\n" + "".join(
    f"{group}\t{word} post number {n}\n" for n in range(4) for group, word in
    (("sci.med", "medicine"), ("sci.space", "space"), ("rec.autos", "cars")))


@pytest.mark.parametrize("name, wanted", [("newsgroups_sci.med", {"medicine"}), ("newsgroups_space", {"space"}),
                                          ("newsgroups_sci", {"medicine", "space"}),
                                          ("newsgroups", {"medicine", "space", "cars"})])
def test_newsgroups_by_topic(tiny, monkeypatch, name, wanted):
    monkeypatch.setattr(assets, "member", lambda *_: TABLE.encode())
    found = list(sources.documents(name, tiny()))
    assert {text.split()[0] for text in found} == wanted and len(found) == 8 * len(wanted)


def test_an_unknown_topic_names_the_known_ones(tiny):
    with pytest.raises(ParameterError, match=r"no topic 'sci.medd'; did you mean 'sci.med'\? \(known: .*rec.autos"):
        list(sources.documents("newsgroups_sci.medd", tiny()))
    assert len(newsgroups.GROUPS) == 20


@pytest.mark.parametrize("name, asked", [("wikitext", ("Salesforce/wikitext", "wikitext-103-raw-v1")),
                                         ("wmdp_bio", ("cais/wmdp-bio-forget-corpus",)),
                                         ("owner/data:some", ("owner/data", "some"))])
def test_a_data_set_of_the_hub_may_name_a_configuration(tiny, monkeypatch, name, asked):
    import datasets

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: seen.append(a) or [{"text": "one"}, {"text": "two"}])
    assert sorted(sources.documents(name, tiny())) == ["one", "two"] and seen == [asked]


def test_a_store_knows_the_corpus_of_each_held_out_document(tiny, trained, tiny_store):
    assert set(tiny_store.heldout_sources()) == {"tiny", "spelling"}
    asked = params.check("train", tiny(corpus=dict.fromkeys(trained, 1.0), tokens=40_000).model_dump() | SMALL)
    found = activations.heldout_sources(asked)
    assert len(found) == len(activations.heldout_texts(asked)) and set(found) == {*trained, "spelling"}
    streamed = activations.heldout_sources(asked.model_copy(update={"store": "stream"}))
    assert streamed == found
    counts = activations.find(asked).manifest["counts"]["heldout"]
    assert counts["documents"] == {name: found.count(name) for name in counts["documents"]}
    assert corpus.shares(asked).keys() == counts["tokens"].keys()
