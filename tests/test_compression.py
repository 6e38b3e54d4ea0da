"""Study 4's ingredients: beside plain dense float64 autograd, what each does to a planted dictionary, saving."""

import math

import pytest
import torch
import yaml
from synthetic import Planted
from test_gradients import D, F, relative, weights
from test_trainer import SMALL, train

from sae_lib import runs
from sae_lib.evaluation import validity
from sae_lib.params import ParameterError, check
from sae_lib.sae import architectures, kernels
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.codes import CSR, Dense, FixedK
from sae_lib.sae.context import Context
from sae_lib.training import terms, trainer
from sae_lib.training.activity import Activity
from sae_lib.training.ingredients import configured, load_sae
from sae_lib.training.ingredients.nt_xent import nt_xent, rows_between

STEP, STEPS = 3, 10
FORMS = {"fixed k": ("topk", True, 0.0, FixedK), "ragged": ("standard", True, -2.0, CSR),
         "dense": ("standard", False, 0.0, Dense)}
"""Architecture, sparse kernel, shift of the bias, and the codes that come of it."""
VARIANTS = ["bounded_compression_fixed", *(f"bounded_compression_{n}" for n in range(1, 10))]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


def random(*shape, seed=5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- against the mathematics, written out in float64 -------------------------------------------------------------------

def compare(form, entries, state, dense):
    """Forward and gradients of ``entries``' ingredients on a form of codes, beside ``dense(f, own, a)``.

    ``state`` has what their states start with, float64; ``dense`` gives the latents and any further loss.
    """
    name, sparse, shift, kind = FORMS[form]
    values = {"architecture": name, "d_sae": F, "k": 5, "aux_k": 0, "l1": 0.3, "ingredients": entries,
              "order": "sequence_blocks"}
    p = check("train", values)
    *small, x = weights(torch.float32)
    small[1] += shift
    parts = [make(config, D, F, torch.Generator().manual_seed(0)) for make, config in configured(p)]
    for part in parts:
        for key in set(part.state) & set(state):
            part.state[key] = state[key].float().requires_grad_(key in part.learnt)
    sae = SparseAutoencoder(*small, architectures.get(name).from_params(p, D))
    sae.kernel = kernels.pick("cpu", sparse=sparse and "layer_norm" not in {part.name for part in parts})
    sae.hooks = [part for part in parts if part.changes_forward]
    rows = torch.arange(len(x))
    ctx = sae.run(Context(sae, x, STEP, STEPS, document=rows // 20, position=rows % 20))
    assert isinstance(ctx.selected, kind if isinstance(sae.kernel, kernels.Sparse) or kind is FixedK else Dense)
    losses = terms.loss_terms(ctx, parts)
    sum(losses.values()).backward()

    enc, b_enc, dec, b_dec = doubles = [part.double().requires_grad_() for part in small]
    own = {key: value.detach().float().double().requires_grad_() for key, value in state.items()}
    a = (x.double() - b_dec) @ enc.T + b_enc
    def select(a):
        return a.relu() if name == "standard" else \
            a.relu() * torch.zeros_like(a).scatter(1, a.topk(5, dim=1).indices, 1.0)
    f, further = dense(select, a, own)
    error = ((x - f @ dec - b_dec) ** 2).sum(1).mean()
    loss = error + further + (0.3 * f.sum(1).mean() * (STEP / STEPS >= 0.1) if name == "standard" else 0)
    assert relative(ctx.codes.dense().detach(), f) < 1e-5
    assert float(sum(losses.values())) == pytest.approx(float(loss), rel=1e-5)
    learnt = {key: part.state[key] for part in parts for key in sorted(part.learnt)}
    truth = torch.autograd.grad(loss, [*doubles, *(own[key] for key in learnt)], allow_unused=True)
    for found, expected in zip([*sae.parameters(), *learnt.values()], truth):
        assert relative(found.grad, expected) < 1e-5
    return ctx, parts, truth


def score_of(f, own):
    """Log importance, as a running mean at step 3 after ``own['importance']``."""
    return (0.75 * own["importance"] + 0.25 * f.mean(0)).detach().log()


def soft_and_hard(score, count, temperature=0.3):
    ranked = score.detach().sort(descending=True)
    bound = ranked.values[count - 1:count + 1].mean()
    return torch.sigmoid((score - bound) / temperature), (score.detach() > bound).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind, learned", [("hard", False), ("sigmoid", False), ("sigmoid", True), ("gate", False)])
def test_mask(form, kind, learned):
    def dense(select, a, own):
        f = select(a)
        soft, hard = soft_and_hard(score_of(f, own) + own["omega"], math.ceil(0.4 * F))
        if kind == "gate":
            return f * (0.2 + 0.8 * (hard + soft - soft.detach())), 0
        mask = hard if kind == "hard" else soft if learned else soft.detach()
        return f * (mask + 0.2).clamp(0, 1), 0
    entry = {"name": "bounded_mask", "kind": kind, "learned": learned, "ratio": 0.4, "skip": 0.2}
    omega = (random(F, seed=1) - 0.5) * (learned or kind == "gate")
    ctx, (part,), truth = compare(form, [entry], {"importance": 0.1 + random(F), "omega": omega}, dense)
    assert part.kept() == math.ceil(0.4 * F)
    if learned or kind == "gate":
        assert truth[-1].abs().sum() > 0
    assert ctx.own["unmasked"].dense().sum() > ctx.own["masked"].dense().sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["hard", "sigmoid"])
def test_hierarchy(form, kind):
    """Blocks of 32, 8 and 1: each level chooses among what the one above kept; together they keep r."""
    def dense(select, a, own):
        f = select(a)
        importance, allowed, factor = score_of(f, own).exp(), torch.ones(F).bool(), 1
        for left, size in ((3, 32), (2, 8), (1, 1)):
            share = (0.3 * F / int(allowed.sum())) ** (1 / left)
            sums = importance.view(-1, size).sum(1).log()
            inside = [i for i in range(F // size) if allowed[i * size]]
            count = math.ceil(share * len(inside) - 1e-9)
            ranked = sorted(inside, key=lambda i: -float(sums[i]))
            hard = torch.zeros(F // size, dtype=torch.float64)
            hard[ranked[:count]] = 1
            bound = sums[ranked[count - 1:count + 1]].mean() if count < len(inside) else -torch.inf
            mask = hard if kind == "hard" else torch.sigmoid((sums - bound) / 0.3)
            factor = factor * (mask.repeat_interleave(size) + 0.1).clamp(0, 1)
            allowed = hard.repeat_interleave(size).bool()
        return f * factor, 0
    entry = {"name": "mask_hierarchy", "kind": kind, "ratio": 0.3, "skip": 0.1, "blocks": [32, 8, 1],
             "importance": "running"}
    _, (part,), _ = compare(form, [entry], {"importance": 0.1 + random(F)}, dense)
    mask = part.state["mask"]
    assert kind == "sigmoid" or (mask[1] <= mask[0]).all() and (mask[2] <= mask[1]).all()
    assert kind == "sigmoid" or part.kept() == math.ceil(0.3 * F)


@pytest.mark.parametrize("form", FORMS)
def test_paths(form):
    """The gradient into a path is scaled; the scale's is that of a factor of the path."""
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f, s):
            ctx.save_for_backward(f, s)
            return f.clone()

        @staticmethod
        def backward(ctx, grad):
            f, s = ctx.saved_tensors
            return grad * s, (grad * f).sum(0)

    def dense(select, a, own):
        f = select(a)
        score = score_of(f, own)
        hard = torch.stack([soft_and_hard(score[p::4], math.ceil(0.7 * F / 4))[1] for p in range(4)], 1).flatten()
        return Scaled.apply(f * (hard + 0.2).clamp(0, 1), own["log_scales"].exp().repeat(F // 4)), 0
    entry = {"name": "parallel_paths", "ratio": 0.7, "skip": 0.2}
    compare(form, [entry], {"importance": 0.1 + random(F), "log_scales": random(4) - 0.5}, dense)


@pytest.mark.parametrize("form", FORMS)
def test_mixing(form):
    def dense(select, a, own):
        f = select(a)
        return (f + (f @ own["U"]) @ own["V"].T).relu() * (f > 0), 0
    compare(form, [{"name": "mixing", "rank": 3}], {"U": random(F, 3) - 0.5, "V": random(F, 3, seed=2) - 0.7}, dense)


@pytest.mark.parametrize("form", FORMS)
def test_layer_norm(form):
    def dense(select, a, own):
        centred = a - a.mean(1, keepdim=True)
        return select(own["gain"] * centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() + own["bias"]), 0
    compare(form, [{"name": "layer_norm"}], {"gain": 0.5 + random(F), "bias": random(F, seed=2) - 0.8}, dense)


@pytest.mark.parametrize("form", FORMS)
def test_nt_xent(form):
    """All 40 rows in two documents of 20: 38 positive pairs, both directions, every other row a negative."""
    def dense(select, a, own):
        f = select(a)
        z = f / f.norm(dim=1, keepdim=True).clamp_min(1e-8)
        e, total = (z @ z.T / 0.1).exp(), 0
        for b in range(39):
            if b != 19:
                for one, other in ((b, b + 1), (b + 1, b)):
                    total = total - (e[one, other] / (e[one].sum() - e[one, one])).log()
        return f, 0.7 * total / 76
    compare(form, [{"name": "nt_xent", "weight": 0.7, "tokens": 100}], {}, dense)


@pytest.mark.parametrize("form", FORMS)
def test_the_contrastive_slice_is_those_rows(form):
    name, sparse, shift, _ = FORMS[form]
    *small, x = weights(torch.float32)
    small[1] += shift
    sae = SparseAutoencoder(*small, architectures.get(name)(k=5))
    sae.kernel = kernels.pick("cpu", sparse=sparse)
    codes = sae.run(Context(sae, x)).codes
    assert torch.equal(rows_between(codes, 7, 23), codes.dense()[7:23])


def test_packed_activity_is_the_dense_form():
    """Batches that fill words in part, wrap around, or are longer than the ring."""
    g = torch.Generator().manual_seed(0)
    ring, seen = Activity(50, 192), torch.zeros(0, 50, dtype=torch.bool)
    for size in (10, 64, 118, 1, 300, 77, 192):
        latents = torch.rand(size, 50, generator=g) * (torch.rand(size, 50, generator=g) < 0.2)
        codes = Dense(latents).csr()
        ring.record(CSR(codes.offsets, codes.indices, codes.values, 50))
        seen = torch.cat([seen, latents > 0])[-192:]
        assert torch.equal(ring.counts(), seen.sum(0))
    assert ring.bytes == 50 * 192 / 8
    with pytest.raises(ValueError, match="multiple of 64"):
        Activity(50, 100)


# -- what each does ----------------------------------------------------------------------------------------------------

def masked(result, name="bounded_mask"):
    return next(hook for hook in result.sae.hooks if hook.name == name)


def test_masked_latents_are_idle_and_not_called_dead():
    """A hard mask of a third: two thirds never fire, and the gate counts them apart."""
    result, verdict, _ = train(ingredients=[{"name": "bounded_mask", "ratio": 1 / 3}])
    assert verdict.status == "valid" and verdict.flags == []
    assert result.report["idle_share"] == pytest.approx(2 / 3) and result.report["dead_share"] < 0.5
    assert ((result.sae.encode(Planted().test) > 0).any(0) & masked(result).idle()).sum() == 0
    assert result.report["measured"]["bounded_mask"]["kept"] == 32


def test_a_masked_latent_comes_back_when_it_matters():
    entry = {"name": "bounded_mask", "ratio": 0.5, "importance": "ema", "beta": 0.5}
    kind, config = configured(check("train", {"ingredients": [entry]}))[0]
    part, codes = kind(config, D, 4), Dense(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    def step(codes):
        return part.transform(codes, Context(None, None, 1, 10)).values[0].tolist()
    assert step(codes) == [4.0, 3.0, 0.0, 0.0]
    assert part.idle().tolist() == [False, False, True, True]
    assert step(Dense(torch.tensor([[1.0, 1.0, 1.0, 9.0]]))) == [1.0, 0.0, 0.0, 9.0]


def test_before_training_and_while_warming_up_the_mask_is_one():
    entry = {"name": "bounded_mask", "ratio": 0.5, "begin": 0.5}
    kind, config = configured(check("train", {"ingredients": [entry]}))[0]
    part, codes = kind(config, D, 4), Dense(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    for step, total, left in ((0, 0, 4), (0, 10, 4), (4, 10, 4), (0, 0, 4), (5, 10, 2), (0, 0, 2)):
        assert (part.transform(codes, Context(None, None, step, total)).values > 0).sum() == left
    assert part.idle().sum() == 2


@pytest.mark.parametrize("begin, says", [(10_000, ["schedule unfinished: bounded_mask.begin"]), (40, [])])
def test_a_warm_up_in_steps_that_the_run_does_not_reach_is_said(begin, says):
    """As in the study: 8000 steps of warm-up in a run of 2441, so that there never was a mask."""
    result, verdict, _ = train(samples=256 * 100, ingredients=[{"name": "bounded_mask", "ratio": 0.5, "begin": begin}])
    assert verdict.flags == says
    assert result.report["idle_share"] == (0 if says else 0.5)


def test_the_dynamic_ratio_follows_what_carries_the_importance():
    entry = {"name": "bounded_mask", "ratio": "dynamic", "bounds": [0.2, 0.6], "share": 0.9}
    kind, config = configured(check("train", {"ingredients": [entry]}))[0]
    for values, ratio in (([50.0, 30, 15, 5, 0, 0, 0, 0, 0, 0], 0.3), ([1.0] * 10, 0.6), ([99.0] + [0.1] * 9, 0.2)):
        part = kind(config, D, 10)
        part.transform(Dense(torch.tensor([values])), Context(None, None, 0, 10))
        assert float(part.state["in_force"][0]) == pytest.approx(ratio)
        assert part.kept() == round(10 * ratio)


def test_the_scheduled_ratio_is_reached():
    ratio = {"kind": "linear", "start": 0.9, "end": 0.5, "begin": 0.1, "finish": 0.8}
    for entry in ({"name": "bounded_mask"}, {"name": "bounded_mask", "kind": "sigmoid"},
                  {"name": "parallel_paths"}, {"name": "mask_hierarchy", "blocks": [8, 1]}):
        result, verdict, _ = train(samples=60_000, ingredients=[entry | {"ratio": ratio}])
        assert verdict.status == "valid"
        kept = result.report["measured"][entry["name"]]["kept"]
        assert kept == 48
        column = result.history[f"value/{entry['name']}.ratio"]
        assert column.iloc[0] == pytest.approx(0.9) and column.iloc[-1] == pytest.approx(0.5)


def test_a_gate_learns_which_latents_are_wanted():
    """Latents that only lengthen the code's error are gated away although they fire most."""
    entry = {"name": "bounded_mask", "kind": "gate", "ratio": 0.5, "skip": 0.5}
    result, verdict, _ = train(ingredients=[entry])
    omega = masked(result).state["omega"]
    assert verdict.status == "valid" and omega.abs().max() > 0.05
    kind, config = configured(check("train", {"ingredients": [entry | {"skip": 0.0}]}))[0]
    part = kind(config, D, 4)
    part.state["omega"].requires_grad_()
    optimiser = torch.optim.Adam([part.state["omega"]], lr=0.1)
    for step in range(60):
        codes = Dense(torch.tensor([[4.0, 3.0, 2.9, 1.0]], requires_grad=True))
        f = part.transform(codes, Context(None, None, step, 100)).values
        optimiser.zero_grad()
        (f - torch.tensor([[0.0, 3.0, 2.9, 0.0]])).square().sum().backward()
        optimiser.step()
    assert part.state["mask"][0].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_layer_norm_starts_with_the_share_that_the_architecture_has():
    """Of each latent on the sample, for biases that start training sparse, thresholds, and topk."""
    for name, changes in (("standard", {"target_l0": 2, "start_l0": 3}), ("jumprelu", {"target_l0": 2, "start_l0": 3}),
                          ("topk", {})):
        values = {"architecture": name, "ingredients": [{"name": "layer_norm"}], "precision": "float32"}
        made = trainer.Trainer(check("train", SMALL | values | changes), Planted())
        x, sae = made.source.x[:4096] * made.source.scale, made.sae
        sample = next(iter(made.source.batches(4096, 4096, seed=made.p.seed))).x * made.source.scale
        before = sae.kernel.pre_activations(sample, sae)
        after = sae.hooks[0].before_selection(before, None)
        least = dict(sae.further).get("threshold", 0)
        assert (((before > least).sum(0) - (after > least).sum(0)).abs() <= 3).all()  # of equal rows
        with torch.no_grad():
            plain = sae.architecture.select(sae.kernel.pre_activations(x, sae), Context(sae, x)).l0()
            assert sae.run(Context(sae, x)).codes.l0() == pytest.approx(plain, rel=0.1)


def test_mixing_is_absent_at_first_and_learnt():
    kind, config = configured(check("train", {"ingredients": [{"name": "mixing"}]}))[0]
    part = kind(config, D, F, torch.Generator().manual_seed(0))
    codes = Dense(random(6, F).float()).csr()
    assert torch.equal(part.transform(codes, None).values, codes.values)
    result, verdict, _ = train(ingredients=[{"name": "mixing"}])
    assert verdict.status == "valid" and result.report["measured"]["mixing"]["V_norm"] > 0.1


class Neighbours(Planted):
    """Documents of 16 tokens in which each token shares a planted direction with the next; batches are documents."""

    def __init__(self):
        super().__init__(rows=8192)
        g = torch.Generator().manual_seed(7)
        shared = self.dictionary[torch.randint(len(self.dictionary), (8193,), generator=g)]
        both = torch.cat([self.x, self.test]) + 1.5 * (shared[1:] + shared[:-1])
        self.x, self.test = both[:len(self.x)], both[len(self.x):]
        self.scale = float((self.d_in / self.x.square().sum(1).mean()) ** 0.5)

    def batches(self, batch_size, samples, *, order="shuffled", seed=0, start=0):
        g = torch.Generator().manual_seed(seed)
        for number in range(samples // batch_size):
            blocks = torch.randint(self.n_train // 16, (-(-batch_size // 16), 1), generator=g)
            rows = (16 * blocks + torch.arange(16)).flatten()[:batch_size]
            if number >= start:
                yield self._batch(self.x[rows])


def test_adjacent_positives_grow_more_alike():
    """Latents that are free go to their neighbours and from all others; in a paired training the loss falls."""
    z = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimiser, later = torch.optim.Adam([z], lr=0.02), torch.arange(1, 64, 2)
    for _ in range(200):
        optimiser.zero_grad()
        nt_xent(z.relu(), later, 0.1).backward()
        optimiser.step()
    unit = torch.nn.functional.normalize(z.detach().relu(), dim=1)
    similar, pair = unit @ unit.T, torch.arange(64) // 2
    assert similar[later, later - 1].min() > 0.95 and similar[pair[:, None] != pair].mean() < 0.3

    changes = {"architecture": "standard", "l1": 1.5, "target_l0": 8, "order": "sequence_blocks"}
    without, drawn = (train(Neighbours(), **changes, ingredients=[{"name": "nt_xent", "weight": weight}])[0].history
                      for weight in (1e-3, 3.0))
    half = len(drawn) // 2  # the same batches and slices in both
    assert drawn["loss/nt_xent"][half:].mean() / 3 < without["loss/nt_xent"][half:].mean() / 1e-3 - 0.1


@pytest.mark.parametrize("entries, says", [
    ([{"name": "bounded_mask", "ratio": 0}], "bounded_mask.ratio"),
    ([{"name": "bounded_mask", "skip": 1.5}], "a share from 0 to 1"),
    ([{"name": "bounded_mask", "ratio": "dynamic"}], "belong together"),
    ([{"name": "bounded_mask", "bounds": [0.1, 0.5]}], "belong together"),
    ([{"name": "bounded_mask", "ratio": "dynamic", "bounds": [0.5, 0.1]}], "r_min <= r_max"),
    ([{"name": "bounded_mask", "learned": True}], "set kind: sigmoid, or kind: gate"),
    ([{"name": "bounded_mask"}, {"name": "parallel_paths"}], "one mask at a time; bounded_mask, parallel_paths"),
    ([{"name": "bounded_mask", "window": 100}], "multiple of 64"),
    ([{"name": "mask_hierarchy", "blocks": [64, 9]}], "must divide the one before it"),
    ([{"name": "nt_xent"}], "set order: sequence_blocks"),
])
def test_what_cannot_be_is_refused(entries, says):
    with pytest.raises(ParameterError, match=says):
        configured(check("train", {"ingredients": entries}))


# -- the study's variants ----------------------------------------------------------------------------------------------

def scaled_down(name, **changes):
    """The variant's own ingredients at the size of the planted dictionary."""
    held = yaml.safe_load((runs.project() / f"params/variants/{name}.yaml").read_text())
    entries = [dict(entry) for entry in held["ingredients"]]
    for entry in entries:
        entry |= {"blocks": [16, 4, 1]} if entry["name"] == "mask_hierarchy" else {}
        entry |= {"window": 4096} if entry.get("importance") == "activity" else {}
    return {"architecture": held["architecture"], "l1": 1.5, "target_l0": 8, "lr": 1e-3, "ingredients": entries,
            "order": held.get("order", "shuffled"), "k": 32, "aux_dead_after": 100_000} | changes


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_trains_and_is_valid(name):
    """Its schedules finish, its terms are neither inert nor dominating, and the saved SAE is the trained one."""
    changes = scaled_down(name, samples=400_000)
    result, verdict, run = train(Neighbours(), **changes)
    assert verdict.status == "valid" and verdict.flags == [], verdict
    assert result.report["explained_variance"] > 0.4
    mask = next(entry for entry in changes["ingredients"] if "ratio" in entry)
    found = result.report["measured"][mask["name"]]
    assert found["kept"] < 96 or mask["ratio"] in (0.99, 0.999)  # all, of so few
    end = mask["ratio"]["end"] if isinstance(mask["ratio"], dict) else mask["ratio"]
    assert found["ratio"] == pytest.approx(end) if end != "dynamic" else 0.3 <= found["ratio"] <= 0.9
    plain = name[-1] in "d123"
    assert found["bound"]["applicable"] == plain and found["bound"].get("holds", True)
    assert plain or "layer_norm" in found["bound"]["reason"]
    x, back = Neighbours().test, load_sae(run.path / "sae")
    assert torch.equal(back(x), result.sae(x))
    for hook, trained in zip(back.hooks, result.sae.hooks, strict=True):
        for key, value in trained.state_dict().items():
            assert torch.equal(hook.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["bounded_compression_fixed", *(f"bounded_compression_{n}" for n in (5, 6, 7, 8, 9))])
def test_resumed_in_the_same_bits(name, capsys):
    changes = scaled_down(name, checkpoint_every=40, samples=256 * 100)
    plain = train(Neighbours(), run="plain", **changes)[0].sae
    p = check("train", SMALL | changes | {"run": "cut"})
    run = runs.start(p)
    first = trainer.Trainer(p, Neighbours())
    whole = first.one_step
    first.one_step = lambda *a, **k: (_ for _ in ()).throw(RuntimeError) if first.step == 70 else whole(*a, **k)
    with pytest.raises(RuntimeError):
        first.fit(run.path / "checkpoints")
    resumed = trainer.train(p, Neighbours(), run).sae
    assert "going on from the checkpoint of step 40" in capsys.readouterr().out
    for (key, a), b in zip(plain.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), key
    for one, other in zip(plain.hooks, resumed.hooks, strict=True):
        for key, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["bounded_compression_fixed", "bounded_compression_5", "bounded_compression_9"])
def test_a_variants_file_on_the_tiny_model(name, tiny_store, tiny):
    """The file as it is, but for its size; a store's documents and positions are what NT-Xent reads."""
    held = yaml.safe_load((runs.project() / f"params/variants/{name}.yaml").read_text())
    sizes = {"d_sae": 256, "target_l0": 8, "l1": 1.0, "samples": 256 * 300, "batch_size": 256, "lr": 2e-3}
    p = check("train", tiny().model_dump() | held | sizes | {"run": "tiny", "threads": 1, "warmup_steps": 20})
    run = runs.start(p)
    result = trainer.train(p, tiny_store, run)
    verdict = validity.update(run)
    assert verdict.status == "valid", verdict
    assert not [flag for flag in verdict.flags if "schedule" in flag or "inert" in flag or "dominates" in flag]
    x = tiny_store.heldout(100).x
    assert torch.equal(load_sae(run.path / "sae")(x), result.sae(x))
