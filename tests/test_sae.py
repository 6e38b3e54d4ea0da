"""Codes, schedules, metrics, and the saved format read back by SAELens."""

import math

import pytest
import torch

from sae_lib import metrics, runs
from sae_lib.params import ParameterError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.codes import CSR, Dense, FixedK
from sae_lib.training import measure
from sae_lib.training.schedules import Schedule, learning_rate_factor


def build(name="topk", d_in=16, d_sae=64, **config):
    g = torch.Generator().manual_seed(0)
    kind = architectures.get(name)
    sae = SparseAutoencoder.initialise(d_sae, torch.randn(d_in, generator=g), kind(**config), g)
    sae.b_enc.data += 0.1 * torch.randn(d_sae, generator=g)
    sae.W_enc.data += 0.1 * torch.randn(d_sae, d_in, generator=g)
    return sae.requires_grad_(False)


def test_three_forms_of_one_code():
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    fixed = FixedK(torch.tensor([[1, 3], [0, 1], [2, 0]]), torch.tensor([[2.0, 1.0], [0.0, 0.0], [0.0, 3.0]]), 4)
    for codes in (fixed, Dense(dense), fixed.csr(), Dense(dense).csr()):
        assert torch.equal(codes.dense(), dense)
        assert codes.l0() == 1.0 and codes.n_latents == 4
        assert codes.fired().tolist() == [True, True, False, True]
        assert isinstance(codes.csr(), CSR) and len(codes.csr().values) == 3
        assert torch.equal(codes.with_values(codes.values * 2).dense(), dense * 2)


@pytest.mark.parametrize("name, config", [("topk", {"k": 5}), ("standard", {})])
def test_sae_lens_reads_the_saved_sae(tmp_path, name, config):
    """Same latents and reconstruction, also after an activation scale was folded back."""
    from sae_lib.data.language_model import import_transformers
    import_transformers()
    from sae_lens import SAE

    trained = build(name, **config)
    x = 3 + 7 * torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    sae = trained.folded(0.13)
    assert torch.allclose(sae(x), trained(x * 0.13) / 0.13, atol=1e-4)
    sae.metadata = {"model_name": "tiny", "hook_name": "blocks.0.hook_resid_post"}
    sae.save(tmp_path / "sae")
    theirs = SAE.load_from_disk(str(tmp_path / "sae"), device="cpu")
    assert torch.allclose(theirs.encode(x), sae.encode(x), atol=1e-5)
    assert torch.allclose(theirs(x), sae(x), atol=1e-4)
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    back = SparseAutoencoder.load(tmp_path / "sae")
    assert torch.equal(back(x), sae(x)) and back.architecture.config() == sae.architecture.config()


def test_a_damaged_sae_is_one_clear_error(tmp_path):
    build("topk", k=5).save(tmp_path / "sae")
    (tmp_path / "sae/sae_weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(runs.RunError, match="sae_weights.safetensors: cannot be read"):
        SparseAutoencoder.load(tmp_path / "sae")
    (tmp_path / "sae/cfg.json").write_text('{"architecture": "tpok"}')
    with pytest.raises(runs.RunError, match="'tpok' is not known; did you mean 'topk'"):
        SparseAutoencoder.load(tmp_path / "sae")
    with pytest.raises(ParameterError, match="did you mean 'standard'"):
        architectures.get("standart")


def test_explained_variance_is_0_for_the_mean_and_1_for_the_identity():
    x = 5 + torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.explained_variance(x, x.mean(0).expand_as(x)) == pytest.approx(0, abs=1e-9)
    assert metrics.explained_variance(x, x) == 1
    assert metrics.explained_variance(x, torch.zeros_like(x)) < -10
    noise = x + 0.5 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    assert metrics.explained_variance(x, noise) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50)])
def test_mean_cos2_is_the_mean_over_pairs(shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    off = (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]
    assert metrics.mean_cos2(rows) == pytest.approx(float(off.square().mean()))
    assert metrics.mean_cos2(rows, block=4) == pytest.approx(float(off.square().mean()))


def test_random_directions_have_mean_cos2_of_one_over_d():
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.mean_cos2(rows) == pytest.approx(1 / 64, rel=0.02)


def test_folding_decoder_norms_shows_rows_that_are_not_unit():
    sae = build("topk", k=5)
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    assert measure.fold_error(sae, x) < 1e-5
    sae.W_dec.data[:32] *= 3
    assert measure.fold_error(sae, x) > 1e-2


def test_geometric_median_minimises_the_summed_distance():
    from scipy.optimize import minimize
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:20] += 50
    best = minimize(lambda m: float((x - torch.tensor(m)).norm(dim=1).sum()), x.mean(0).numpy(), tol=1e-9).x
    assert torch.allclose(measure.geometric_median(x), torch.tensor(best), atol=1e-3)


@pytest.mark.parametrize("fields, expected", [
    ({"start": 0.3}, lambda p: 0.3),
    ({"kind": "linear", "start": 1, "end": 2}, lambda p: 1 + p),
    ({"kind": "quadratic", "start": 0.1, "end": 0}, lambda p: 0.1 * (1 - p) ** 2),
    ({"kind": "quadratic", "ease": "in", "start": 1, "end": 2}, lambda p: 1 + p**2),
    ({"kind": "exponential", "start": 0.1, "rate": 2}, lambda p: 0.1 * math.exp(-2 * p)),
    ({"kind": "cosine", "start": 1, "end": 0}, lambda p: (1 + math.cos(math.pi * p)) / 2),
    ({"kind": "step", "start": 1, "end": 5, "finish": 0.5}, lambda p: 5 if p >= 0.5 else 1),
    ({"kind": "linear", "start": 0, "end": 1, "begin": 0.5}, lambda p: max(0, 2 * p - 1)),
    ({"kind": "linear", "start": 0, "end": 1, "finish": 50}, lambda p: min(1, 2 * p)),
])
def test_schedules(fields, expected):
    schedule = Schedule(**fields)
    for step in (0, 13, 50, 99, 100):
        assert schedule(step, 100) == pytest.approx(expected(step / 100))


def test_a_schedule_longer_than_the_run_is_unfinished():
    assert Schedule(kind="linear", start=0, end=1, finish=5000).unfinished(100, 100)
    assert not Schedule(kind="linear", start=0, end=1).unfinished(100, 100)
    assert Schedule(kind="linear", start=0, end=1).unfinished(60, 100)
    assert not Schedule(start=1).unfinished(0, 100)


def test_learning_rate_warms_up_and_decays():
    values = [learning_rate_factor(step, 100, 10, 0.2) for step in range(100)]
    assert values[0] == 0.1 and values[9] == 1 and values[79] == 1 and values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)
