"""Gradient projection and balancing: what is left of a gradient, with every architecture, and after an interruption."""

import pytest
import torch
from synthetic import Planted
from test_resume import Interrupted, assert_same
from test_resume import train as train_in
from test_trainer import train

from sae_lib.params import ParameterError, check
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training.ingredients import configured
from sae_lib.training.row_projection import nearest_rows, project, project_by_torch

F, D = 60, 24
BOTH = [{"name": "gradient_projection", "every": 7}, {"name": "gradient_balancing"}]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


def made(entry, near=0.3):
    """The ingredient, an SAE whose pairs of decoder rows are ``near``, with gradients of very unlike rows."""
    kind, config = configured(check("train", {"ingredients": [entry]}))[0]
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    rows[1::2] = torch.nn.functional.normalize(rows[::2] + near * rows[1::2], dim=1)
    sae = SparseAutoencoder(rows.clone(), torch.zeros(F), rows, torch.zeros(D),
                            architectures.get("topk")(k=3, aux_k=0, aux_weight=0))
    for weights in (sae.W_enc, sae.W_dec):
        weights.grad = torch.randn(F, D, generator=g) * torch.logspace(-0.6, 0.6, F)[:, None]
        weights.grad[5] = 0
    return kind(config, D, F), sae


@torch.no_grad()
def apply(part, sae, step=0):
    part.on_gradients(sae, Context(sae, torch.zeros(1, D), step, 1000))


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("near", [1.0, 0.1])
def test_no_component_along_neighbours_is_left(count, near):
    part, sae = made({"name": "gradient_projection", "neighbours": count}, near)
    rows, before = sae.W_dec.detach(), sae.W_dec.grad.clone()
    cos = (rows @ rows.T).abs().fill_diagonal_(-1)
    nearest = cos.topk(count, dim=1).indices
    apply(part, sae)
    assert torch.equal(part.state["neighbours"].sort(1).values, nearest.sort(1).values)
    after = sae.W_dec.grad
    given = after.norm(dim=1) > 0
    left = torch.einsum("fnd,fd->fn", rows[nearest], after).abs() / after.norm(dim=1, keepdim=True).clamp_min(1e-30)
    assert given.sum() == F - 1 and not after[5].any()
    assert left[given].max() < 1e-5
    # And it is the projection: what was taken lies in the span of the neighbours and of the row itself.
    basis = torch.cat([rows[:, None], rows[nearest]], 1).double()
    taken = (before - after).double()
    fitted = torch.linalg.lstsq(basis.mT, taken[..., None]).solution
    assert torch.allclose((basis.mT @ fitted)[..., 0], taken, atol=1e-4)
    assert 0 < part.log(None)["gradient_projection/removed"] < 1


def test_projection_in_float64_and_twice_the_same_row():
    """Against an orthonormal basis; a neighbour that equals the row adds nothing and breaks nothing."""
    g = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g, dtype=torch.float64), dim=1)
    rows[7] = rows[8]
    neighbours, gradient = nearest_rows(rows, 3), torch.randn(F, D, generator=g, dtype=torch.float64)
    assert neighbours[7, 0] == 8
    expected = gradient.clone()
    for f in range(F):
        own = [f, *neighbours[f].tolist()]
        directions = torch.linalg.svd(rows[own], full_matrices=False)
        basis = directions.Vh[directions.S > 1e-6]
        expected[f] -= basis.T @ (basis @ expected[f])
    other = gradient.clone()
    project(gradient, rows, neighbours)
    project_by_torch(other, rows, neighbours)
    assert torch.allclose(gradient, expected, atol=1e-9) and torch.allclose(other, expected, atol=1e-9)


def test_neighbours_are_kept_between_searches():
    part, sae = made({"name": "gradient_projection", "every": 10})
    apply(part, sae, 0)
    first = part.state["neighbours"].clone()
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(9)), dim=1)
    apply(part, sae, 9)
    assert torch.equal(part.state["neighbours"], first)
    apply(part, sae, 10)
    assert not torch.equal(part.state["neighbours"], first)


def test_what_is_projected_stays_so():
    """Nothing along the row itself is left, so taking that away before Adam brings no neighbour's part back."""
    part, sae = made({"name": "gradient_projection"})
    apply(part, sae)
    rows, used = sae.W_dec.detach(), sae.W_dec.grad
    along = (used * rows).sum(1, keepdim=True)
    assert (along.abs() < 1e-5 * used.norm(dim=1, keepdim=True).clamp_min(1e-30)).all()


@pytest.mark.parametrize("strength, limit", [(1.0, 10.0), (1.0, 2.0), (0.5, 10.0), (0.0, 10.0)])
def test_balanced_rows_have_the_mean_norm_and_their_directions(strength, limit):
    part, sae = made({"name": "gradient_balancing", "strength": strength, "limit": limit})
    before = {name: getattr(sae, name).grad.clone() for name in ("W_enc", "W_dec")}
    apply(part, sae)
    for name, old in before.items():
        new, norms = getattr(sae, name).grad, old.norm(dim=1)
        given = norms > 0
        mean = norms[given].mean()
        factors = ((mean / norms[given]) ** strength).clamp(1 / limit, limit)
        assert torch.allclose(new.norm(dim=1)[given], norms[given] * factors, rtol=1e-4) and not new[5].any()
        assert torch.allclose(torch.cosine_similarity(new, old)[given], torch.ones(F - 1), atol=1e-5)
        if strength == 1 and limit == 10:
            assert torch.allclose(new.norm(dim=1)[given], mean.expand(F - 1), rtol=1e-4)


@pytest.mark.parametrize("architecture", sorted(architectures.REGISTRY))
def test_every_architecture_trains(architecture):
    result, *_ = train(samples=20 * 256, architecture=architecture, ingredients=BOTH, log_points=5)
    assert result.report["steps"] == 20 and result.report["nonfinite"] is None
    removed = result.history["gradient_projection/removed"]
    assert ((removed > 0) & (removed < 1)).all()
    assert torch.allclose(result.sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-5)


def test_they_still_find_the_planted_dictionary():
    source = Planted()
    result, verdict, _ = train(source, ingredients=BOTH)
    assert verdict.status == "valid" and result.report["explained_variance"] > 0.8


@pytest.mark.parametrize("entries", [BOTH, [{"name": "gram_schmidt", "latents": 2}]], ids=["gradients", "gram_schmidt"])
def test_interrupted_they_go_on_to_the_same_bits(tmp_path, entries):
    whole, _ = train_in(tmp_path / "whole", ingredients=entries)
    assert train_in(tmp_path / "broken", Interrupted(37), ingredients=entries)[0] is None
    resumed, _ = train_in(tmp_path / "broken", ingredients=entries)
    assert resumed.report["resumed_at"] == [30]
    assert_same(whole, resumed)


@pytest.mark.parametrize("entry", [{"name": "gradient_projection", "neighbours": 9},
                                   {"name": "gradient_balancing", "limit": 0.5},
                                   {"name": "gradient_balancing", "strength": 2}])
def test_bad_values_are_refused(entry):
    with pytest.raises(ParameterError, match=entry["name"]):
        configured(check("train", {"ingredients": [entry]}))
