"""The training core's primitives and selections, beside plain forms: values, gradients, ties, both precisions."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from test_gradients import F, relative, weights

from sae_lib.data.ahead import ahead
from sae_lib.sae import architectures, kernels
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.codes import FixedK
from sae_lib.sae.kernels import cpu
from sae_lib.sae.kernels.jumprelu import jumprelu
from sae_lib.training.adam import Adam, remove_parallel

FLOATS = [torch.float32, torch.bfloat16]
BANDWIDTH = 0.5


def numbers(*shape, dtype=torch.float32, seed=0, rounded=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x.mul(4).round().div(4) if rounded else x).to(dtype)


# -- primitives ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape, k", [((1, 1), 1), ((7, 5), 5), ((33, 100), 7), ((20, 1000), 320), ((9, 513), 64),
                                      ((64, 4096), 32)])
@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("shift", [0.0, -2.5, 3.0], ids=["", "few positive", "all positive"])
def test_topk_takes_the_largest(dtype, shape, k, rounded, shift):
    x = numbers(*shape, dtype=dtype, rounded=rounded) + shift
    values, indices = cpu.topk(x, k)
    expected = x.float().topk(k, dim=1).values.relu()
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert all(len(set(row)) == k for row in indices.tolist())
    active = values > 0
    assert torch.equal(values[active], x.float().gather(1, indices)[active])
    assert (x.float().gather(1, indices)[~active] <= 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_above_takes_what_is_over_each_latents_threshold(dtype):
    x, threshold = numbers(50, 300, dtype=dtype, rounded=True), numbers(300, seed=1, rounded=True)
    offsets, indices, values = cpu.above(x, threshold)
    taken = x.float() > threshold
    assert torch.equal(offsets.diff(), taken.sum(1))
    assert torch.equal(indices, taken.nonzero()[:, 1]) and torch.equal(values, x.float()[taken])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 70, 3000, 9000, 10**6])
@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
def test_the_largest_of_a_batch(dtype, count, rounded):
    x = numbers(100, 180, dtype=dtype, rounded=rounded)
    offsets, indices, values = kernels.sparse.largest_of_batch(cpu, x, count)
    flat = x.float().flatten()
    expected = flat[flat > 0].sort(descending=True).values[:count]
    assert torch.equal(values.sort(descending=True).values, expected)
    rows = kernels.sparse.rows_of(indices, offsets)
    assert torch.equal(x.float()[rows, indices], values) and offsets[-1] == len(values)


def test_products_of_sparse_entries():
    rows, columns = torch.randint(0, 50, (400,)).sort().values, torch.randint(0, 30, (400,))
    values, left, right = numbers(400), numbers(50, 70, seed=1), numbers(30, 70, seed=2)
    dots = cpu.gathered_dots(rows, columns, left, right)
    assert relative(dots, (left[rows].double() * right[columns].double()).sum(1)) < 1e-6
    matrix = torch.zeros(50, 30, dtype=torch.float64).index_put((rows, columns), values.double(), accumulate=True)
    product, sums = cpu.transposed_product(rows, columns, values, left, 30)
    assert relative(product, matrix.T @ left.double()) < 1e-6 and relative(sums, matrix.sum(0)) < 1e-5


def test_threads_do_not_change_a_bit():
    x, rows = numbers(64, 512), numbers(512, 40, seed=1)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        cpu.same_threads()
        values, indices = cpu.topk(x, 20)
        places, columns = kernels.sparse.rows_of(indices, None), indices.flatten()
        found.append([values, indices, cpu.gathered_dots(places, columns, x[:, :40].contiguous(), rows),
                      *cpu.transposed_product(places, columns, values.flatten(), x[:, :40].contiguous(), 512)])
    torch.set_num_threads(threads)
    cpu.same_threads()
    assert all(torch.equal(a, b) for a, b in zip(*found))


TRITON = """
import torch
from sae_lib.sae.kernels import cpu, cuda
g = torch.Generator().manual_seed(0)
rows, columns = torch.randint(0, 20, (90,), generator=g).sort().values, torch.randint(0, 12, (90,), generator=g)
values, left, right = (torch.randn(*shape, generator=g) for shape in ((90,), (20, 300), (12, 300)))
entries = rows, columns, left, right
torch.testing.assert_close(cuda.gathered_dots(*entries), cpu.gathered_dots(*entries))
for a, b in zip(cuda.transposed_product(rows, columns, values, left, 14),
                cpu.transposed_product(rows, columns, values, left, 14)):
    torch.testing.assert_close(a, b)
x = torch.randn(30, 200, generator=g)
assert torch.equal(cuda.topk(x, 9)[0].sort().values, cpu.topk(x, 9)[0].sort().values)
assert all(torch.equal(a, b) for a, b in zip(cuda.above(x, right[0, :200]), cpu.above(x, right[0, :200])))
print("same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here: the GPU kernels were not run")
def test_the_gpus_kernels_interpreted_on_a_cpu():
    done = subprocess.run([sys.executable, "-c", TRITON], env=os.environ | {"TRITON_INTERPRET": "1"}, text=True,
                          capture_output=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: training on one was not tried")
def test_a_step_on_a_gpu_gives_the_cpus_gradients():
    found = []
    for device in ("cpu", "cuda"):
        *small, x = (part.to(device) for part in weights(torch.float32))
        sae = SparseAutoencoder(*small, architectures.get("topk")(k=5, aux_k=0, aux_weight=0.0))
        kernel = kernels.pick(device, True)
        codes = kernel.topk(x, sae, 5)
        architectures.squared_error(x, kernel.decode(codes, sae.W_dec) + sae.b_dec).backward()
        found.append([p.grad.cpu() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)])
    assert all(relative(a, b.double()) < 1e-4 for a, b in zip(*found))


# -- selections, against float64 autograd of the mathematics ----------------------------------------------------------

def topk_codes(a, k):
    return a.relu() * torch.zeros_like(a).scatter(1, a.topk(k, dim=1).indices, 1.0)


def batch_codes(a, k):
    best = a.flatten().topk(k * len(a)).indices
    return a.relu() * torch.zeros_like(a).flatten().index_fill(0, best, 1.0).view_as(a)


class Jump(torch.autograd.Function):
    """Dense JumpReLU with the paper's pseudo-derivatives."""

    @staticmethod
    def forward(ctx, a, theta, active=None):
        active = a > theta if active is None else active
        ctx.save_for_backward(a, theta, active)
        return a * active, active.to(a.dtype)

    @staticmethod
    def backward(ctx, g, h):
        a, theta, active = ctx.saved_tensors
        near = ((a - theta).abs() < BANDWIDTH / 2) / BANDWIDTH
        return g * active, (-(g * theta + h) * near).sum(0), None


def thresholds():
    return 0.4 + 0.3 * numbers(F, seed=5, dtype=torch.float64).abs()


SELECTIONS = {
    "topk 1": (lambda x, s, kernel, t: (kernel.topk(x, s, 1), 0.0), lambda a, t: (topk_codes(a, 1), 0.0)),
    "topk 9": (lambda x, s, kernel, t: (kernel.topk(x, s, 9), 0.0), lambda a, t: (topk_codes(a, 9), 0.0)),
    "topk F": (lambda x, s, kernel, t: (kernel.topk(x, s, F), 0.0), lambda a, t: (a.relu(), 0.0)),
    "batch_topk": (lambda x, s, kernel, t: (kernel.batch_topk(x, s, 6), 0.0), lambda a, t: (batch_codes(a, 6), 0.0)),
    "relu": (lambda x, s, kernel, t: (kernel.above(x, s, torch.zeros(F)), 0.0), lambda a, t: (a.relu(), 0.0)),
    "relu, dense": (lambda x, s, kernel, t: (kernel.relu(x, s), 0.0), lambda a, t: (a.relu(), 0.0)),
    "jumprelu": (lambda x, s, kernel, t: (lambda f, h: (f, h.sum() / len(x)))(*jumprelu(x, s, kernel, t, BANDWIDTH)),
                 lambda a, t: (lambda f, h: (f, h.sum(1).mean()))(*Jump.apply(a, t))),
}


def rounded_to(parts, precision):
    """What the encoder's product sees: centred activations and weights in the kernel's precision, values exact."""
    enc, b_enc, _, b_dec, x = parts

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.float().to(precision).double()

        @staticmethod
        def backward(ctx, grad):
            return grad
    return Round.apply(x - b_dec) @ Round.apply(enc).T + Round.apply(b_enc)


def truth_of(name, precision, shift):
    parts = [t.requires_grad_() for t in weights()]
    parts[1].data += shift
    theta = thresholds().requires_grad_()
    a = rounded_to(parts, precision)
    f, extra = SELECTIONS[name][1](a, theta)
    loss = ((parts[4] - f @ parts[2] - parts[3]) ** 2).sum(1).mean() + 0.3 * extra
    used = [*parts[:4], *([theta] if name == "jumprelu" else [])]
    return f, loss, torch.autograd.grad(loss, used)


def ours_of(name, kernel, shift):
    *small, x = weights(torch.float32)
    small[1] = small[1] + shift
    sae = SparseAutoencoder(*small, architectures.get("topk")(k=3, aux_k=0, aux_weight=0.0))
    theta = thresholds().float().requires_grad_()
    codes, extra = SELECTIONS[name][0](x, sae, kernel, theta)
    loss = architectures.squared_error(x, kernel.decode(codes, sae.W_dec) + sae.b_dec) + 0.3 * extra
    used = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *([theta] if name == "jumprelu" else [])]
    return codes.dense(), loss, torch.autograd.grad(loss, used)


@pytest.mark.parametrize("shift", [0.0, -1.5], ids=["", "few positive"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "reference"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_gradients_of_every_selection(name, sparse, shift):
    f, loss, truth = truth_of(name, torch.float32, shift)
    codes, own, found = ours_of(name, kernels.pick("cpu", sparse), shift)
    assert relative(codes.detach(), f) < 1e-6 and relative(own.detach(), loss) < 1e-6
    for g, expected in zip(found, truth):
        assert relative(g, expected) < 1e-5


@pytest.mark.parametrize("name", SELECTIONS)
def test_bfloat16_against_the_same_codes_in_float64(name):
    """The same latents (ours), with values from the rounded product, through float64: gradients to 1e-2."""
    codes, own, found = ours_of(name, kernels.pick("cpu", True, torch.bfloat16), 0.0)
    parts = [t.requires_grad_() for t in weights()]
    theta = thresholds().requires_grad_()
    a = (parts[4] - parts[3]) @ parts[0].T + parts[1]
    f, h = Jump.apply(a, theta, codes.detach() > 0)
    extra = h.sum(1).mean() if name == "jumprelu" else 0.0
    loss = ((parts[4] - f @ parts[2] - parts[3]) ** 2).sum(1).mean() + 0.3 * extra
    truth = torch.autograd.grad(loss, [*parts[:4], *([theta] if name == "jumprelu" else [])])
    assert relative(codes.detach(), f) < 1e-2 and relative(own.detach(), loss) < 1e-2
    for number, (g, expected) in enumerate(zip(found, truth)):
        # A threshold's gradient is a sum over the few entries at the band's edges, which rounding moves in or out.
        assert relative(g, expected) < (1e-2 if number < 4 else 0.2)


def test_ties_share_no_gradient():
    """Equal pre-activations: exactly k latents are taken, and each gets the gradient of its own value."""
    *small, x = weights(torch.float32)
    small[0], small[2] = small[0][:1].repeat(F, 1), small[2][:1].repeat(F, 1)
    small[1] = torch.full((F,), 5.0)
    for kernel in (kernels.pick("cpu", True), kernels.pick("cpu", True, torch.bfloat16)):
        sae = SparseAutoencoder(*[t.clone() for t in small], architectures.get("topk")(k=3, aux_k=0, aux_weight=0.0))
        codes = kernel.topk(x, sae, 3)
        assert (codes.values > 0).all() and all(len(set(row)) == 3 for row in codes.indices.tolist())
        architectures.squared_error(x, kernel.decode(codes, sae.W_dec) + sae.b_dec).backward()
        assert (sae.W_enc.grad.abs().sum(1) > 0).sum() == len(codes.indices.unique())


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_a_part_of_the_latents(k):
    """What AuxK does: the k largest among some latents, with gradients into their rows alone; sparse, dense, all."""
    among = torch.arange(3, F, 7)
    W_enc, b_enc, W_dec, b_dec, x = (part.requires_grad_() for part in weights())
    pre_acts = (x - b_dec) @ W_enc[among].T + b_enc[among]
    top = pre_acts.topk(min(k, len(among)), dim=1)
    codes = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    loss = (x.detach() - codes @ W_dec[among]).square().sum(1).mean()
    expected = torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b_dec))
    for kernel in (kernels.pick("cpu", True), kernels.reference):
        *small, x = weights(torch.float32)
        sae = SparseAutoencoder(*small, architectures.get("topk")(k=3, aux_k=0, aux_weight=0.0))
        codes = kernel.topk_among(x, sae, k, among)
        assert isinstance(codes, FixedK) == (k == 1 and kernel is not kernels.reference)
        assert int(codes.active().max()) <= k
        architectures.squared_error(x, kernel.decode(codes, sae.W_dec[among])).backward()
        for part, truth in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), expected):
            assert relative(part.grad, truth) < 1e-5
        rest = torch.ones(F, dtype=torch.bool).index_fill(0, among, False)
        assert sae.W_enc.grad[rest].abs().sum() == 0


def test_precision_is_a_rule_and_can_be_set():
    assert kernels.precision_of("float32", "cpu") == torch.float32
    assert kernels.precision_of("bfloat16", "cpu") == torch.bfloat16
    assert kernels.precision_of("auto", "cpu") in FLOATS
    assert kernels.pick("cpu", True, torch.bfloat16).name == "cpu_sparse_bfloat16"


# -- Adam --------------------------------------------------------------------------------------------------------------

def test_adam_is_torchs_with_clipping_projection_and_unit_rows():
    rows, others = torch.nn.functional.normalize(numbers(40, 24), dim=1), numbers(40, seed=1)
    ours = [torch.nn.Parameter(rows.clone()), torch.nn.Parameter(others.clone())]
    theirs = [torch.nn.Parameter(rows.double()), torch.nn.Parameter(others.double())]
    adam, reference = Adam(ours, unit=ours[:1]), torch.optim.Adam(theirs, lr=1.0)
    for step in range(30):
        for own, other in zip(ours, theirs):
            own.grad = numbers(*own.shape, seed=100 + step) * (1 if step % 3 else 20)
            other.grad = own.grad.double()
        remove_parallel(theirs[0])
        norm = torch.nn.utils.clip_grad_norm_(theirs, 5.0)
        reference.param_groups[0]["lr"] = rate = 1e-2 / (1 + step)
        reference.step()
        theirs[0].data = torch.nn.functional.normalize(theirs[0].data, dim=1)
        assert adam.step(rate, 5.0) == pytest.approx(float(norm), rel=1e-5)
    assert all(relative(own.detach(), other.detach()) < 1e-5 for own, other in zip(ours, theirs))
    assert ours[0].norm(dim=1).sub(1).abs().max() < 1e-6


def test_adams_state_is_all_of_it():
    p, q = (torch.nn.Parameter(numbers(6, 5)) for _ in range(2))
    one, two = Adam([p], unit=[]), Adam([q], unit=[])
    for step in range(4):
        p.grad = q.grad = numbers(6, 5, seed=step)
        one.step(0.1, 1.0)
        if step == 1:
            q.data.copy_(p)
            two.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
        if step > 1:
            two.step(0.1, 1.0)
    assert torch.equal(p, q)


# -- reading ahead -----------------------------------------------------------------------------------------------------

def test_batches_ahead_are_the_same_and_errors_come_where_they_belong():
    assert list(ahead(range(50))) == list(range(50))

    def failing():
        yield from range(5)
        raise OSError("damaged")
    found = []
    with pytest.raises(OSError, match="damaged"):
        for item in ahead(failing()):
            found.append(item)
    assert found == list(range(5))
    endless = ahead(iter(int, 1))
    assert next(endless) == 0
    endless.close()  # its thread ends


def test_adam_by_torchs_operations_is_the_same():
    """The form for other devices, here on the CPU."""
    from sae_lib.training import adam

    rows = torch.nn.functional.normalize(numbers(20, 12), dim=1)
    p, q = torch.nn.Parameter(rows.clone()), torch.nn.Parameter(rows.clone())
    one, two = Adam([p], unit=[p]), Adam([q], unit=[q])
    for step in range(5):
        p.grad = numbers(20, 12, seed=50 + step)
        q.grad = p.grad.clone()
        norm = one.step(0.01, 1.0)
        remove_parallel(q)
        assert norm == pytest.approx(float(q.grad.norm()), rel=1e-5)
        scale, steps = min(1.0, 1.0 / (norm + 1e-6)), step + 1
        with torch.no_grad():
            adam._update_by_torch(q, two.first[0], two.second[0], 0.01 / (1 - adam.BETA1**steps),
                                  1 / (1 - adam.BETA2**steps), scale, True)
    assert relative(q.detach(), p.detach().double()) < 1e-5
