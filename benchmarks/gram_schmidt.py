"""What per-token Gram-Schmidt adds to a topk step, beside the sum of its parts by torch's own operations.

    python benchmarks/gram_schmidt.py

    python benchmarks/gram_schmidt.py --threads 1 --clock cpu     # where others use the machine

One process; the plain step, the step with the ingredient and the parts go by turns. Medians over all rounds count; the
least of each is given beside them, which others on the machine disturb least.
The parts are what its forward and backward passes consist of, each as one batched operation of torch in float32. Ratios
are what counts; milliseconds are of the machine at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from train_step import Activations

from sae_lib import params, runs
from sae_lib.sae.codes import FixedK
from sae_lib.sae.kernels import cpu, gram_schmidt
from sae_lib.training.trainer import Trainer

PLAIN, FULL = "step, topk", "step, with gram_schmidt"


def steps(D: int, F: int, k: int, batch: int, latents: int) -> dict:
    """Whole training steps without and with the ingredient, as calls.

    Without AuxK: on one batch again and again latents die, and reviving them would take most of the step.
    """
    x = torch.randn(batch, D, generator=torch.Generator().manual_seed(0))
    made = {}
    for name, entries in ((PLAIN, []), (FULL, [{"name": "gram_schmidt", "latents": latents}])):
        p = params.check("train", {"d_sae": F, "k": k, "batch_size": batch, "mode": "batch", "aux_k": 0,
                                   "samples": 1000 * batch, "ingredients": entries})
        trainer = Trainer(p, Activations(x))
        made[name] = lambda trainer=trainer: trainer.one_step(trainer.source.batch)
    return made


def parts(D: int, F: int, k: int, batch: int, latents: int) -> dict:
    """The parts by torch, and the whole of the compiled form alone, as calls."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    values, indices = torch.rand(batch, F, generator=g).topk(k, dim=1)
    m = min(k, latents)
    f, flat = values[:, :m, None].contiguous(), indices[:, :m].flatten()
    own = rows[flat].view(batch, m, D)
    gram = own @ own.mT + 1e-3 * torch.eye(m)
    lower = torch.linalg.cholesky(gram)
    slope, total = torch.randn_like(gram), torch.zeros_like(rows)
    product = (slope @ own).view(-1, D)

    def backward_solves():
        v = torch.linalg.solve_triangular(lower, f, upper=False)
        half = torch.linalg.solve_triangular(lower.mT, slope, upper=True)
        return v, torch.linalg.solve_triangular(lower, half, upper=False, left=False)

    held, learnt = values.clone().requires_grad_(), rows.clone().requires_grad_()

    def whole():
        codes = gram_schmidt.orthonormal_codes(FixedK(indices, held, F), learnt, latents, 1e-3)
        torch.autograd.grad(codes.values.sum(), (held, learnt))

    return {"part: order": lambda: values.sort(dim=1, descending=True),
            "part: gather of rows": lambda: torch.index_select(rows, 0, flat),
            "part: Gram": lambda: torch.bmm(own, own.mT),
            "part: Cholesky": lambda: torch.linalg.cholesky(gram),
            "part: codes' solve": lambda: torch.linalg.solve_triangular(lower.mT, f, upper=True),
            "part: backward solves": backward_solves,
            "part: backward product": lambda: torch.bmm(slope, own),
            "part: index_add": lambda: total.index_add_(0, flat, product),
            "gram_schmidt alone": whole}


def measure(calls: dict, rounds: int, times: int, clock) -> dict[str, list[float]]:
    """Milliseconds of each call, by turns; a first turn warms up."""
    found = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            for _ in range(times):
                began = clock()
                call()
                if turn:
                    found[name].append(1e3 * (clock() - began))
    return found


def summary(ms: dict[str, float]) -> dict[str, float]:
    """The ratios that count."""
    added = ms[FULL] - ms[PLAIN]
    torchs = sum(taken for name, taken in ms.items() if name.startswith("part"))
    return {"step with it / topk step": ms[FULL] / ms[PLAIN], "what it adds / topk step": added / ms[PLAIN],
            "what it adds / sum of torch's parts": added / torchs}


def main() -> None:
    """Measure, print, and write benchmarks/results/gram_schmidt-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="576,4096,32,2048", help="D,F,k,batch")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of the process")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cpu.same_threads()  # before numba's pool starts: its threads wait busily
    clock = time.process_time if asked.clock == "cpu" else time.perf_counter
    size = (*map(int, asked.size.split(",")), asked.latents)
    found = measure(steps(*size) | parts(*size), asked.rounds, asked.times, clock)
    kinds = {kind.__name__: {name: kind(taken) for name, taken in found.items()} for kind in (median, min)}
    for name in found:
        print(f"  {name}: " + ", ".join(f"{kind} {ms[name]:.1f} ms" for kind, ms in kinds.items()))
    ratios = {kind: summary(ms) for kind, ms in kinds.items()}
    print(json.dumps(ratios, indent=1))
    written = Path(__file__).parent / "results" / "gram_schmidt-cpu.json"
    runs.write_json(written, {"size": asked.size, "latents": asked.latents, "threads": asked.threads,
                              "clock": asked.clock, "milliseconds": kinds, "summary": ratios,
                              "provenance": runs.provenance()})


if __name__ == "__main__":
    main()
