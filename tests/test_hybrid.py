"""Study 3's ingredients: value and gradient beside plain float64 autograd, and what each does to a planted example."""

import math

import pytest
import torch
from synthetic import Planted
from test_gradients import D, F, relative, weights
from test_trainer import train

from sae_lib import runs
from sae_lib.params import ParameterError, check
from sae_lib.sae import architectures, kernels
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training import adam, terms, trainer
from sae_lib.training.ingredients import configured, load_sae
from sae_lib.training.ingredients.jl_similarity import quality

G = torch.Generator().manual_seed(11)
USE = torch.rand(F, generator=G) ** 3
USED = {"utilisation": lambda part: part.state.update(mean=USE.clone(), batches=torch.tensor(1))}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


# -- against the mathematics, written out in float64 -------------------------------------------------------------------

def beside_dense(entries, extra, change=lambda f, learnt: f, states=None, architecture="topk", kernel="sparse",
                 step=3, importance=None):
    """One step's loss and gradients beside |x - change(f) W - b|^2 + extra(W, f, change(f)) by float64 autograd."""
    p = check("train", {"architecture": architecture, "k": 5, "d_sae": F, "l1": 0.0, "aux_k": 0,
                        "ingredients": entries})
    *small, x = weights(torch.float32)
    shift = 2.0 if architecture == "standard" else 0.0  # so that few are active: dense codes are not counted
    small[1] = small[1] - shift
    sae = SparseAutoencoder(*small, architectures.get(architecture).from_params(p, D))
    sae.kernel = kernels.pick("cpu", sparse=kernel == "sparse")
    parts = [kind(config, D, F, torch.Generator().manual_seed(5)) for kind, config in configured(p)]
    for part in parts:
        (states or {}).get(part.name, lambda part: None)(part)
    sae.hooks = [part for part in parts if part.changes_forward]
    learnt = {name: part.state[name].requires_grad_() for part in parts for name in part.learnt}
    ctx = Context(sae, x, step, 10, importance=importance)
    for part in parts:
        part.before_step(ctx)
    losses = terms.loss_terms(sae.run(ctx), parts)
    sum(losses.values()).backward()
    enc, b_enc, rows, b_dec, x = (part.double().requires_grad_() for part in weights(torch.float32))
    doubles = {name: part.detach().double().requires_grad_() for name, part in learnt.items()}
    a = (x - b_dec) @ enc.T + b_enc - shift
    f = a.relu() if architecture == "standard" else a.relu() * torch.zeros_like(a).scatter(1, a.topk(5).indices, 1.0)
    changed = change(f, doubles)
    weight = torch.ones(len(x)).double() if importance is None else importance.double()
    loss = (weight * (x - changed @ rows - b_dec).square().sum(1)).mean() + extra(rows, f, changed)
    truth = torch.autograd.grad(loss, [enc, b_enc, rows, b_dec, *doubles.values()])
    assert float(sum(losses.values())) == pytest.approx(float(loss), rel=1e-5)
    for found, expected in zip([sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *learnt.values()], truth):
        assert relative(found.grad, expected) < 2e-5
    assert float(losses[entries[-1]["name"]]) != 0
    return losses


FORMS = pytest.mark.parametrize("architecture, kernel", [("topk", "sparse"), ("topk", "reference"),
                                                         ("standard", "sparse")])
UPPER = {"kind": "linear", "start": 1, "end": 0.5}
OFF = 1 - torch.eye(F, dtype=torch.float64)


def cosines(rows):
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit @ unit.T


@pytest.mark.parametrize("by_use", [False, True])
@pytest.mark.parametrize("similarity", ["exact", "jl"])
def test_contrastive(similarity, by_use):
    entries = [{"name": "utilisation"}, {"name": "jl_similarity", "dims": 8},
               {"name": "contrastive", "weight": 0.7, "similarity": similarity, "by_use": by_use, "pairs": "all",
                "chunk": 10, "threshold": {"kind": "linear", "start": 0.4, "end": 0.05}}]
    held = {}

    def extra(rows, f, changed):
        seen = rows @ held["projection"].double() if similarity == "jl" else rows
        over = (cosines(seen) - (0.4 - 0.3 * 0.35)).relu().square() * OFF
        use = (USE / USE.mean()).clamp_max(4).double() if by_use else torch.ones(F).double()
        return 0.7 * (use[:, None] * over).sum(1).mean()  # the study's form: i repels j by how much i is used
    beside_dense(entries, extra, states=USED | {"jl_similarity": lambda part: held.update(part.state)})


@pytest.mark.parametrize("chunk", [10, 1000])
def test_contrastive_over_drawn_pairs_is_unbiased(chunk):
    """Mean over many draws beside the exact sum, within three standard errors."""
    entry = {"name": "contrastive", "by_use": False, "threshold": 0.05, "chunk": chunk, "chunks": 3}
    p = check("train", {"k": 60, "d_sae": F, "ingredients": [entry]})
    sae = SparseAutoencoder(*weights(torch.float32)[:4], architectures.get("topk").from_params(p, D))
    (kind, config), = configured(p)
    part = kind(config, D, F, torch.Generator().manual_seed(1))
    ctx = sae.run(Context(sae, weights(torch.float32)[4], 3, 10))
    assert bool(ctx.fired.all())
    drawn = torch.stack([part.penalty(ctx).detach() for _ in range(400)]).double()
    exact = float(((cosines(sae.W_dec.detach().double()) - 0.05).relu().square() * OFF).sum(1).mean())
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean()) - exact) < 3 * error + 1e-6 * exact


@FORMS
@pytest.mark.parametrize("lower", [0.02, 0.0])
def test_sparsity_bounds(architecture, kernel, lower):
    entry = {"name": "sparsity_bounds", "weight": 0.3, "lower": lower, "upper": UPPER}

    def extra(rows, f, changed):
        upper = 1 - 0.3 * 0.5
        weight = (USE.double() / USE.double().mean() * math.sqrt(lower * upper)).clamp(lower, upper) if lower else upper
        return 0.3 * (weight * f).sum(1).mean()
    beside_dense([{"name": "utilisation"}, entry], extra, states=USED, architecture=architecture, kernel=kernel)


@FORMS
def test_diversity(architecture, kernel):
    def extra(rows, f, changed):
        unit = f / f.norm(dim=0).clamp_min(1e-6)
        return 0.4 * ((unit.T @ unit).square() * OFF).sum() / F
    beside_dense([{"name": "diversity", "weight": 0.4}], extra, architecture=architecture, kernel=kernel)


@FORMS
def test_decorrelation(architecture, kernel):
    def extra(rows, f, changed):
        centred = f - f.mean(0)
        unit = centred / centred.norm(dim=0).clamp_min(1e-6)
        return 0.4 * ((unit.T @ unit).square() * OFF).sum() / F
    beside_dense([{"name": "decorrelation", "weight": 0.4}], extra, architecture=architecture, kernel=kernel)


@FORMS
def test_groups(architecture, kernel):
    entry = {"name": "groups", "groups": 6, "keep": 2, "weight": 0.2, "apart": 0.5}
    scale = 0.5 + torch.rand(6, generator=torch.Generator().manual_seed(2))

    def change(f, learnt):
        norms = f.view(-1, 6, F // 6).norm(dim=2)
        best = (norms / scale.double()).topk(2, dim=1).indices
        return f * torch.zeros_like(norms).scatter(1, best, 1.0).repeat_interleave(F // 6, dim=1)

    def extra(rows, f, changed):
        cos = cosines(rows.view(6, F // 6, D).mean(1))
        lasso = (changed.view(-1, 6, F // 6).square().sum(2) + 1e-8).sqrt().sum(1).mean()
        return 0.2 * lasso + 0.5 * (cos.square().sum() - 6) / 6
    beside_dense([entry], extra, change, {"groups": lambda part: part.state["norm"].copy_(scale)}, architecture, kernel)


@FORMS
def test_winner_take_all(architecture, kernel):
    entry = {"name": "winner_take_all", "size": 24, "weight": 0.2, "loser_gradient": 0.5, "temperature": 0.3}
    gate = torch.randn(F, generator=torch.Generator().manual_seed(3))

    def prepare(part):
        part.state["gate"].copy_(gate)
        part.state["theta"].fill_(0.6)

    losers = {}

    def change(f, learnt):
        top = f.detach().view(-1, F // 24, 24).amax(2).repeat_interleave(24, dim=1)
        share = f / top.clamp_min(1e-12)
        out = 2 * torch.sigmoid(learnt["gate"]) * f * torch.sigmoid((share - 0.6) / 0.3)
        wins = (share >= 0.6) | (f == 0)
        scale = torch.where(wins, 1.0, 0.5).double()
        losers["all"] = (out * scale + (out * (1 - scale)).detach()) * ~wins
        return out * scale + (out * (1 - scale)).detach()
    beside_dense([entry], lambda rows, f, changed: 0.2 * losers["all"].sum(1).mean(), change,
                 {"winner_take_all": prepare}, architecture, kernel)


def test_weighted_tokens_reach_every_term():
    """Reconstruction, bounds and lasso weigh tokens alike."""
    importance = 0.5 + torch.rand(40, generator=torch.Generator().manual_seed(4))

    def extra(rows, f, changed):
        return 0.3 * (importance.double() * 0.85 * f.sum(1)).mean()
    entry = {"name": "sparsity_bounds", "weight": 0.3, "lower": 0.0, "upper": UPPER}
    beside_dense([{"name": "utilisation"}, entry], extra, states=USED, importance=importance, architecture="standard")


# -- what each does ----------------------------------------------------------------------------------------------------

def test_utilisation_is_a_running_mean():
    p = check("train", {"k": 5, "d_sae": F, "ingredients": [{"name": "utilisation", "beta": 0.5}]})
    sae = SparseAutoencoder(*weights(torch.float32)[:4], architectures.get("topk").from_params(p, D))
    (kind, config), = configured(p)
    part = kind(config, D, F)
    x = weights(torch.float32)[4]
    expected = None
    for step, batch in enumerate((x, x[:10], x[10:25])):
        ctx = sae.run(Context(sae, batch, step, 10))
        part.before_step(ctx)
        assert (ctx.own["utilisation"] is None) == (step == 0)
        part.after_step(sae, ctx)
        shares = (ctx.codes.dense() > 0).float().mean(0)
        expected = shares if expected is None else 0.5 * expected + 0.5 * shares
    assert torch.allclose(part.state["mean"], expected, atol=1e-6)


def test_projection_is_as_noisy_as_theory_says():
    """Random rows: noise of cosines near its closed form, lost energy 1 - m/D; all dimensions lose nothing."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2000, 576, generator=g, dtype=torch.float64), dim=1)
    q = torch.linalg.qr(torch.randn(576, 128, generator=g, dtype=torch.float64)).Q
    found = quality(rows, q * math.sqrt(576 / 128), 20_000, g)
    assert found["cosine_noise"]["std"] == pytest.approx(found["cosine_noise"]["expected"], rel=0.05)
    assert found["lost"] == pytest.approx(1 - 128 / 576, rel=0.02)
    assert found["eps"] == pytest.approx(math.sqrt(8 * math.log(2000) / 128))
    assert found["distortion"]["worst"] < found["eps"]
    assert sum(found["distortion"]["counts"]) == found["pairs"]
    whole = torch.linalg.qr(torch.randn(576, 576, generator=g, dtype=torch.float64)).Q
    same = quality(rows, whole, 1000, g)
    assert same["distortion"]["worst"] < 1e-9 and same["cosine_noise"]["std"] < 1e-9 and same["lost"] < 1e-9


def test_contrast_lowers_pairs_over_the_threshold():
    source = Planted(correlated=1.0)

    def over(**changes):
        result, verdict, _ = train(source, samples=150_000, **changes)
        assert verdict.status == "valid"
        over = (cosines(result.sae.W_dec.double()) - 0.4).relu() * OFF
        return int((over > 0.05).sum()), float(over.square().sum())
    entry = {"name": "contrastive", "by_use": False, "weight": 30.0, "threshold": 0.4, "chunk": 96}
    (few, little), (many, much) = over(ingredients=[entry]), over()
    assert many > 20 and few == 0 and little < 0.01 * much


def test_groups_empty_under_a_heavy_lasso():
    def empty(weight):
        entry = {"name": "groups", "groups": 8, "keep": 8, "apart": 0.0, "weight": weight, "beta": 0.9}
        return train(Planted(n_latents=4, active=1), ingredients=[entry])[0].history["value/groups.empty"].iloc[-1]
    assert empty(0.0) == 0 and empty(1.0) >= 4


def test_latents_of_groups_are_those_kept():
    result, _, run = train(samples=50_000, ingredients=[{"name": "groups", "groups": 8, "keep": 2}])
    x = Planted().test
    used = (result.sae.encode(x).view(-1, 8, 12) > 0).any(2).sum(1)
    assert int(used.max()) <= 2
    assert torch.allclose(load_sae(run.path / "sae")(x), result.sae(x), atol=1e-6)
    assert runs.read_json(run.path / "sae/cfg.json")["architecture"] == "workbook_topk"


@pytest.mark.parametrize("rows", [(6, 3), (6,)])
def test_row_rates_scale_the_update(rows):
    """A row's step is its rate times the plain one; the numba and the torch form agree."""
    g = torch.Generator().manual_seed(1)
    start, grad = torch.randn(*rows, generator=g), torch.randn(*rows, generator=g)
    rates = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0, 3.0])

    def moved(factors, by_torch=False):
        p = start.clone().requires_grad_()
        p.grad = grad.clone()
        if by_torch:
            parts = torch.zeros_like(p), torch.zeros_like(p)
            with torch.no_grad():
                adam._update_by_torch(p, *parts, 0.1, 1.0, 1.0, False, factors)
        else:
            adam.Adam([p], unit=[]).step(0.1 * (1 - adam.BETA1), 1e9, factors)
        return (p - start).detach()
    wide = rates.view(-1, *[1] * (len(rows) - 1))
    assert torch.allclose(moved(rates), wide * moved(None), atol=1e-6)
    assert torch.allclose(moved(rates, True), wide * moved(None, True), atol=1e-6)


def test_important_groups_learn_faster():
    result, verdict, _ = train(ingredients=[{"name": "groups", "groups": 8, "keep": 6},
                                            {"name": "group_learning_rates", "power": 1.0}])
    assert verdict.status == "valid"
    assert result.history["value/group_learning_rates.spread"].iloc[-1] > 1.01
    with pytest.raises(ParameterError, match="list that too: - {name: groups}"):
        train(ingredients=[{"name": "group_learning_rates"}])


def test_importance_sampling_leaves_the_expected_loss_unchanged():
    """The weighted loss and gradient over many draws beside the evenly drawn pool's, within three standard errors."""
    p = check("train", {"d_sae": F, "k": 3, "batch_size": 256, "samples": 2560, "threads": 1, "mode": "batch",
                        "ingredients": [{"name": "importance_sampling", "pool": 2, "floor": 0.2}]})
    source = Planted(d_in=D)
    made = trainer.Trainer(p, source)
    pool = source._batch(source.x[:512] * torch.linspace(0.2, 3, 512)[:, None])

    def loss(ctx):
        made.sae.W_dec.grad = None
        term = terms.loss_terms(made.sae.run(ctx), [])["reconstruction"]
        term.backward()
        return torch.tensor([float(term), *made.sae.W_dec.grad[:2].flatten().tolist()], dtype=torch.float64)
    exact = loss(Context(made.sae, pool.x, 0, 10))
    drawn = []
    for _ in range(400):
        ctx = Context(made.sae, pool.x, 0, 10, document=pool.document, position=pool.position)
        made._choose(ctx)
        assert len(ctx.x) == 256 and float(ctx.importance.mean()) == pytest.approx(1, abs=0.3)
        drawn.append(loss(ctx))
    drawn = torch.stack(drawn)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - exact).abs() <= 4 * error + 1e-9).all())
    even = torch.stack([loss(Context(made.sae, pool.x[torch.randint(512, (256,))], 0, 10)) for _ in range(200)])
    assert drawn.std(0)[0] < even.std(0)[0]


def test_pruned_latents_are_the_least_used_and_stay_silent():
    entries = [{"name": "utilisation", "beta": 0.99}, {"name": "pruning", "share": {
        "kind": "linear", "start": 0, "end": 0.25, "begin": 0.3, "finish": 0.8}}]
    result, verdict, run = train(Planted(), ingredients=entries)
    assert verdict.status == "valid" and verdict.flags == []
    assert result.report["idle_share"] == 0.25
    silent = (result.sae.encode(Planted().test) > 0).sum(0) == 0
    assert int(silent.sum()) >= 24 and result.report["dead_share"] < 0.5
    assert runs.read_json(run.path / "sae/cfg.json")["architecture"] == "topk"
    # 64 planted directions and 96 latents: pruning the least used costs next to nothing.
    assert result.report["explained_variance"] > train()[0].report["explained_variance"] - 0.02


@pytest.mark.parametrize("architecture", ["topk", "standard", "batch_topk"])
def test_reinitialised_latents_fire(architecture):
    entry = {"name": "reinitialisation", "times": 1, "begin": 0.5, "finish": 0.6}
    p = check("train", {"architecture": architecture, "d_sae": 96, "k": 3, "batch_size": 256, "samples": 256 * 20,
                        "lr": 2e-3, "threads": 1, "mode": "batch", "aux_k": 0, "aux_dead_after": 256,
                        "target_l0": 4 if architecture == "standard" else None, "ingredients": [entry]})
    source = Planted()
    made = trainer.Trainer(p, source)
    with torch.no_grad():
        made.sae.b_enc[:8] = -100
        made.sae.W_dec[:8] = torch.eye(32)[:8]
    batches = source.batches(256, 256 * 20)
    for _ in range(11):
        batch = next(batches)
        made.one_step(batch)
    assert int(made.ingredients[0].state["total"]) >= 8
    ctx = made.sae.run(Context(made.sae, batch.x * source.scale, made.step, made.total_steps))
    assert int(ctx.fired[:8].sum()) >= 7, "they are active on the batch that they came from"
    assert float(made.optimiser.first[0][:8].abs().max()) == 0
    assert torch.allclose(made.sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-5)
    for batch in batches:
        made.one_step(batch)
    assert int((made.silent[:8] < 256 * 8).sum()) >= 5


@pytest.mark.parametrize("name", ["contrastive", "winner_take_all", "sparsity_bounds", "diversity", "decorrelation"])
def test_alone_each_trains_to_a_valid_sae(name):
    entries = [{"name": "utilisation"}, {"name": name}]
    result, verdict, run = train(ingredients=entries, architecture="standard", target_l0=4, samples=300_000)
    assert verdict.status == "valid", verdict.reasons
    assert not [flag for flag in verdict.flags if "unfinished" in flag]
    assert torch.allclose(load_sae(run.path / "sae")(Planted().test), result.sae(Planted().test), atol=1e-5)
