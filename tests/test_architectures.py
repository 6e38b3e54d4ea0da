"""The six architectures: values and gradients against float64 autograd, thresholds, formats, L0; and every ingredient
with every architecture."""

import pytest
import torch
from synthetic import Planted
from test_gradients import D, F, relative, weights
from test_trainer import SMALL, train

from sae_lib import runs
from sae_lib.params import ParameterError, check
from sae_lib.sae import architectures, kernels
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training import terms, trainer
from sae_lib.training.ingredients import REGISTRY, Ingredient, load_sae

NAMES = ("topk", "standard", "batch_topk", "jumprelu", "gated", "matryoshka_batch_topk")
KERNELS = ["sparse", "reference"]
BANDWIDTH, WIDTHS = 0.5, [0.1, 0.4]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


def test_six_are_there():
    assert set(architectures.REGISTRY) == set(NAMES)


# -- against the mathematics, written out in float64 -------------------------------------------------------------------

class Step(torch.autograd.Function):
    """H(a - theta), and its pseudo-derivative (Rajamanoharan et al. 2024, eq. 12)."""

    @staticmethod
    def forward(ctx, a, theta):
        ctx.save_for_backward(a, theta)
        return (a > theta).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, theta = ctx.saved_tensors
        return None, -(grad * ((a - theta).abs() < BANDWIDTH / 2) / BANDWIDTH).sum(0)


class Jump(torch.autograd.Function):
    """a H(a - theta) with eq. 11's pseudo-derivative."""

    @staticmethod
    def forward(ctx, a, theta):
        ctx.save_for_backward(a, theta)
        return a * (a > theta)

    @staticmethod
    def backward(ctx, grad):
        a, theta = ctx.saved_tensors
        near = ((a - theta).abs() < BANDWIDTH / 2) / BANDWIDTH
        return grad * (a > theta), -(grad * theta * near).sum(0)


def batch_codes(a, k):
    best = a.flatten().topk(k * len(a)).indices
    return a.relu() * torch.zeros_like(a).flatten().index_fill(0, best, 1.0).view_as(a)


def errors(x, *reconstructions):
    return sum(((x - x_hat) ** 2).sum(1).mean() for x_hat in reconstructions)


def dense_form(name, parts, v, p):
    """Codes and loss of an architecture, as its paper writes it, at progress 0.2 (after the warm-up)."""
    enc, b_enc, dec, b_dec, x = parts
    a = (x - b_dec) @ enc.T + b_enc
    if name == "standard":
        f = a.relu()
        return f, errors(x, f @ dec + b_dec) + p.l1 * f.sum(1).mean()
    if name == "jumprelu":
        f = Jump.apply(a, v["threshold"])
        active = Step.apply(a.detach(), v["threshold"]) if p.l0_penalty == "step" else torch.tanh(4 * f)
        return f, errors(x, f @ dec + b_dec) + p.l0_weight * active.sum(1).mean()
    if name == "gated":
        magnitude = (v["r_mag"].exp() * ((x - b_dec) @ enc.T) + v["b_mag"]).relu()
        f, gate = magnitude * (a > 0), a.relu()
        through_gate = gate @ dec.detach() + b_dec.detach()
        return f, errors(x, f @ dec + b_dec, through_gate) + p.l1 * gate.sum(1).mean()
    f = batch_codes(a, p.k) if "batch" in name else a.relu() * torch.zeros_like(a).scatter(1, a.topk(p.k).indices, 1.0)
    ends = [round(share * F) for share in WIDTHS] if "matryoshka" in name else []
    return f, errors(x, f @ dec + b_dec, *(f[:, :end] @ dec[:end] + b_dec for end in ends))


@pytest.mark.parametrize("shift", [0.0, -1.5], ids=["", "few positive"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name, changes", [*((name, {}) for name in NAMES), ("jumprelu", {"l0_penalty": "step"})])
def test_value_and_gradients(name, changes, kernel, shift):
    p = check("train", {"architecture": name, "d_sae": F, "k": 5, "l1": 0.3, "l0_weight": 0.4, "aux_k": 0,
                        "bandwidth": BANDWIDTH, "matryoshka_widths": WIDTHS} | changes)
    *small, x = weights(torch.float32)
    small[1] += shift
    g = torch.Generator().manual_seed(9)
    made = architectures.get(name).from_params(p, D)
    own = {key: 0.4 + 0.2 * torch.rand(F, generator=g) for key in made.vectors}
    sae = SparseAutoencoder(*small, made, further=own)
    sae.kernel = kernels.pick("cpu", sparse=kernel == "sparse")
    ctx = sae.run(Context(sae, x, 2, 10))
    losses = terms.loss_terms(ctx, [])
    parts = [part.double().requires_grad_() for part in small]
    vectors = {key: value.double().requires_grad_(key in made.learnt) for key, value in own.items()}
    f, loss = dense_form(name, [*parts, x.double()], vectors, p)
    assert relative(ctx.codes.dense().detach(), f) < 1e-6
    assert float(sum(losses.values())) == pytest.approx(float(loss), rel=1e-6)
    sum(losses.values()).backward()
    used = [part for part in vectors.values() if part.requires_grad]
    truth = torch.autograd.grad(loss, [*parts, *used])
    found = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *(sae.further[key] for key in made.learnt & set(vectors))]
    for parameter, expected in zip(found[:4], truth):
        assert relative(parameter.grad, expected) < 1e-5
    for key, expected in zip([k for k in vectors if k in made.learnt], truth[4:]):
        assert relative(sae.further[key].grad, expected) < 1e-5, key


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_has_no_chance_and_no_batch(name, kernel):
    """A token's latents do not depend on the tokens beside it, on either kernel."""
    p = check("train", {"architecture": name, "d_sae": F, "k": 5})
    *small, x = weights(torch.float32)
    made = architectures.get(name).from_params(p, D)
    sae = SparseAutoencoder(*small, made, further={key: torch.full((F,), 0.7) for key in made.vectors})
    sae.kernel = kernels.pick("cpu", sparse=kernel == "sparse")
    with torch.no_grad():
        whole = sae.encode(x)
        alone = torch.cat([sae.encode(row[None]) for row in x])
    assert torch.allclose(whole, alone, atol=1e-5)
    assert (whole >= 0).all() and (whole > 0).any()


def test_batch_topk_on_average_k():
    """The threshold that stands for the batch gives the same L0, and tokens differ in how many they take."""
    result, verdict, _ = train(architecture="batch_topk")
    assert verdict.status == "valid"
    assert result.report["l0"] == pytest.approx(3, rel=0.1)
    counts = (result.sae.encode(Planted().test) > 0).sum(1)
    assert counts.min() < 3 < counts.max()


def test_matryoshka_orders_its_latents():
    """Each prefix reconstructs better than the same number of the last latents does."""
    result, verdict, _ = train(architecture="matryoshka_batch_topk", matryoshka_widths=[0.25, 0.5])
    assert verdict.status == "valid" and verdict.flags == []
    x = Planted().test
    latents = result.sae.encode(x)
    def error(part):
        return float((x - result.sae.decode(latents * part)).square().sum())
    first, last = torch.zeros(96), torch.zeros(96)
    first[:24], last[-24:] = 1, 1
    assert error(first) < 0.8 * error(last)


@pytest.mark.parametrize("name, weight", [("standard", {"l1": 0.5}), ("standard", {"l1": 50.0}), ("gated", {"l1": 0.3}),
                                          ("gated", {"l1": 10.0}), ("jumprelu", {"l0_weight": 0.01}),
                                          ("jumprelu", {"l0_weight": 0.5})])
def test_target_l0_is_reached_from_both_sides(name, weight):
    result, verdict, _ = train(architecture=name, target_l0=4, lr=1e-3, samples=400_000, **weight)
    assert abs(result.report["l0"] / 4 - 1) < 0.1
    assert verdict.status == "valid"


@pytest.mark.parametrize("name", NAMES)
def test_sae_lens_reads_what_was_trained(name):
    """Same latents, same reconstruction; and ours read back is ours."""
    from sae_lib.data.language_model import import_transformers
    import_transformers()
    from sae_lens import SAE

    result, _, run = train(architecture=name, samples=20_000, target_l0=4 if name in ("standard", "gated", "jumprelu")
                           else None)
    x, back = Planted().test, load_sae(run.path / "sae")
    theirs = SAE.load_from_disk(str(run.path / "sae"), device="cpu")
    assert torch.allclose(theirs.encode(x), back.encode(x), atol=1e-4)
    assert torch.allclose(theirs(x), back(x), atol=1e-4)
    assert torch.equal(back(x), result.sae(x)) and back.architecture.name == name
    kept = {"batch_topk": "jumprelu", "matryoshka_batch_topk": "jumprelu"}.get(name, name)
    assert theirs.cfg.architecture() == kept


TRACKED = {"order": "sequence_blocks", "ingredients": [{"name": "temporal_coactivation", "window_size": 300}]}


@pytest.mark.parametrize("changes", [{"architecture": "jumprelu", "target_l0": 4}, {"architecture": "batch_topk"},
                                     {"architecture": "gated", "target_l0": 4}, TRACKED],
                         ids=["jumprelu", "batch_topk", "gated", "tracked pairs"])
def test_resumed_in_the_same_bits(changes, capsys):
    """What an architecture holds beside the weights, and what an ingredient tracks, is in the checkpoint."""
    changes = changes | {"checkpoint_every": 40, "samples": 256 * 100}
    plain = train(run="plain", **changes)[0].sae
    p = check("train", SMALL | changes | {"run": "cut"})
    run = runs.start(p)
    first = trainer.Trainer(p, Planted())
    first.total_steps, whole = 100, first.one_step
    first.one_step = lambda *a, **k: (_ for _ in ()).throw(RuntimeError) if first.step == 50 else whole(*a, **k)
    with pytest.raises(RuntimeError):
        first.fit(run.path / "checkpoints")
    resumed = trainer.train(p, Planted(), run).sae
    assert "going on from the checkpoint of step 40" in capsys.readouterr().out
    for (key, a), b in zip(plain.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), key


# -- every ingredient with every architecture --------------------------------------------------------------------------

INGREDIENTS = [{"name": name} for name in sorted(REGISTRY)] + [
    {"name": "temporal_coactivation", "weights": "consecutive"}, {"name": "temporal_coactivation", "space": "decoder"}]


@pytest.mark.parametrize("order", ["shuffled", "sequence_blocks"])
@pytest.mark.parametrize("entry", INGREDIENTS, ids=lambda entry: "-".join(entry.values()))
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_runs_twenty_steps_or_is_refused(name, entry, order):
    changes = {"architecture": name, "ingredients": [entry], "order": order, "samples": 256 * 20, "warmup_steps": 5}
    changes |= {"target_l0": 4, "start_l0": 6} if name in ("standard", "gated", "jumprelu") else {}
    try:
        result, verdict, _ = train(**changes)
    except ParameterError as error:
        assert (entry.get("weights") == "consecutive" or entry["name"] == "nt_xent") and order == "shuffled"
        assert "set order: sequence_blocks" in str(error)
        return
    assert result.report["steps"] == 20 and not result.report["nonfinite"]
    if REGISTRY[entry["name"]].penalty is not Ingredient.penalty:
        assert result.report["terms"][entry["name"]]["median_share"] > 0
