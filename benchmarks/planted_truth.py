"""What is found of known features, and how SAEBench's absorption stands to the true one.

    python benchmarks/planted_truth.py                  # 24 SAEs
    python benchmarks/planted_truth.py --saes 4         # a look: the first ones of each architecture
    python benchmarks/planted_truth.py --world seed=1,parents=8,children=6

Four architectures x three L0 x two widths are trained, by the workbook's own trainer, on one world of SAELens'
synthetic features. On held-out rows, half of which train the probes, recovery, true absorption and SAEBench's
absorption are measured. Written: benchmarks/results/planted_truth-cpu.json, and figures/planted_truth beside it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

ARCHITECTURES = ("topk", "batch_topk", "matryoshka_batch_topk", "standard")
L0S, WIDTHS = (2, 1, 4), (256, 128)
TRAINING = {"model": "planted", "layer": 0, "samples": 400_000, "batch_size": 512, "lr": 3e-3, "warmup_steps": 50,
            "aux_dead_after": 20_000, "dead_after": 100_000, "coactivation_window": 0, "checkpoint_every": 0,
            "mode": "batch"}


def grid() -> list[dict]:
    """Parameters of each SAE, the architectures by turns."""
    found = []
    for d_sae, l0, architecture in itertools.product(WIDTHS, L0S, ARCHITECTURES):
        sparsity = {"l1": 0.3, "target_l0": l0} if architecture == "standard" else {"k": l0}
        found.append({"architecture": architecture, "d_sae": d_sae, "run": f"planted/{architecture}-{d_sae}-{l0}",
                      **sparsity})
    return found


def trained(asked: dict, store, threads: int):
    """One SAE and its verdict; ``asked`` beside TRAINING."""
    from sae_lib import params, runs
    from sae_lib.evaluation import validity
    from sae_lib.training import trainer

    p = params.check("train", TRAINING | asked | {"threads": threads})
    run = runs.start(p)
    result = trainer.train(p, store, run)
    return result, validity.update(run)


def tested(x, truth, train: int):
    """The rows that probes were not trained on, and their truth."""
    return x[train:], truth._replace(features=truth.features[train:])


def study(world, count: int, threads: int, seed: int) -> pd.DataFrame:
    """One row per SAE: parameters, verdict, recovery, both absorptions."""
    from sae_lib.data import planted
    from sae_lib.evaluation import truth as truths
    from sae_lib.evaluation.saebench import planted as bench

    store, truth = planted.open_world(world)
    x, rows = store.heldout().x, []
    material = bench.prepare(x, truth)
    own_x, own_truth = tested(x, truth, material.train)
    for asked in grid()[:count]:
        began = time.perf_counter()
        result, verdict = trained(asked | {"seed": seed}, store, threads)
        training = time.perf_counter() - began
        figures, by_parent = truths.measure(result.sae, own_x, own_truth)
        scored, table = bench.absorption(result.sae, material)
        rows.append(asked | {"status": verdict.status, "reasons": "; ".join(verdict.reasons),
                             "explained_variance": result.report["explained_variance"]} | figures | {
            f"saebench_{name}": value for name, value in scored.items()} | {
            "by_parent": by_parent.merge(table, on="feature").to_dict("records"), "seconds_training": training,
            "seconds": time.perf_counter() - began})
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()
               if key not in ("by_parent", "reasons")}, flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Train, measure, print; write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=len(grid()))
    parser.add_argument("--world", default="", help="key=value,... of sae_lib.data.planted.World")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from sae_lib import runs
    from sae_lib.data import planted
    from sae_lib.evaluation import truth as truths
    from sae_lib.views import figures_truth, show

    world = planted.parse(f"planted:{asked.world}")
    with tempfile.TemporaryDirectory() as home:
        os.environ["SAE_WORKBOOK_HOME"] = home
        table = study(world, asked.saes, asked.threads, asked.seed)
    valid = table[table.status == "valid"]
    ranks = {f"{one} / {other}": truths.rank_correlation(valid[one], valid[other])._asdict()
             for one, other in figures_truth.COMPARED}
    for name, rank in ranks.items():
        print(f"{name}: rho {rank['rho']:.2f}, from {rank['low']:.2f} to {rank['high']:.2f}, {rank['n']} SAEs")
    name = f"planted:{asked.world}".rstrip(":")
    fig = figures_truth.truth(table, caption=f"World {name}, training seed {asked.seed}")
    show.write({"planted_truth": fig}, asked.out / "figures")
    runs.write_json(asked.out / "planted_truth-cpu.json", {
        "world": world.model_dump(), "training": TRAINING, "seed": asked.seed, "ranks": ranks,
        "saes": table.astype(object).where(table.notna(), None).to_dict("records"), "provenance": runs.provenance()})


if __name__ == "__main__":
    main()
