"""Every fast form beside plain dense float64 autograd: values and gradients to 1e-5 relative."""

import pytest
import torch

from sae_lib.params import check
from sae_lib.sae import architectures, kernels
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training import terms
from sae_lib.training.ingredients import configured
from sae_lib.training.pair_sum import pair_sum

D, F, B = 24, 96, 40


def weights(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g, dtype=torch.float64), dim=1)
    enc = rows + 0.1 * torch.randn(F, D, generator=g, dtype=torch.float64)
    b_enc, b_dec = (0.1 * torch.randn(n, generator=g, dtype=torch.float64) for n in (F, D))
    x = torch.randn(B, D, generator=g, dtype=torch.float64)
    # Values that float32 holds exactly, so that both precisions select the same latents of the same numbers.
    return [t.float().to(dtype) for t in (enc, b_enc, rows, b_dec, x)]


def dense_loss(parts, select, extra):
    """The mathematics written out: x_hat = f W_dec + b_dec, squared error, further terms."""
    enc, b_enc, rows, b_dec, x = parts
    a = (x - b_dec) @ enc.T + b_enc
    f = select(a)
    x_hat = f @ rows + b_dec
    return ((x - x_hat) ** 2).sum(1).mean() + extra(parts, a, f, x_hat)


def relative(a, b):
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def compare(p, select, extra, kernel, dead=None, step=0, total=10):
    parts = [t.requires_grad_() for t in weights()]
    expected = dense_loss(parts, select, extra)
    truth = torch.autograd.grad(expected, parts[:4])
    *small, x = weights(torch.float32)
    sae = SparseAutoencoder(*small, architectures.get(p.architecture).from_params(p, D))
    sae.kernel = kernels.pick("cpu", sparse=kernel == "cpu")
    ctx = sae.run(Context(sae, x, step, total, dead=dead))
    parts = [kind(config, D, F, torch.Generator().manual_seed(0)) for kind, config in configured(p)]
    losses = terms.loss_terms(ctx, parts)
    assert abs(float(sum(losses.values())) / float(expected) - 1) < 1e-5
    sum(losses.values()).backward()
    for name, g in zip(("W_enc", "b_enc", "W_dec", "b_dec"), truth):
        assert relative(getattr(sae, name).grad, g) < 1e-5, name
    return losses


def topk_mask(k):
    def select(a):
        kept = torch.zeros_like(a).scatter(1, a.topk(k, dim=1).indices, 1.0)
        return a.relu() * kept
    return select


def nothing(*_):
    return 0.0


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, 5, 60, F])
def test_topk(kernel, k):
    compare(check("train", {"k": k, "d_sae": F}), topk_mask(k), nothing, kernel)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("aux_k", [2, 500])
def test_auxiliary_loss_reaches_the_encoder(kernel, aux_k):
    dead = torch.zeros(F, dtype=torch.bool)
    dead[5::9] = True

    def extra(parts, a, f, x_hat):
        enc, b_enc, rows, b_dec, x = parts
        masked = torch.where(dead, a, torch.full_like(a, -torch.inf))
        top = masked.topk(min(aux_k, int(dead.sum())), dim=1)
        aux = torch.zeros_like(a).scatter(1, top.indices, top.values.relu())
        return (((x - x_hat).detach() - aux @ rows) ** 2).sum(1).mean() / 32

    p = check("train", {"k": 5, "d_sae": F, "aux_k": aux_k})
    losses = compare(p, topk_mask(5), extra, kernel, dead=dead)
    assert float(losses["auxk"]) > 0


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_standard(kernel):
    p = check("train", {"architecture": "standard", "d_sae": F, "l1": 0.3, "l1_warmup": 0.5})

    def extra(parts, a, f, x_hat):
        return 0.3 * (2 / 10 / 0.5) * f.sum(1).mean()

    compare(p, lambda a: a.relu(), extra, kernel, step=2)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_progressive_orthogonality(threshold, through):
    """The term over all pairs, from its definition, at progress 0.3 of the fourth run's schedules."""
    entry = {"name": "progressive_orthogonality", "weight": 0.7, "pairs": "all", "chunk": 10,
             "gradient_through_competition": through, "scale": {"kind": "linear", "start": 1, "end": 2}}
    if threshold:
        entry["threshold"] = {"kind": "exponential", "start": threshold, "rate": 2}

    def extra(parts, a, f, x_hat):
        unit = torch.nn.functional.normalize(parts[2], dim=1)
        cos = unit @ unit.T
        c = torch.ones_like(cos)
        if threshold:
            tau = torch.tensor(threshold * 2.718281828459045 ** (-2 * 0.3))
            c = torch.sigmoid((1.3 * cos.abs() - tau) / torch.clamp(tau / 5, min=0.005))
            c = c if through else c.detach()
        off = ~torch.eye(F, dtype=torch.bool)
        return 0.7 * (c * cos**2 * off).sum(1).mean()

    p = check("train", {"k": 5, "d_sae": F, "ingredients": [entry]})
    compare(p, topk_mask(5), extra, "cpu", step=3)


def test_active_pairs_are_unbiased_for_all_pairs():
    """Mean over many partitions, of value and gradient, within four standard errors of the exact term."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(60, 8, generator=g, dtype=torch.float64).requires_grad_()
    exact = pair_sum(rows, None, lambda cos, left, right: (cos.square(), 2 * cos), 16) / 60
    truth = torch.autograd.grad(exact, rows)[0]

    class Everything:
        step, total_steps, fired = 0, 1, torch.ones(60, dtype=torch.bool)
    Everything.rows = rows
    p = check("train", {"ingredients": [{"name": "progressive_orthogonality", "weight": 1.0, "chunk": 7}]})
    kind, config = configured(p)[0]
    part = kind(config, 8, 60, torch.Generator().manual_seed(2))
    values, gradients = [], []
    for _ in range(600):
        term = part.penalty(Everything)
        values.append(float(term))
        gradients.append(torch.autograd.grad(term, rows)[0].to_dense())
    values, gradients = torch.tensor(values), torch.stack(gradients)
    assert abs(values.mean() - float(exact)) < 4 * values.std() / 600**0.5
    z = (gradients.mean(0) - truth) / (gradients.std(0) / 600**0.5)
    assert z.square().mean() < 1.5


def test_fewer_than_k_positive_pre_activations():
    """Slots with a negative pre-activation are inactive and get no gradient."""
    *parts, x = weights(torch.float32)
    parts[1] = parts[1] - 3
    for kernel in (kernels.pick("cpu", sparse=True), kernels.reference):
        sae = SparseAutoencoder(*[t.clone() for t in parts], architectures.get("topk")(k=8, aux_k=0, aux_weight=0))
        sae.kernel = kernel
        ctx = sae.run(Context(sae, x))
        assert ctx.codes.l0() < 8
        architectures.squared_error(x, ctx.reconstruction).backward()
        silent = ~ctx.fired
        assert silent.any() and sae.W_enc.grad[silent].abs().sum() == 0
