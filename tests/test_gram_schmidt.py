"""Per-token Gram-Schmidt: the compiled form beside its definition in float64, and what training with it leaves."""

import numba
import pytest
import torch
from synthetic import Planted
from test_trainer import train

from sae_lib import runs
from sae_lib.params import ParameterError, check
from sae_lib.sae.codes import CSR, Dense, FixedK
from sae_lib.sae.kernels import gram_schmidt
from sae_lib.sae.kernels.sparse import Sparse
from sae_lib.training.ingredients import configured, load_sae

GRAM_SCHMIDT = {"ingredients": [{"name": "gram_schmidt", "latents": 4}]}
B, F, D, K = 37, 90, 70, 12


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


def planted(near=1.0, seed=0):
    """Latents (B, F), float32, with ties and a token that has none; unit rows (F, D), pairs of them ``near``."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    rows[1::2] = torch.nn.functional.normalize(rows[::2] + near * rows[1::2], dim=1)
    latents = torch.zeros(B, F)
    for b, count in enumerate(torch.randint(1, K + 1, (B,), generator=g).tolist()):
        start = 2 * int(torch.randint(F // 2 - K, (1,), generator=g))
        latents[b, start:start + count] = 0.5 + torch.rand(count, generator=g).mul(8).round() / 8
    latents[5] = 0
    return latents, rows


def forms(latents):
    """The same latents as slots in no order (some inactive), ragged and dense."""
    g = torch.Generator().manual_seed(1)
    values, indices = (latents + 1e-3 * torch.rand(latents.shape, generator=g)).topk(K + 3, dim=1)
    mixed = torch.rand(indices.shape, generator=g).argsort(1)
    indices = indices.gather(1, mixed)
    return {"fixed": FixedK(indices, latents.gather(1, indices), F), "ragged": Dense(latents).csr(),
            "dense": Dense(latents)}


def defined(latents, rows, m, eps):
    """x_hat (B, D) without the bias, as the study says: token by token, rows orthonormalised one after the other."""
    x_hat = []
    for f in latents:
        order = sorted((f > 0).nonzero()[:, 0].tolist(), key=lambda i: (-float(f[i]), i))
        first, rest = order[:m], order[m:]
        own = rows[first]
        lower = torch.linalg.cholesky(own @ own.T + eps * torch.eye(len(first), dtype=rows.dtype))
        directions = torch.linalg.solve_triangular(lower, own, upper=False)
        x_hat.append(f[first] @ directions + f[rest] @ rows[rest])
    return torch.stack(x_hat)


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("form", ["fixed", "ragged", "dense"])
@pytest.mark.parametrize("m, near, eps", [(32, 1.0, 1e-3), (5, 1.0, 1e-3), (1, 1.0, 1e-3), (32, 0.01, 0.05)])
def test_values_and_gradients(form, m, near, eps):
    """Fewer active than m, more than m, ties, none; rows nearly parallel, which eps holds."""
    latents, rows = planted(near)
    weights = torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    f, w = latents.double().requires_grad_(), rows.double().requires_grad_()
    expected = defined(f, w, m, eps)
    truth = torch.autograd.grad((expected * weights).sum(), (f, w))
    truth = truth[0] * (latents > 0), truth[1]  # an inactive latent's gradient is the selection's to stop
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        given, w = forms(latents.to(dtype))[form], rows.to(dtype).requires_grad_()
        values = given.values.clone().requires_grad_()
        decoded = gram_schmidt.orthonormal_codes(given.with_values(values), w, m, eps)
        x_hat = decoded.dense() @ w
        assert relative(x_hat, expected) < tolerance
        d_values, d_rows = torch.autograd.grad((x_hat * weights.to(dtype)).sum(), (values, w))
        d_latents = given.with_values(d_values * (given.values > 0)).dense()
        assert relative(d_latents, truth[0]) < tolerance and relative(d_rows, truth[1]) < tolerance


def test_directions_are_orthonormal_and_magnitudes_kept():
    """|x_hat|^2 = sum of f^2, where rows are independent and eps is small."""
    latents, rows = planted(near=0.5)
    x_hat = gram_schmidt.orthonormal_codes(Dense(latents), rows, 64, 1e-5).dense() @ rows
    assert torch.allclose(x_hat.square().sum(1), latents.square().sum(1), rtol=1e-3)
    assert not torch.allclose((latents @ rows).square().sum(1), latents.square().sum(1), rtol=1e-2)


def test_the_strongest_latent_keeps_its_row_and_inactive_slots_stay_out():
    latents, rows = planted(near=0.2)
    slots = forms(latents)["fixed"]
    found = gram_schmidt.orthonormal_codes(slots, rows, 8, 1e-3)
    assert (found.values[slots.values == 0] == 0).all() and (found.values < 0).any()
    order = gram_schmidt.strongest(*gram_schmidt.flat(slots), 8)
    first = slots.indices.flatten()[order[:, 0]]
    x_hat = found.dense() @ rows
    # All later directions are orthogonal to the first, so along it stands its own magnitude.
    along, largest = (x_hat * rows[first]).sum(1), latents.max(1).values
    kept = (latents > 0).sum(1).gt(0) & (latents > 0).sum(1).le(8)
    assert torch.allclose(along[kept], largest[kept], rtol=5e-3)


def test_bits_depend_neither_on_threads_nor_on_the_order_of_slots():
    latents, rows = planted()
    found, before = [], numba.get_num_threads()
    for threads, form in ((1, "ragged"), (numba.config.NUMBA_NUM_THREADS, "ragged"), (1, "fixed")):
        numba.set_num_threads(threads)
        given, w = forms(latents)[form], rows.clone().requires_grad_()
        decoded = gram_schmidt.orthonormal_codes(given, w, 6, 1e-3)
        found.append((decoded.dense().detach(), torch.autograd.grad(decoded.values.square().sum(), w)[0]))
    numba.set_num_threads(before)
    for one in found[1:2]:
        assert torch.equal(one[0], found[0][0]) and torch.equal(one[1], found[0][1])
    assert torch.equal(found[2][0], found[0][0])


def test_no_latent_anywhere():
    rows = torch.eye(3, 4)
    for empty in (Dense(torch.zeros(2, 3)), Dense(torch.zeros(2, 3)).csr(),
                  FixedK(torch.tensor([[0, 1], [1, 2]]), torch.zeros(2, 2), 3)):
        found = gram_schmidt.orthonormal_codes(empty, rows.requires_grad_(), 8, 1e-3)
        assert not found.dense().any()
        if isinstance(found, FixedK):
            found.values.sum().backward()


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "gated", "standard"])
def test_every_architecture_trains_and_decodes_what_it_was(architecture):
    source = Planted()
    result, _, run = train(source, samples=20 * 256, architecture=architecture, **GRAM_SCHMIDT)
    assert result.report["steps"] == 20 and result.report["nonfinite"] is None
    sae, x = load_sae(run.path / "sae"), source.test[:200]
    assert torch.allclose(sae.decode(sae.encode(x)), sae(x), atol=1e-4)
    assert not torch.allclose(sae.encode(x) @ sae.W_dec + sae.b_dec / sae.input_scale, sae(x), atol=1e-2)
    assert runs.read_json(run.path / "sae/cfg.json")["architecture"].startswith("workbook_")


def test_topk_keeps_its_fast_path_and_finds_correlated_directions():
    source = Planted(correlated=0.5)
    result, verdict, run = train(source, samples=150_000, **GRAM_SCHMIDT)
    assert runs.read_json(run.path / "sae/cfg.json")["architecture"] == "workbook_topk"
    assert "sparse" in result.report["kernel"]
    assert verdict.status == "valid" and result.report["explained_variance"] > 0.8


def test_the_sparse_kernel_decodes_negative_codes():
    """Values and gradients of what the decoder is given, positive or not."""
    from sae_lib.sae.kernels import pick

    latents, rows = planted(near=0.3)
    kernel = pick("cpu", sparse=True)
    assert isinstance(kernel, Sparse)
    for given in (forms(latents)["fixed"], forms(latents)["ragged"]):
        w = rows.clone().requires_grad_()
        decoded = gram_schmidt.orthonormal_codes(given, w, 8, 1e-3)
        fast, plain = kernel.decode(decoded, w), decoded.dense() @ w
        assert (decoded.values < 0).any() and torch.allclose(fast, plain, atol=1e-5)
        one, other = (torch.autograd.grad(x_hat.square().sum(), w, retain_graph=True)[0] for x_hat in (fast, plain))
        assert torch.allclose(one, other, atol=1e-4)
        assert isinstance(decoded, CSR | FixedK)


@pytest.mark.parametrize("values, says", [
    ({"architecture": "matryoshka_batch_topk"}, "prefixes .* set architecture: batch_topk"),
    ({"ingredients": [{"name": "gram_schmidt", "over": "batch"}]}, "other tokens .* set over: token"),
    ({"ingredients": [{"name": "gram_schmidt", "latents": 65}]}, "gram_schmidt.latents"),
    ({"ingredients": [{"name": "gram_schmidt", "eps": 0}]}, "gram_schmidt.eps"),
])
def test_what_cannot_be_is_refused(values, says):
    with pytest.raises(ParameterError, match=says):
        configured(check("train", GRAM_SCHMIDT | values))
