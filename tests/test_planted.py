"""A planted truth: worlds come out the same, and what is measured is what was built in."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lib import params, runs
from sae_lib.data import activations, language_model, planted
from sae_lib.data.planted import Truth, World
from sae_lib.evaluation import false_claims, validity
from sae_lib.evaluation import truth as truths
from sae_lib.params import ParameterError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training import trainer

SMALL = {"d_in": 24, "features": 32, "rows": 20_000, "heldout": 2000, "parents": 4, "children": 2, "lowest": 0.03,
         "children_per_row": 0.5}


@pytest.fixture(scope="module")
def orthonormal():
    """A world of 16 features in 16 dimensions, its directions made orthonormal: 3 parents of 2 children each."""
    world = World(d_in=16, features=16, rows=10, heldout=3000, parents=3, children=2, highest=0.3, lowest=0.15,
                  children_per_row=0.8, correlation=0, bias=0)
    truth = planted.sample(world)[1]
    directions = torch.linalg.qr(truth.directions.T)[0].T.contiguous()
    truth = truth._replace(directions=directions)
    return planted.activations_of(truth, truth.features), truth


def of_rows(encoder, decoder, bias=0.0):
    """A ReLU SAE of these rows, the decoder's made of norm 1, latents in proportion."""
    norms = decoder.norm(dim=1)
    return SparseAutoencoder(encoder * norms[:, None], torch.full((len(encoder),), bias), decoder / norms[:, None],
                             torch.zeros(decoder.shape[1]), architectures.get("standard")(l1=0.0, target_l0=None))


def absorbing(truth: Truth, children: list[int]):
    """An SAE of the true features, but that ``children`` carry their parents, whose latents are then silent."""
    encoder, decoder = truth.directions.clone(), truth.directions.clone()
    for child in children:
        parent = int(truth.parent[child])
        encoder[parent] -= 100 * truth.directions[child]
        decoder[child] += truth.directions[parent]
    return of_rows(encoder, decoder)


def test_same_seed_same_world_bit_for_bit():
    before = torch.random.get_rng_state()
    (x, one), (again, two), (other, _) = (planted.sample(World(**SMALL, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(x, again) and all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(x, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_world_is_a_store_that_training_reads(elsewhere):
    text = "planted:" + ",".join(f"{key}={value}" for key, value in SMALL.items())
    p = params.check("train", {"model": "planted", "layer": 0, "activations": text})
    store = activations.source(p)
    truth = planted.truth_of(store.path)
    assert (store.n_train, store.n_heldout, store.d_in) == (20_000, 2000, 24)
    assert torch.equal(store.heldout().x, planted.activations_of(truth, truth.features))
    batch = next(iter(store.batches(256, 256, seed=1)))
    assert math.isclose(float((batch.x * store.scale).square().sum(1).mean()), 24, rel_tol=0.1)
    assert activations.source(p).content_hash == store.content_hash
    assert runs.read_json(store.path / "world.json")["world"]["parents"] == 4


def test_children_fire_with_their_parents_alone_and_as_often_as_asked():
    truth = planted.sample(World(**SMALL | {"heldout": 20_000}))[1]
    assert truth.parent.tolist()[:12] == [-1] * 4 + [0, 0, 1, 1, 2, 2, 3, 3] and set(truth.parent[12:].tolist()) == {-1}
    on = truth.features > 0
    for child in range(4, 12):
        assert not (on[:, child] & ~on[:, truth.parent[child]]).any()
    shares = on.double().mean(0)
    assert shares[0] == pytest.approx(0.2, abs=0.01) and shares[-1] == pytest.approx(0.03, abs=0.005)
    assert (shares[4:12] / shares[truth.parent[4:12]]).tolist() == pytest.approx([0.25] * 8, abs=0.06)


@pytest.mark.parametrize("text, says", [
    ("planted:featurs=3", "did you mean 'features'"),
    ("planted:features=10", "features: expected at least .* for 8 parents of .* each, got 10"),
    ("planted:features=[", "features: Input should be a valid integer"),
    ("planted:magnitude=inf", "magnitude: Input should be a finite number"),
    ("planted:lowest=0.5", "must be below highest"),
    ("planted:[=1", "is not key=value"),
])
def test_a_world_that_cannot_be_is_refused(text, says):
    with pytest.raises(ParameterError, match=says):
        planted.parse(text)


def test_a_planted_world_is_no_language_model():
    with pytest.raises(ParameterError, match="no language model"):
        language_model.check_layer("planted", "blocks.0.hook_resid_post")


def test_mcc_of_the_truth_is_one_and_of_random_rows_what_chance_gives():
    language_model.import_transformers()
    from sae_lens.synthetic import mean_correlation_coefficient

    g = torch.Generator().manual_seed(0)
    directions, rows = (torch.nn.functional.normalize(torch.randn(n, 64, generator=g), dim=1) for n in (64, 96))
    exact = truths.match_rows(directions, directions[torch.randperm(64, generator=g)])
    assert exact.mcc == pytest.approx(1) and sorted(exact.latent) == list(range(64))
    random = truths.match_rows(directions, rows)
    assert random.mcc == pytest.approx(mean_correlation_coefficient(directions, rows), abs=1e-6)
    # |cosine| of random directions is about half normal of scale 1/8; the best of 96 has a mean of about 2.8 scales,
    # and one to one a little less.
    assert 2.0 / 8 < random.mcc < 2.8 / 8
    assert truths.match_rows(directions, directions[:16]).mcc == pytest.approx(1 / 4)
    assert truths.recovered(directions, directions[:16]) == 0.25
    assert truths.recovered(directions, rows) == 0


def test_matching_by_activations(orthonormal):
    _, truth = orthonormal
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    found = truths.match_activations(truth.features, 3 * truth.features[:, order])
    assert found.mcc == pytest.approx(1) and (order[torch.from_numpy(found.latent)] == torch.arange(16)).all()
    assert truths.match_activations(truth.features, torch.ones(len(truth.features), 16)).mcc == 0


@pytest.mark.parametrize("children", [[], [3], [3, 4, 5, 6, 7, 8]])
def test_true_absorption_is_the_rate_that_was_built_in(orthonormal, children):
    x, truth = orthonormal
    measured, by_parent = truths.measure(absorbing(truth, children), x, truth)
    expected = []
    for parent in range(3):
        on, own = truth.features[:, parent], (truth.parent == parent).nonzero()[:, 0].tolist()
        both = (on > 0) & (truth.features[:, own] > 0).any(1)
        # A child's latent carries its own strength of the parent's direction: nearly always over the share asked.
        carried = truth.features[:, [child for child in own if child in children] or [15]] * bool({*own} & {*children})
        expected.append(float((both & (carried.max(1).values >= 0.4 * on)).sum() / both.sum()))
    assert by_parent.rate.tolist() == pytest.approx(expected)
    assert measured["true_absorption"] == pytest.approx(np.mean(expected))
    assert (max(expected) > 0.5) == bool(children) and (min(expected) > 0.99) == (len(children) == 6)
    if not children:
        assert measured["true_absorption"] == 0 and measured["recovered"] == 1 and measured["mcc"] == pytest.approx(1)


def test_a_parent_without_a_latent_has_no_absorption(orthonormal):
    x, truth = orthonormal
    rows = truth.directions[1:]
    measured, by_parent = truths.measure(of_rows(rows, rows), x, truth)
    assert by_parent.known.tolist() == [False, True, True] and math.isnan(by_parent.rate[0])
    assert measured["true_absorption"] == 0 and measured["parents_known"] == 2


def rare_children():
    """Two parents, on a fourth of whose rows one of eight children fires, and six other features; 24 in all."""
    g = torch.Generator().manual_seed(0)
    features = (torch.rand(6000, 24, generator=g) < 0.15) * (1 + 0.1 * torch.rand(6000, 24, generator=g))
    parent = torch.full((24,), -1)
    for number in range(2):
        own = slice(2 + 8 * number, 10 + 8 * number)
        parent[own] = number
        on = torch.rand(6000, generator=g) < 0.3
        which = torch.nn.functional.one_hot(torch.randint(8, (6000,), generator=g), 8)
        with_child = on & (torch.rand(6000, generator=g) < 0.25)
        features[:, number], features[:, own] = on.float(), (which * with_child[:, None]).float()
    directions = torch.linalg.qr(torch.randn(24, 24, generator=g))[0]
    truth = Truth(directions, torch.zeros(24), parent, features)
    return planted.activations_of(truth, features), truth


def test_saebench_sees_the_absorption_that_was_built_in():
    """By rare children, each too little to count as a latent that the parent was split into."""
    from sae_lib.evaluation.saebench import planted as bench

    x, truth = rare_children()
    material = bench.prepare(x, truth)
    assert min(material.f1) > 0.95
    whole, table = bench.absorption(absorbing(truth, []), material)
    assert whole["full_absorption"] == 0 and whole["parents_kept"] == 2 and table.split_latents.tolist() == [[0], [1]]
    sae = absorbing(truth, list(range(2, 18)))
    taken, table = bench.absorption(sae, material)
    true = truths.measure(sae, x, truth)[0]
    assert true["true_absorption"] == 1 and true["true_absorption_of_parent"] == pytest.approx(0.25, abs=0.02)
    assert taken["full_absorption_with_child"] > 0.95 and table.true_positives.tolist() == [200, 200]
    assert taken["full_absorption"] == pytest.approx(0.25, abs=0.06)
    dead = of_rows(truth.directions, truth.directions, bias=-100.0)
    scored = bench.absorption(dead, material)[0]
    assert scored["full_absorption"] is None and "no latent predicts" in scored["note"]


def test_saebench_calls_absorption_by_frequent_children_a_split(orthonormal):
    """Their latents are then among the parent's own, one of which fires: 0, where truly nearly all is absorbed."""
    from sae_lib.evaluation.saebench import planted as bench

    x, truth = orthonormal
    sae = absorbing(truth, [3, 4, 5, 6, 7, 8])
    scored, table = bench.absorption(sae, bench.prepare(x, truth), preset="smoke")
    assert truths.measure(sae, x, truth)[0]["true_absorption"] > 0.99
    assert scored["full_absorption"] == 0 and table.split_latents.map(len).tolist() == [3, 3, 3]


def test_rank_correlation_and_its_interval():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    found = truths.rank_correlation(a, a + rng.normal(size=40))
    assert found.low < found.rho < found.high and found.low > 0 and found.n == 40
    assert found == truths.rank_correlation(pd.Series(a), a + np.random.default_rng(0).normal(size=80)[40:])
    assert truths.rank_correlation(a, np.exp(a)).rho == pytest.approx(1)
    assert math.isnan(truths.rank_correlation([1, 2, None], [1, 2, 3]).rho)


def test_a_short_training_recovers_most_features(elsewhere):
    world = World(d_in=32, features=32, rows=30_000, heldout=2000, parents=0, correlation=0, lowest=0.05)
    store, truth = planted.open_world(world)
    p = params.check("train", {"run": "planted", "model": "planted", "layer": 0, "d_sae": 48, "k": 4, "lr": 3e-3,
                               "samples": 200_000, "batch_size": 256, "warmup_steps": 20, "threads": 1,
                               "mode": "batch", "aux_dead_after": 5000, "coactivation_window": 0})
    run = runs.start(p)
    result = trainer.train(p, store, run)
    assert validity.update(run).status == "valid"
    measured, _ = truths.measure(result.sae, store.heldout().x, truth)
    assert measured["recovered"] > 0.7 and measured["mcc"] > 0.85
    assert measured["true_absorption"] is None and measured["parents"] == 0


def test_a_run_on_a_world_is_evaluated_by_its_truth_and_has_no_letters(elsewhere):
    from sae_lib.evaluation import evaluate, letters, results
    from sae_lib.views import figures_truth

    world = "planted:" + ",".join(f"{key}={value}" for key, value in (SMALL | {"highest": 0.3}).items())
    p = params.check("train", {"run": "planted", "model": "planted", "layer": 0, "activations": world, "d_sae": 48,
                               "k": 4, "lr": 3e-3, "samples": 100_000, "batch_size": 256, "threads": 1,
                               "mode": "batch", "coactivation_window": 0})
    store = activations.source(p)
    run = runs.start(p)
    result = trainer.train(p, store, run)
    found = evaluate.evaluate(params.check("eval", {"run": "planted", "evals": ["truth"], "mode": "batch"}))["truth"]
    truth = planted.truth_of(store.path)
    own = truth._replace(features=truth.features[1000:])
    same = truths.measure(result.sae, store.heldout().x[1000:], own)[0]
    assert found["metrics"]["mcc"] == pytest.approx(same["mcc"]) and found["config"]["world"]["features"] == 32
    assert found["metrics"]["true_absorption"] == pytest.approx(same["true_absorption"])
    assert letters.evaluate(params.check("letters", {"run": "planted", "mode": "batch"})).report == {}
    assert runs.Run("planted").json("evals/letters_done.json")["evals"] == []
    row = results.collect(["planted"]).iloc[0]
    assert row.status == "valid" and row.mcc == found["metrics"]["mcc"] and row.truth == found["config"]["comparable"]
    assert list(figures_truth.of_run({"truth": found}).metric)[:2] == ["Mean correlation coefficient",
                                                                       "Features recovered"]
    assert set(figures_truth.of_study(results.collect(["planted"]))) == {"planted_truth"}
    with pytest.raises(ParameterError, match="no language model"):
        evaluate.evaluate(params.check("eval", {"run": "planted", "evals": ["core"], "mode": "batch"}))


def test_the_truth_of_a_language_model_is_not_known():
    from sae_lib.evaluation import planted_run

    with pytest.raises(ParameterError, match="whose features nobody knows"):
        planted_run.evaluate(None, params.check("train", {"model": "tiny", "layer": 0}))


def claims_table(rng, shift=0.0):
    """Six runs as 05's table has them, with two metrics drawn anew; the last three shifted."""
    names = [f"pairs/x-s{number}" for number in range(6)]
    table = pd.DataFrame({"run": names, "variant": "x", "status": "valid", "role": "normal", "model": "planted",
                          "seed": range(6), "l0": 4.0, "mcc": rng.normal(size=6), "mse": rng.normal(size=6)})
    table.loc[3:, "mcc"] += shift
    return false_claims.pair(table, names[:3], names[3:])


def test_the_rate_of_false_claims_is_the_nominal_one():
    rng = np.random.default_rng(0)
    found = false_claims.rate((claims_table(rng) for _ in range(150)), ["mcc", "mse"]).set_index("metric")
    assert found.pairs.tolist() == [150] * 4
    for metric in ("mcc", "mse"):
        assert found.low[metric] < 0.05 < found.high[metric]
    assert found.claims[false_claims.ANY] >= found.claims[["mcc", "mse"]].max()
    assert found.low[false_claims.ANY_COUNTED] < 0.05 and (
        found.claims[false_claims.ANY_COUNTED] < found.claims[false_claims.ANY])
    shifted = false_claims.rate((claims_table(rng, 100.0) for _ in range(5)), ["mcc"]).set_index("metric")
    assert shifted.share["mcc"] == 1 and shifted.low["mcc"] == pytest.approx(0.025 ** (1 / 5))
    few = claims_table(rng).iloc[[0, 1, 3, 4]]
    assert false_claims.rate([few], ["mcc"]).empty
    assert false_claims.clopper_pearson(0, 20) == pytest.approx((0, 0.1684), abs=1e-3)


def test_the_figure_says_the_rank_correlation_and_leaves_out_what_is_not_valid():
    from sae_lib.views import figures_truth

    rng = np.random.default_rng(0)
    table = pd.DataFrame({name: rng.random(12) for pair in figures_truth.COMPARED for name in pair})
    table = table.assign(architecture=["topk", "standard"] * 6, d_sae=64, l0=3.0, mcc=0.9, true_l0=2.5,
                         status=["valid"] * 11 + ["invalid"])
    said = [figures_truth.truth(drawn, "World planted").layout.annotations[-1].text.replace("<br>", " ")
            for drawn in (table, table.assign(status="invalid"))]
    assert all(text in said[0] for text in ("11 SAEs", "not valid: 1 of 12", "rho", "World planted"))
    assert "none (0 SAEs" in said[1]
