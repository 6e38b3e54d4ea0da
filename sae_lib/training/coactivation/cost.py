"""What tracking pairs costs, beside plain F x F matrices: one step of each on random codes, each in its own process.

    python -m sae_lib.training.coactivation.cost '{"form": "packed", "n_latents": 4096, "k": 32, "batch": 2048}'
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_lib.sae.codes import FixedK
from sae_lib.sae.kernels.cpu import same_threads
from sae_lib.training.coactivation.dense import DensePairs, pair_term
from sae_lib.training.coactivation.packed import PackedPairs
from sae_lib.training.coactivation.rule import Rule
from sae_lib.training.ingredients import configured

DENSE_MATRICES = 12
"""F x F float32 matrices that a plain step holds at most, with room (measured: 10)."""


def of_run(p) -> pd.DataFrame:
    """Milliseconds and mebibytes of a step's tracking, penalty and backward, for a run that tracks windows; else empty.

    The dense form is left out, and said, where it might not fit half of this machine's memory.
    """
    config = next((config for kind, config in configured(p) if kind.name == "temporal_coactivation"), None)
    if config is None or config.weights == "consecutive":
        return pd.DataFrame()
    asked = {"n_latents": p.d_sae, "k": min(p.k, p.d_sae), "batch": p.batch_size, "power": config.power,
             "window": config.window_size, "threads": torch.get_num_threads()}
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    fits = DENSE_MATRICES * 4 * p.d_sae**2 < room
    rows = [{"form": form, **measured(form=form, **asked)} for form in ("packed", "packed, float32", *["dense"] * fits)]
    if not fits:
        rows.append({"form": f"dense: not tried, {DENSE_MATRICES} matrices of {4 * p.d_sae**2 / 2**20:,.0f} MiB"})
    return pd.DataFrame(rows)


def measured(**asked: Any) -> dict[str, float]:
    """Run this module on ``asked`` in a fresh process: milliseconds of a step (median), MiB that it added at most."""
    here = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "sae_lib.training.coactivation.cost",
                           json.dumps(asked)], cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {asked} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def main(form: str, n_latents: int, k: int, batch: int, power: int = 2, window: int = 1000, threads: int = 0,
         steps: int = 4) -> dict[str, Any]:
    """Steps of one form: the median time of all but the first, and the peak of memory that they add."""
    torch.set_num_threads(threads or torch.get_num_threads())
    same_threads()
    codes = [_codes(n_latents, k, batch, seed) for seed in range(steps)]
    if form != "dense":  # compile, and leave that out of both figures
        small = FixedK(torch.arange(4).expand(8, 4), torch.rand(8, 4).requires_grad_(), 8)
        PackedPairs(8, Rule(5), "float32" in form).term(small.csr(), power, False).backward()
    times, values = [], []
    before = _reset_peak()
    pairs = DensePairs(n_latents, Rule(window)) if form == "dense" else \
        PackedPairs(n_latents, Rule(window), "float32" in form)
    for part in codes:
        began = time.perf_counter()
        if form == "dense":
            latents = part.dense()
            term = pair_term(pairs.weights(latents), latents, power, False)
        else:
            term = pairs.term(part.csr(), power, False)
        term.backward()
        times.append(time.perf_counter() - began)
        values.append(float(term))
    return {"milliseconds": 1000 * sorted(times[1:])[len(times[1:]) // 2], "mebibytes": (_peak() - before) / 2**20,
            "value": values[-1]}


def _codes(n_latents: int, k: int, batch: int, seed: int) -> FixedK:
    """Random codes whose latents fire by a power law; a few tokens at a time, so that this sets no peak of memory."""
    generator, likely = torch.Generator().manual_seed(seed), 1 / torch.arange(1, n_latents + 1) ** 0.7
    parts = [torch.multinomial(likely.expand(min(64, batch - at), -1), k, generator=generator)
             for at in range(0, batch, 64)]
    return FixedK(torch.cat(parts), (torch.rand(batch, k, generator=generator) + 0.1).requires_grad_(), n_latents)


def _reset_peak() -> int:
    """Forget earlier peaks where the system can (Linux); bytes held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Bytes of memory that this process has held at most (since the last reset)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
