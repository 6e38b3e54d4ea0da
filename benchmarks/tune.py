"""Trials of training parameters on the store of the embedded default: the evidence for the defaults.

    python benchmarks/tune.py architecture=topk,gated lr=4e-4,8e-4,1.6e-3 samples=500000
    python benchmarks/tune.py architecture=topk lr=3.2e-3 lr_decay=0.2,0.5,1.0 seed=42,43,44
    python benchmarks/tune.py                      # what is known, as Markdown: mean over seeds [least, greatest]

Every combination of the values given is one trial, over params/models/<model>.yaml and params/variants/
<architecture>.yaml; those already in benchmarks/results/tuning-cpu.json for this store are left out. Held-out explained
variance, letter recovery (recovery.py), and the share of latents that did not fire in the last 250,000 samples are
measured. ``encoder_scale`` multiplies the encoder before training; it is no parameter of the workbook.
The store is 01's of the same parameters; each trial takes one thread, and ``--at-once`` run together.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import recovery
import torch

from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.training import measure
from sae_lib.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "tuning-cpu.json"
FIXED = {"threads": 1, "mode": "batch", "device": "cpu", "coactivation_window": 0, "log_points": 10,
         "dead_after": 250_000, "run": "tuning"}
TOLD = {"explained_variance": ".4f", "letter_recovery": ".3f", "l0": ".1f", "unused_share": ".1%"}
"""What ``table`` tells of a trial, and how."""
HELD = {}
"""The store and the letters' words, read once, before the processes of the trials are made."""


def checked(trial: dict) -> params.Train:
    """Typed parameters of a trial."""
    folder = runs.project() / "params"
    files = [f"models/{trial.get('model', 'smollm2')}", f"variants/{trial.get('architecture', 'topk')}"]
    values = {}
    for name in files:
        values |= params.load_yaml(folder / f"{name}.yaml")
    own = {name: value for name, value in trial.items() if name not in ("model", "encoder_scale")}
    return params.check("train", values | own | FIXED)


def measured(trial: dict) -> dict:
    """Train once and measure."""
    began, p, store, words = time.perf_counter(), checked(trial), HELD["store"], HELD["words"]
    trainer = Trainer(p, store)
    with torch.no_grad():
        trainer.sae.W_enc *= trial.get("encoder_scale", 1.0)
    trainer.fit()
    sae = trainer.sae.folded(store.scale)
    norms = sorted(row["grad_norm"] for row in trainer.rows)
    found = measure.heldout(sae, store.heldout(), store.scale)
    return {"trial": trial, "lr": trainer.lr, "steps": trainer.step, "nonfinite": trainer.nonfinite,
            "explained_variance": found["explained_variance"], "l0": found["l0"],
            "dead_share": trainer.dead_share(trainer.step), "unused_share": found["unused_share"],
            "letter_recovery": recovery.letter_recovery(sae.encode, words) if words else None,
            "least_grad_norm": norms[0], "median_grad_norm": norms[len(norms) // 2],
            "seconds": time.perf_counter() - began}


def table(trials: list[dict]) -> str:
    """Markdown, a row for all trials that differ in their seed alone: mean [least, greatest] of what was measured."""
    settings = pd.DataFrame([one["trial"] for one in trials]).drop(columns="seed")
    by = [name for name in settings if settings[name].notna().any()]
    frame = pd.concat([settings, pd.DataFrame(trials)[[*TOLD]]], axis=1)
    rows = []
    for key, held in frame.groupby(by, dropna=False, sort=False):
        given = ["" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value) for value in key]
        found = [f"{held[name].mean():{how}} [{held[name].min():{how}}, {held[name].max():{how}}]"
                 for name, how in TOLD.items()]
        rows.append([*given, str(len(held)), *found])
    head = [*by, "seeds", *TOLD]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def combinations(given: list[str]) -> list[dict]:
    """The trials that ``key=value,value`` words ask for."""
    names, values = zip(*(word.split("=", 1) for word in given))
    read = [[_read(one) for one in value.split(",")] for value in values]
    return [{"seed": 42} | dict(zip(names, one)) for one in itertools.product(*read)]


def _read(word: str):
    """A number where it is one; PyYAML reads 4e-4 as text."""
    with contextlib.suppress(ValueError):
        return int(word) if word.isdigit() else float(word)
    return word


def main() -> None:
    """Run what is asked for and not yet known; the file is written after every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="key=value,...")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = runs.read_json(asked.results)["trials"] if asked.results.exists() else []
    if not asked.given:
        return print(table(known))
    trials = combinations(asked.given)
    p = checked(trials[0])
    HELD["store"] = store = activations.find(p)
    done = [one["trial"] for one in known if one["store"] == store.name]
    left = [trial for trial in trials if trial not in done]
    next(iter(store.batches(1, 1)))
    HELD["words"] = recovery.material(p, store) if p.model != "planted" else None
    with ProcessPoolExecutor(asked.at_once, mp_context=multiprocessing.get_context("fork")) as pool:
        for one in as_completed([pool.submit(measured, trial) for trial in left]):
            known.append(one.result() | {"store": store.name})
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in known[-1].items()},
                  flush=True)
            runs.write_json(asked.results, {"trials": known, "provenance": runs.provenance()})


if __name__ == "__main__":
    main()
