"""Pair statistics: the packed form is the dense one for every option; windows, storage, counts, and the term."""

import numpy as np
import pytest
import torch
from numba import njit
from synthetic import Planted
from test_trainer import train

from sae_lib.params import check
from sae_lib.sae.codes import FixedK
from sae_lib.sae.context import Context
from sae_lib.training import phases
from sae_lib.training.coactivation import bits, cost, counting
from sae_lib.training.coactivation.dense import DensePairs, consecutive_weights, pair_term
from sae_lib.training.coactivation.packed import PackedPairs, consecutive_term, follows
from sae_lib.training.coactivation.rule import Rule
from sae_lib.training.ingredients import configured

F, K, B = 96, 6, 50


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))


def stream(steps, k=K, n_latents=F, batch=B, seed=0):
    """Batches of codes with some slots inactive, latents of a group firing together."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        groups = torch.randint(0, n_latents // (2 * k), (batch, 1), generator=g) * 2 * k
        likely = torch.rand(batch, n_latents, generator=g) + 2.0 * ((torch.arange(n_latents) - groups).abs() < k)
        values = torch.rand(batch, k, generator=g)
        values[values < 0.1] = 0
        yield FixedK(likely.topk(k, dim=1).indices, values.requires_grad_(), n_latents)


RULES = {"window 20": Rule(20), "window 50, the batch": Rule(50), "window 75": Rule(75), "window 200": Rule(200),
         "window 1": Rule(1), "gamma 0.3": Rule(30, gamma=0.3), "gamma 0": Rule(30, gamma=0.0),
         "after reset, short": Rule(20, after_reset=True), "after reset, long": Rule(130, after_reset=True),
         "latent rate, short": Rule(20, latent_rate=True), "latent rate, long": Rule(70, latent_rate=True),
         "decay of the absent": Rule(20, decay_absent=True)}


@pytest.mark.parametrize("diagonal", [False, True], ids=["", "diagonal"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("precise", [True, False], ids=["float32", "16bit"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_packed_form_is_the_dense_one(rule, precise, power, diagonal):
    """Values, gradients and stability on one stream, step by step, beside float64."""
    dense, packed = DensePairs(F, rule, dtype=torch.float64), PackedPairs(F, rule, precise)
    bound = 1e-5 if precise else 1e-3
    for codes in stream(12):
        latents = codes.dense().double()
        expected = pair_term(dense.weights(latents), latents, power, diagonal)
        truth = torch.autograd.grad(expected, codes.values)[0] * (codes.values > 0)
        found = packed.term(codes.csr(), power, diagonal)
        assert float(found) == pytest.approx(float(expected), rel=bound)
        assert (torch.autograd.grad(found, codes.values)[0] - truth).norm() < bound * truth.norm()
    assert (packed.tokens, packed.windows) == (dense.tokens, dense.windows)
    if dense.stability is not None:
        assert torch.allclose(packed.stability.double(), dense.stability, atol=bound)


def test_sixteen_bits_do_not_drift():
    """Over 250 windows the value and the gradient stay within 5e-3 of the float32 form's."""
    short, precise = PackedPairs(F, Rule(20)), PackedPairs(F, Rule(20), precise=True)
    for codes in stream(100):
        a, b = (pairs.term(codes.csr(), 2, False) for pairs in (short, precise))
        one, two = (torch.autograd.grad(term, codes.values)[0] for term in (a, b))
        assert abs(float(a / b) - 1) < 5e-3 and (one - two).norm() < 5e-3 * two.norm()
    assert short.windows == 250


@pytest.mark.parametrize("power", [1, 2])
def test_consecutive_weights(power):
    g = torch.Generator().manual_seed(1)
    for codes in stream(3, k=20):
        after = torch.rand(B, generator=g) > 0.3
        latents = codes.dense().double()
        expected = pair_term(consecutive_weights(latents, after, -0.5), latents, power, False)
        truth = torch.autograd.grad(expected, codes.values)[0] * (codes.values > 0)
        found = consecutive_term(codes.csr(), after, -0.5, power, False)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        assert (torch.autograd.grad(found, codes.values)[0] - truth).norm() < 1e-5 * truth.norm()


def test_power_1_counts_pairs_on_tokens():
    """The study's formula, term by term: (1/B) sum_b sum_{i != j in A_b} w_ij f_bi f_bj."""
    codes = next(stream(1))
    weights = DensePairs(F, Rule(20)).weights(codes.dense().double())
    latents, total = codes.dense().double().detach(), 0.0
    for token in latents:
        active = token.nonzero()[:, 0].tolist()
        total += sum(float(weights[i, j] * token[i] * token[j]) for i in active for j in active if i != j)
    assert float(PackedPairs(F, Rule(20)).term(codes.csr(), 1, False)) == pytest.approx(total / B, rel=1e-5)


def test_what_follows_what():
    document, position = torch.tensor([1, 1, 1, 2, 2, 1]), torch.tensor([1, 2, 4, 5, 6, 7])
    assert follows(document, position).tolist() == [False, True, False, False, True, False]


def weights_after(rule, batches=5, batch=2048):
    pairs = DensePairs(32, rule)
    return [pairs.weights(codes.dense()) for codes in stream(batches, k=4, n_latents=32, batch=batch)][-1]


def test_windows_of_500_1000_and_4096_tokens_weigh_differently():
    found = [weights_after(Rule(window)) for window in (500, 1000, 4096)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] - found[b]).norm() > 0.01 * found[b].norm()


def test_the_studys_reset_makes_every_short_window_one_run():
    """Batch 2048, windows up to it, reset before the weights are read: the departure reproduces the fault."""
    found = [weights_after(Rule(window, after_reset=True)) for window in (500, 1000, 2048)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert not torch.equal(found[0], weights_after(Rule(4096, after_reset=True)))
    stalled, moving = (DensePairs(32, Rule(1000, latent_rate=rate)) for rate in (True, False))
    for codes in stream(6, k=4, n_latents=32, batch=2048):
        stalled.weights(codes.dense())
        moving.weights(codes.dense())
    assert float(stalled.average.sum()) < 0.01 * float(moving.average.sum())


DECLARED = {"weight": 0.5, "power": 1, "window_size": 300, "gamma": 0.2, "space": "decoder", "diagonal": "include",
            "reduction": "mean_pairs", "read": "after_reset", "alpha": "latent_rate", "absent": "decay",
            "weights": "consecutive", "storage": "float32"}


def test_every_declared_parameter_changes_the_run():
    def loss(**changes):
        entry = {"name": "temporal_coactivation", "weight": 0.1, "power": 2, "window_size": 400} | changes
        result, *_ = train(samples=256 * 12, ingredients=[entry], order="sequence_blocks", warmup_steps=1)
        return result.history["loss/temporal_coactivation"].to_numpy()
    plain = loss()
    assert np.array_equal(plain, loss())
    for key, value in DECLARED.items():
        assert not np.array_equal(plain, loss(**{key: value})), key
    run_0, decoder = {"weights": "consecutive"}, {"space": "decoder"}
    assert not np.array_equal(loss(**run_0), loss(**run_0, beta=-2.0))
    assert not np.array_equal(loss(**decoder), loss(**decoder, chunk=48))


def test_decoder_space_is_unbiased():
    """Chunks of the latents, scaled: on average the sum over all pairs of w |cos|^2, within four standard errors."""
    entry = {"name": "temporal_coactivation", "weight": 1.0, "power": 2, "space": "decoder", "chunk": 20}
    kind, config = configured(check("train", {"ingredients": [entry]}))[0]
    rows = torch.randn(F, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    unit, codes = torch.nn.functional.normalize(rows, dim=1), next(stream(1))
    weights = DensePairs(F, Rule(1000), dtype=torch.float64).weights(codes.dense().double()).fill_diagonal_(0)
    exact = float((weights * (unit @ unit.T) ** 2).sum())
    found = []
    for seed in range(300):
        part = kind(config, 12, F, torch.Generator().manual_seed(seed))
        ctx = Context(None, torch.zeros(B, 12), 0, 10, codes=codes, rows=rows)
        found.append(float(part.penalty(ctx)))
    found = np.array(found)
    assert abs(found.mean() - exact) < 4 * found.std() / 300**0.5


def test_bits_keep_eleven_of_them_and_round_without_bias():
    values = np.geomspace(1e-9, 1, 4000).astype(np.float32)
    codes = np.zeros(4000, np.uint16)
    read = np.zeros((200, 4000))
    for time in range(200):
        _write(codes, values, time)
        read[time] = _read(codes)
    assert (np.abs(read / values - 1) < 2**-11).all()
    assert abs((read.mean(0) / values - 1).mean()) < 1e-6
    _write(codes, np.zeros(4000, np.float32), 0)
    assert not _read(codes).any()


@njit
def _write(codes, values, time):
    for k in range(codes.size):
        bits.store(codes, k, values[k], time)


@njit
def _read_into(codes, out):
    for k in range(codes.size):
        out[k] = bits.load(codes, k)


def _read(codes):
    out = np.zeros(codes.size, np.float32)
    _read_into(codes, out)
    return out


def test_threads_do_not_change_a_bit():
    import numba
    found, before = [], numba.get_num_threads()
    for threads in (1, 2):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        pairs = PackedPairs(F, Rule(70))
        terms = [pairs.term(codes.csr(), 2, False) for codes in stream(5)]
        found.append([torch.stack(terms), pairs.counts.int(), pairs.average.int(), pairs.stability])
    numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_state_is_all_of_it():
    one, two = PackedPairs(F, Rule(70, latent_rate=True)), PackedPairs(F, Rule(70, latent_rate=True))
    for step, codes in enumerate(stream(9)):
        value = one.term(codes.csr(), 2, False)
        if step == 4:
            two.load_state_dict({key: part.clone() for key, part in one.state_dict().items()})
        if step > 4:
            assert torch.equal(value, two.term(codes.csr(), 2, False))


def test_the_term_keeps_pairs_from_firing_together():
    """Latents that fire in pairs: the term lowers the overlap of their codes, and training stays valid."""
    found = {}
    for weight in (0.0, 5.0):
        entry = {"name": "temporal_coactivation", "weight": weight, "power": 2, "window_size": 500}
        result, verdict, _ = train(Planted(active=2), ingredients=[entry], order="sequence_blocks", samples=100_000)
        latents = result.sae.encode(Planted(active=2).test)
        gram = (latents.T @ latents / len(latents)).fill_diagonal_(0)
        found[weight] = float(gram.square().sum())
        assert verdict.status == "valid"
    assert found[5.0] < 0.9 * found[0.0]


def test_counts_are_the_dense_ones(tmp_path):
    codes = next(stream(1, batch=400)).csr()
    mask = (codes.dense() > 0).float()
    dense = (mask.T @ mask).triu()
    counts = counting.count(codes)
    assert np.array_equal(counts.pairs.toarray(), dense.numpy()) and counts.tokens == 400
    off = dense.clone().fill_diagonal_(0)
    assert counts.seen == int((off > 0).sum()) == counts.overlap.sum()
    few = counting.count(codes, limit=50)
    kept = few.pairs.toarray() - np.diag(few.pairs.diagonal())
    assert (kept > 0).sum() <= 50 and few.pairs.diagonal().tolist() == dense.diagonal().tolist()
    assert np.array_equal(kept, np.where(off >= few.least, off, 0))
    counts.save(tmp_path, "end")
    from scipy import sparse
    assert (sparse.load_npz(tmp_path / "end.npz") != counts.pairs).nnz == 0


def test_phases_are_measured_and_kept():
    result, _, run = train(samples=256 * 30)
    assert [phase["phase"] for phase in result.report["phases"]] == ["early", "middle", "late"]
    assert [phase["step"] for phase in result.report["phases"]] == [10, 20, 30]
    for phase in result.report["phases"]:
        assert sum(phase["cosines"]["pairs"]) == 96 * 95 / 2
        assert sum(phase["overlap"]["pairs"]) == phase["pairs_seen"] > 0
        assert (run.path / f"coactivation/{phase['phase']}.npz").exists()
    unit = torch.nn.functional.normalize(result.sae.W_dec, dim=1)
    cosines = (unit @ unit.T).abs()[~torch.eye(96, dtype=torch.bool)] / 2
    assert torch.allclose(phases.cosine_histogram(unit), torch.histc(cosines * 2, 100, 0, 1) / 2)
    assert not train(samples=256 * 30, coactivation_window=0)[0].report["phases"]


def test_the_cost_of_both_forms_is_measured_on_the_same_codes():
    """Each in a process of its own, with one value; memory is that of the state at least."""
    shape = {"n_latents": 512, "k": 8, "batch": 64, "power": 2, "window": 100, "threads": 1}
    found = {form: cost.measured(form=form, **shape) for form in ("packed", "packed, float32", "dense")}
    values = [one["value"] for one in found.values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)
    assert all(one["milliseconds"] > 0 for one in found.values())
    assert cost.of_run(check("train", {})).empty
