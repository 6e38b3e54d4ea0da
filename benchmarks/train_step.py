"""One TopK training step beside the peers', and beside the sum of its parts, in one process.

    python benchmarks/train_step.py            # the three sizes of the README's table
    python benchmarks/train_step.py --size 576,4096,32,2048

Every contender has the same activations and threads, two steps to warm up, and then its median. The peers run as their
users run them; the workbook's training makes the allocator keep freed memory, so the fastest peer is measured a second
time under that setting, which helps it too. Ratios are what counts; milliseconds are of the machine at hand.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peers
import torch

from sae_lib import params, runs
from sae_lib.data.language_model import import_transformers
from sae_lib.data.store import Batch
from sae_lib.memory import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from sae_lib.sae import kernels
from sae_lib.training.trainer import Trainer

CPU_SIZES = ["576,4096,32,2048", "2304,16384,64,1024", "2304,16384,320,1024"]
CUDA_SIZES = ["2304,16384,320,2048", "2304,18432,320,2048", "2304,65536,64,4096"]


AGAIN = "fastest peer, freed memory kept"


def give_freed_memory_back() -> None:
    """glibc's defaults again, after ``keep_freed_memory``."""
    if sys.platform.startswith("linux"):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_TRIM_THRESHOLD, 128 * 1024)


class Activations:
    """A source that gives the same batch again and again."""

    name = content_hash = "benchmark"
    scale, reads_ahead = 1.0, False

    def __init__(self, x: torch.Tensor):
        places = torch.arange(len(x), dtype=torch.int32)
        self.batch, self.d_in, self.n_train = Batch(x, places, places, places, places), x.shape[1], len(x)
        self.manifest = {"model": {"identity": "benchmark"}}

    def batches(self, batch_size, samples, **_):
        yield self.batch

    def heldout(self, limit=None):
        return Batch(*(column[:256] for column in self.batch))


def median(step, times: int, device: str) -> float:
    """Median milliseconds of ``step(number)`` after two to warm up."""
    found = []
    for number in range(times + 2):
        began = time.perf_counter()
        step(number)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began))
    return sorted(found[2:])[times // 2]


def ours(D, F, k, x, precision, device):
    """The workbook's whole step: data to device, forward, backward, projection, clipping, Adam, counters."""
    p = params.check("train", {"d_sae": F, "k": k, "batch_size": len(x), "precision": precision, "device": device,
                               "mode": "batch", "samples": 1000 * len(x)})
    trainer = Trainer(p, Activations(x))
    return lambda number: trainer.one_step(trainer.source.batch)


def parts(D, F, k, x, times, device) -> dict[str, dict[str, float]]:
    """Each part of a step alone, in milliseconds by its forms: torch's operations, and the workbook's own."""
    W = torch.nn.functional.normalize(torch.randn(F, D, device=device), dim=1)
    b, low = torch.zeros(F, device=device), torch.bfloat16
    x, xl, Wl, bl = x.to(device), x.to(device, low), W.to(low), b.to(device, low)
    pre = torch.addmm(bl, xl, Wl.T)
    values, indices = (part.contiguous() for part in pre.float().topk(k, dim=1))
    values, count = values.relu(), len(x)
    dense = torch.zeros(count, F, dtype=low, device=device).scatter_(1, indices, values.to(low))
    weights = [torch.nn.Parameter(W.clone()) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight) * 1e-3
    adam = torch.optim.Adam(weights, lr=1e-6, fused=True)

    def csr_transposed():
        flat = indices.flatten()
        order = torch.argsort(flat, stable=True)
        starts = torch.cat([flat.new_zeros(1), torch.bincount(flat, minlength=F).cumsum(0)])
        return torch.sparse_csr_tensor(starts, order // k, values.flatten()[order], (F, count)) @ x

    forms = {
        "encoder product": {"float32": lambda: torch.addmm(b, x, W.T), "bfloat16": lambda: torch.addmm(bl, xl, Wl.T)},
        "selection": {"torch": lambda: pre.topk(k, dim=1, sorted=False)},
        "decode": {"embedding_bag": lambda: torch.nn.functional.embedding_bag(
            indices, W, per_sample_weights=values, mode="sum"), "dense bfloat16": lambda: dense @ Wl},
        "one weight gradient": {"dense bfloat16": lambda: dense.T @ xl, "CSR": csr_transposed},
        "Adam, fused": {"torch": adam.step},
    }
    kernel = kernels.pick(device, True, low)
    if isinstance(kernel, kernels.Sparse):
        rows = kernels.sparse.rows_of(indices, None)
        forms["selection"]["ours"] = lambda: kernel.ops.topk(pre, k)
        forms["one weight gradient"]["ours"] = lambda: kernel.ops.transposed_product(
            rows, indices.flatten(), values.flatten(), x, F)
    found = {}
    for part, ways in forms.items():
        found[part] = {way: median(lambda _, call=call: call(), times, device) for way, call in ways.items()}
    found["both weight gradients"] = {way: 2 * ms for way, ms in found.pop("one weight gradient").items()}
    return found


def sum_of_parts(one: dict, own: bool) -> float:
    """Sum of each part's fastest form, in milliseconds; ``own`` counts the workbook's own forms too."""
    return sum(min(ms for way, ms in ways.items() if own or way != "ours") for ways in one["parts"].values())


def peak(device: str) -> float:
    """Measured rate of large bfloat16 products, FLOP/s."""
    a = torch.randn(4096, 4096, device=device).bfloat16()
    return 2 * 4096**3 / (median(lambda _: a @ a, 5, device) / 1e3)


def one_size(size: str, times: int, device: str) -> dict:
    """Everything of one size, in milliseconds by name."""
    D, F, k, count = map(int, size.split(","))
    torch.manual_seed(0)
    x = torch.randn(count, D) @ torch.randn(D, D) / D**0.5
    found, problems = {}, {}
    give_freed_memory_back()
    theirs = dict(peers.all_of(D, F, k, x.to(device)))
    own = {f"workbook, {word}": lambda word=word: ours(D, F, k, x, word, device) for word in ("float32", "bfloat16")}
    for name, make in [*theirs.items(), (AGAIN, None), *own.items()]:
        try:
            if name == AGAIN:
                keep_freed_memory()
                make = theirs[min(found, key=found.get)]
            found[name] = median(make(), times, device)
            print(f"  {name}: {found[name]:.1f} ms", flush=True)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"[:200]
            print(f"  {name}: {problems[name]}", flush=True)
        gc.collect()
    return {"D": D, "F": F, "k": k, "batch": count, "milliseconds": found, "failed": problems,
            "parts": parts(D, F, k, x, times, device)}


def summary(one: dict, rate: float) -> dict:
    """The ratios that the README shows."""
    own = {name: ms for name, ms in one["milliseconds"].items() if name.startswith("workbook")}
    others = {name: ms for name, ms in one["milliseconds"].items() if not name.startswith("workbook")}
    again = others.pop(AGAIN)
    best, peer = min(own, key=own.get), min(others, key=others.get)
    full = {name: others.get(f"{name}, float32") for name in ("dictionary_learning", "SAELens")}
    D, F, k, count = (one[key] for key in ("D", "F", "k", "batch"))
    work = 2 * count * D * (F + 4 * k)  # the encoder's product, decode, and three products of the sparse backward
    return {"size": f"{D}, {F}, {k}, {count}", "workbook": best, "ms": own[best], "fastest peer": peer,
            "times faster than it": others[peer] / own[best], "than it with freed memory kept": again / own[best],
            **{f"times faster than {name} in float32": ms / own[best] for name, ms in full.items() if ms},
            "of the sum of torch's parts": own[best] / sum_of_parts(one, own=False),
            "of the sum of the fastest parts": own[best] / sum_of_parts(one, own=True),
            "utilisation": work / (own[best] / 1e3) / rate}


def main() -> None:
    """Measure, print, and write benchmarks/results/train_step-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", action="append", help="D,F,k,batch; may be given several times")
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    import_transformers()
    peers.install()
    rate, results = peak(asked.device), []
    for size in asked.size or (CUDA_SIZES if asked.device == "cuda" else CPU_SIZES):
        print(size, flush=True)
        one = one_size(size, asked.times, asked.device)
        results.append(one | {"summary": summary(one, rate)})
        for part, ways in one["parts"].items():
            print(f"  part: {part}: " + ", ".join(f"{way} {ms:.1f} ms" for way, ms in ways.items()))
        print(json.dumps(results[-1]["summary"], indent=1), flush=True)
    written = Path(__file__).parent / "results" / f"train_step-{asked.device}.json"
    runs.write_json(written, {"bfloat16_rate": rate, "threads": torch.get_num_threads(), "sizes": results,
                              "provenance": runs.provenance()})


if __name__ == "__main__":
    main()
