"""The compression bound holds for what is declared, and fails for what is not."""

import pytest
import torch
from synthetic import Planted
from test_compression import F
from test_trainer import train

from sae_lib.evaluation import validity
from sae_lib.runs import read_json, write_json
from sae_lib.training.bound import check, report
from sae_lib.training.ingredients import load_sae

MASK = {"name": "bounded_mask", "ratio": 0.5, "skip": 0.1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a hard mask of a half and skip 0.1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_WORKBOOK_HOME", str(tmp_path_factory.mktemp("bound")))
        yield train(samples=60_000, ingredients=[MASK])


@pytest.fixture
def sae(trained):
    """Its SAE, freshly read."""
    return load_sae(trained[2].path / "sae")


def declared(sae):
    hook = sae.hooks[0]
    return hook.state["mask"].clone(), float(hook.state["in_force"][1])


def test_it_holds_for_a_trained_run(trained):
    result, verdict, _ = trained
    found = result.report["measured"]["bounded_mask"]["bound"]
    assert verdict.status == "valid" and found["applicable"] and found["holds"]
    assert found["decoded"] == {"violations": 0, "worst": pytest.approx(0, abs=1e-12)}
    assert 0 < found["tightness"]["worst"] <= found["tightness"]["mean"] <= 1
    assert found["tightness"]["mean"] <= found["tightness_decoded"]["mean"] <= 1
    against = found["by_ratio"]
    assert [entry["ratio"] for entry in against] == sorted(entry["ratio"] for entry in against)
    assert against[-1]["mean"] == pytest.approx(1) and against[-1]["bound"] == pytest.approx(against[-1]["measured"])
    assert all(entry["measured"] <= entry["bound"] for entry in against)


def test_the_parts_are_those_of_the_formula(sae):
    """From the definition, on one token, with the masked codes taken from the mask by hand."""
    mask, skip = declared(sae)
    x = Planted().test[:1]
    found = check(sae, x, mask, skip)
    scaled = (x * sae.input_scale).double()
    with torch.no_grad():
        a = (scaled - sae.b_dec) @ sae.W_enc.T.double() + sae.b_enc
        f = a.relu() * torch.zeros_like(a).scatter(1, a.topk(3).indices, 1.0)
        lost = f * (1 - (mask[0] + skip).clamp(0, 1))
        error = (scaled - f @ sae.W_dec.double() - sae.b_dec).norm()
        measured = (scaled - (f - lost) @ sae.W_dec.double() - sae.b_dec).norm()
        middle, bound = error + (lost @ sae.W_dec.double()).norm(), error + lost.sum()
    assert found["tightness"]["mean"] == pytest.approx(float(measured / bound), rel=1e-6)
    assert found["tightness_decoded"]["mean"] == pytest.approx(float(measured / middle), rel=1e-6)


def test_a_row_that_is_not_of_unit_norm_breaks_it(sae):
    mask, skip = declared(sae)
    shut = int((mask[0] == 0).nonzero()[0])
    for factor in (0.99, 1.01):
        sae.W_dec[shut] *= factor
        assert not check(sae, Planted().test, mask, skip)["holds"]
        sae.W_dec[shut] /= factor
    assert check(sae, Planted().test, mask, skip)["holds"]
    sae.W_dec.mul_(1 + 2 * (mask[0] == 0)[:, None])
    found = check(sae, Planted().test, mask, skip)
    assert not found["holds"] and found["summed"]["violations"] > 0 and found["summed"]["worst"] > 0.1


def test_a_corrupted_mask_breaks_it(sae):
    """The forward pass shuts what is declared open, or opens what is declared shut."""
    mask, skip = declared(sae)
    other = sae.hooks[0].state
    other["mask"].copy_(torch.ones_like(mask))
    opened = check(sae, Planted().test, mask, skip)
    assert not opened["holds"] and opened["mask_error"] > 1e-3
    other["mask"].copy_(torch.zeros_like(mask))
    other["in_force"][1] = 0
    closed = check(sae, Planted().test, mask, skip)
    assert not closed["holds"] and closed["decoded"]["violations"] > 0
    other["mask"].copy_(mask)
    other["in_force"][1] = skip
    other["mask"][0, :2] = 1 - other["mask"][0, :2]
    assert not check(sae, Planted().test, mask, skip)["holds"]


def test_a_bound_that_does_not_hold_makes_the_run_invalid(trained):
    run = trained[2]
    training = read_json(run.path / "training.json")
    training["measured"]["bounded_mask"]["bound"] |= {"holds": False, "mask_error": 0.3}
    write_json(run.path / "training.json", training)
    verdict = validity.update(run)
    assert verdict.status == "invalid"
    assert verdict.reasons[0].startswith("the compression bound does not hold: bounded_mask")


def test_where_it_does_not_apply_it_says_why(sae):
    mask, skip = declared(sae)
    for name, reason in (("layer_norm", "normalised"), ("mixing", "mixed"), ("other", "changes the forward pass too")):
        sae.hooks.append(type("Other", (), {"name": name})())
        found = report(sae, Planted().test, mask, skip, "bounded_mask")
        assert found["applicable"] is False and reason in found["reason"]
        sae.hooks.pop()
    assert len(mask[0]) == F
