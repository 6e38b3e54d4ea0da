"""Training on a planted dictionary: it is found, and what goes wrong is recorded as what it is."""

import math

import pytest
import torch
from synthetic import Planted

from sae_lib import runs
from sae_lib.evaluation import validity
from sae_lib.params import ParameterError, check
from sae_lib.training import trainer
from sae_lib.training.ingredients import REGISTRY, Ingredient, configured, ingredient, load_sae

SMALL = {"d_sae": 96, "k": 3, "samples": 200_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 20, "mode": "batch",
         "threads": 1, "aux_dead_after": 5_000}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


def train(source=None, **values):
    p = check("train", SMALL | {"run": "trial", "overwrite": True} | values)
    run = runs.start(p)
    result = trainer.train(p, source or Planted(), run)
    return result, validity.update(run), run


def test_topk_finds_the_planted_dictionary():
    source = Planted()
    result, verdict, run = train(source)
    found = torch.nn.functional.normalize(result.sae.W_dec, dim=1) @ source.dictionary.T
    assert found.max(0).values.median() > 0.95
    assert result.report["explained_variance"] > 0.9
    assert verdict.status == "valid" and verdict.flags == []
    assert {"step", "loss/reconstruction", "explained_variance", "l0", "dead_share", "lr"} <= set(result.history)
    assert result.report["l0"] <= 3 + 1e-9
    assert run.json("provenance.json")["packages"]["torch"] .startswith("2.")


def test_same_seed_same_weights():
    one, two, other = (train(samples=20_000, seed=s)[0].sae.W_dec for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_an_ingredient_does_not_disturb_the_pairing():
    """Weight 0 of a term that draws random numbers: the same run, bit for bit."""
    plain = train(samples=20_000)[0].sae.W_dec
    part = {"name": "progressive_orthogonality", "weight": 1e-30}
    assert torch.equal(plain, train(samples=20_000, ingredients=[part])[0].sae.W_dec)


def test_decoder_rows_stay_unit_and_the_scale_is_folded():
    source = Planted()
    result, _, run = train(source, samples=50_000)
    assert torch.allclose(result.sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-5)
    x = source.test[:64]
    assert torch.allclose(load_sae(run.path / "sae")(x), result.sae(x))
    assert result.sae.input_scale == 1.0 and result.report["fold_error"] < 1e-5


def test_orthogonality_lowers_decoder_cosines():
    """On a dictionary of correlated directions, in each of three paired seeds; the term is neither inert nor more."""
    for seed in (1, 2, 3):
        source = Planted(correlated=0.5, seed=seed)
        plain, *_ = train(source, seed=seed, samples=100_000)
        part = {"name": "progressive_orthogonality", "weight": 0.2}
        pushed, verdict, _ = train(source, seed=seed, samples=100_000, ingredients=[part])
        assert pushed.report["mean_cos2"] < plain.report["mean_cos2"]
        assert verdict.status == "valid"
        assert verdict.flags == []


@pytest.mark.parametrize("l1", [0.5, 50.0])
def test_target_l0_is_reached_from_both_sides(l1):
    result, verdict, _ = train(architecture="standard", l1=l1, target_l0=4, lr=1e-3, samples=400_000)
    assert abs(result.report["l0"] / 4 - 1) < 0.1
    assert verdict.status == "valid"


@pytest.mark.parametrize("values, reason", [
    ({"architecture": "standard", "l1": 1e4, "l1_warmup": 0, "lr": 0.02}, "mean L0 is 0.0"),
    ({"stop_after_steps": 0}, "never trained: 0 steps"),
    ({"samples": 0}, "never trained: 0 steps"),
    ({"stop_after_steps": 10}, "fewer steps than planned: 10 of"),
    ({"lr": 1e30}, "not finite"),
])
def test_bad_runs_are_invalid_for_what_they_are(values, reason):
    result, verdict, run = train(**({"samples": 100_000} | values))
    assert verdict.status == "invalid" and any(reason in text for text in verdict.reasons), verdict
    assert run.json("validity.json")["status"] == "invalid"
    assert reason in validity.sentence(verdict)


def test_a_dead_sae_is_called_dead():
    result, verdict, _ = train(architecture="standard", l1=30.0, l1_warmup=0, lr=0.02, samples=200_000,
                               dead_after=50_000)
    assert any(text.startswith("dead: 9") for text in verdict.reasons)


def test_a_code_that_is_not_sparse_is_flagged():
    result, verdict, _ = train(architecture="standard", l1=0.0, samples=100_000)
    assert verdict.status == "valid" and verdict.flags[0].startswith("not sparse: L0")


def test_parameters_without_effect_and_schedules_unfinished_are_flagged():
    part = {"name": "progressive_orthogonality", "weight": {"kind": "linear", "start": 0.1, "end": 0, "finish": 5000}}
    _, verdict, _ = train(samples=50_000, l1=0.7, ingredients=[part])
    assert "parameter without effect: l1" in verdict.flags
    assert "schedule unfinished: progressive_orthogonality.weight" in verdict.flags


def test_inert_and_dominating_terms_are_flagged():
    for weight, word in ((1e-9, "inert"), (1e4, "dominates")):
        part = {"name": "progressive_orthogonality", "weight": weight}
        _, verdict, _ = train(samples=20_000, ingredients=[part])
        assert any(word in flag for flag in verdict.flags), (weight, verdict)


def test_a_fault_is_written_as_failed():
    class Broken(Planted):
        def batches(self, *args, **kwargs):
            yield from list(super().batches(*args, **kwargs))[:1]
            raise OSError("shard 3 cannot be read")
    p = check("train", SMALL | {"run": "broken"})
    run = runs.start(p)
    with pytest.raises(OSError):
        trainer.train(p, Broken(), run)
    assert run.json("validity.json")["status"] == "failed"
    assert "shard 3" in run.json("validity.json")["reasons"][0]
    assert not (run.path / "sae").exists()


def test_a_finished_run_is_not_overwritten_by_other_parameters():
    train(samples=20_000)
    with pytest.raises(runs.RunError, match="finished with other parameters .k"):
        runs.start(check("train", SMALL | {"run": "trial", "samples": 20_000, "k": 4}))
    runs.start(check("train", SMALL | {"run": "trial", "samples": 20_000, "k": 4, "overwrite": True}))


@pytest.mark.parametrize("entry, says", [
    ({"name": "progresive_orthogonality"}, "did you mean 'progressive_orthogonality'"),
    ({"name": "progressive_orthogonality", "wieght": 1}, "did you mean 'weight'"),
    ({"name": "progressive_orthogonality", "weight": "much"}, "progressive_orthogonality.weight"),
])
def test_bad_ingredients_are_refused_before_any_work(entry, says):
    with pytest.raises(ParameterError, match=says):
        configured(check("train", {"ingredients": [entry]}))


def test_set_changes_one_key():
    p = check("train", {"ingredients": [{"name": "progressive_orthogonality", "weight": 0.1}],
                        "set": "progressive_orthogonality.weight=0.3; progressive_orthogonality.chunk=64"})
    config = configured(p)[0][1]
    assert config.weight.start == 0.3 and config.chunk == 64
    with pytest.raises(ParameterError, match="set: 'other.x=1'"):
        configured(check("train", {"set": "other.x=1"}))


def test_an_ingredient_that_changes_the_forward_pass_is_saved_with_the_sae(monkeypatch):
    """It takes the dense path, is active after loading, and SAELens' format is not claimed for it."""
    @ingredient("test_gate")
    class Gate(Ingredient):
        needs = frozenset({"pre_acts"})
        changes_forward = True

        def before_selection(self, pre_acts, ctx):
            mask = torch.ones(pre_acts.shape[1])
            mask[::2] = 0
            return pre_acts * mask
    try:
        source = Planted()
        result, _, run = train(source, samples=20_000, ingredients=[{"name": "test_gate"}])
        assert result.report["kernel"].startswith("reference")
        latents = result.sae.encode(source.test)
        assert latents[:, ::2].abs().sum() == 0 and latents.abs().sum() > 0
        assert torch.allclose(result.sae.decode(latents), result.sae(source.test), atol=1e-5)
        assert runs.read_json(run.path / "sae/cfg.json")["architecture"] == "workbook_topk"
        assert math.isclose(result.sae.input_scale, source.scale)
    finally:
        del REGISTRY["test_gate"]
