"""What dashboards cost: opening them, answering each control, and drawing curves while a training runs.

``python benchmarks/dashboards.py [RUN]``: on a made run of F 18432 with 19 M pairs of latents, then on RUN (one of the
quickstart's, say). The kernel's share alone; limits: 300 ms an answer, 3 s to open, 2 % of a training's time.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import save_file
from scipy import sparse

F, D, TOKENS, PAIRS, K = 18_432, 2304, 16_384, 19_000_000, 80
NAME = "made/wide"


def make(home: Path) -> None:
    """A run's folder of that size: random decoder, codes and pairs, of which only the shape matters here."""
    from sae_lib import params, runs
    from sae_lib.evaluation import latents
    from sae_lib.sae.architectures import get
    from sae_lib.sae.autoencoder import SparseAutoencoder

    draw, run = np.random.default_rng(0), runs.Run(NAME)
    p = params.check("train", {"run": NAME, "d_sae": F, "k": K, "model": "tiny", "layer": 1})
    runs.write_text(run.path / "params.yaml", yaml.safe_dump(runs.resolved(p)))
    SparseAutoencoder.initialise(F, torch.zeros(D), get("topk")(k=K), torch.Generator().manual_seed(0)).save(
        run.path / "sae")
    report = {"provenance": runs.provenance(seed=0), "phases": []}
    for step, name in enumerate(("early", "middle", "late"), 1):
        first, second = draw.integers(0, F, (2, PAIRS))
        low, high = np.minimum(first, second), np.maximum(first, second)
        counts = sparse.coo_matrix((draw.integers(1, 9, PAIRS).astype(np.int32), (low, high)), (F, F)).tocsr()
        counts.setdiag(draw.integers(1000, 3000, F).astype(np.int32))
        (run.path / "coactivation").mkdir(parents=True, exist_ok=True)
        sparse.save_npz(run.path / f"coactivation/{name}.npz", counts.astype(np.int32))
        runs.write_json(run.path / f"coactivation/{name}.json", {"tokens": TOKENS, "least": 1, "pairs_seen": PAIRS,
                                                                "firings": counts.diagonal().tolist()})
        report["phases"].append({"phase": name, "step": 1000 * step})
        if name != "late":
            save_file({"W_dec": torch.randn(F, D).bfloat16()}, run.path / f"coactivation/{name}.safetensors")
    runs.write_json(run.path / "training.json", report)
    runs.write_json(run.path / "validity.json", {"status": "valid", "reasons": [], "flags": []})
    columns = np.sort(draw.integers(0, F, (TOKENS, K)), 1).ravel()
    codes = sparse.csr_matrix((draw.random(columns.size).astype(np.float32), columns,
                               np.arange(0, columns.size + 1, K)), (TOKENS, F)).tocsc()
    codes.sum_duplicates()
    tokens = pd.DataFrame({"text": " word", "document": 0, "block": np.arange(TOKENS) // 127, "position": 1},
                          index=range(TOKENS))
    words = pd.Series([[f" token{n}" for n in range(10)]] * F)
    table = latents.summary(codes, tokens.text).assign(nearest=0, nearest_cosine=0.1, raised=words, lowered=words,
                                                       raised_by=[[0.1] * 10] * F, lowered_by=[[-0.1] * 10] * F)
    folder = run.path / "latents"
    folder.mkdir()
    sparse.save_npz(folder / "codes.npz", codes)
    tokens.to_parquet(folder / "tokens.parquet")
    table.to_parquet(folder / "latents.parquet")
    runs.write_json(folder / "about.json", {"tokens": TOKENS, "notes": []})


def timed(label: str, work):
    """Run ``work``, say how long it took."""
    began = time.perf_counter()
    found = work()
    print(f"  {label}: {time.perf_counter() - began:.2f} s", flush=True)
    return found


def every_answer(board) -> None:
    """Move each control through its values twice; the second time is what a reader waits for all day."""
    for turn in ("first", "again"):
        before = len(board.answered)
        for key, control in board.controls.items():
            if hasattr(control, "options") and not isinstance(control.value, tuple):
                values = [option[1] if isinstance(option, tuple) else option for option in control.options]
                values = [*values, values[-1] if key == "snapshot" else values[0]]
            elif isinstance(control.value, bool):
                values = [not control.value, control.value]
            elif isinstance(control.value, int):
                values = [5, control.max, 77]
            else:
                continue
            for value in values:
                control.value = value
        for thread in getattr(board, "matching", {}).values():
            timed("matching another run's latents meanwhile", thread.join)
        worst: dict[str, float] = {}
        for key, seconds in board.answered[before:]:
            worst[key] = max(worst.get(key, 0), seconds)
        print(f"  slowest answer by control, {turn}: " + ", ".join(f"{k} {1000 * s:.0f} ms" for k, s in worst.items()))


def run_of(name: str) -> None:
    """Open and move each dashboard of a run."""
    from sae_lib.views import dashboards

    for kind in ("latents", "coactivation", "splits", "curves"):
        print(kind)
        board = timed("open", lambda kind=kind: getattr(dashboards, kind)(name))
        timed("and draw", lambda board=board: board.widget)
        if kind == "coactivation":
            timed("reading the other snapshots meanwhile", board.reading.join)
        every_answer(board)


def main() -> None:
    """The made run, then a real one."""
    with tempfile.TemporaryDirectory() as home:
        kept = os.environ.get("SAE_WORKBOOK_HOME")
        os.environ["SAE_WORKBOOK_HOME"] = home
        from sae_lib.views import dashboards  # noqa: F401  imports are not what is timed

        print(f"made run: F {F}, D {D}, {PAIRS:,} pairs")
        make(Path(home))
        (Path(home) / "runs/made/other").symlink_to("wide")
        run_of(NAME)
        os.environ.pop("SAE_WORKBOOK_HOME")
        if kept:
            os.environ["SAE_WORKBOOK_HOME"] = kept
    for name in sys.argv[1:]:
        print(f"\n{name}")
        run_of(name)


if __name__ == "__main__":
    main()
