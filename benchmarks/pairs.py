"""What pairs of latents cost: tracking beside plain F x F matrices, and both studies' ingredients beside a topk step.

    python benchmarks/pairs.py

The forms of tracking run in a process each (peak memory is a process's own), one after the other; the steps run in one
process, by turns. Ratios are what counts; milliseconds are of the machine at hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from train_step import Activations, median

from sae_lib import params, runs
from sae_lib.training.coactivation.cost import measured
from sae_lib.training.trainer import Trainer

SHAPES = [{"n_latents": 4096, "k": 32, "batch": 2048}, {"n_latents": 18432, "k": 320, "batch": 512}]
TEMPORAL = {"name": "temporal_coactivation", "power": 2}
STEPS = [("576,4096,32,2048", TEMPORAL), ("2304,16384,64,1024", {"name": "progressive_orthogonality"})]


def tracking() -> pd.DataFrame:
    """Tracking, penalty and backward of each form and power, and the error of its value against the dense form's."""
    rows = []
    for shape in SHAPES:
        for power in (1, 2):
            found = {form: measured(form=form, power=power, threads=torch.get_num_threads(), steps=3, **shape)
                     for form in ("dense", "packed", "packed, float32")}
            dense = found["dense"]
            for form, one in found.items():
                rows.append({"F, k, batch": ", ".join(map(str, shape.values())), "power": power, "form": form,
                             "ms": one["milliseconds"], "MiB": one["mebibytes"],
                             "times faster": dense["milliseconds"] / one["milliseconds"],
                             "times less memory": dense["mebibytes"] / one["mebibytes"],
                             "relative error": abs(one["value"] / dense["value"] - 1)})
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def steps(times: int = 8, rounds: int = 3) -> pd.DataFrame:
    """A training step of topk with and without an ingredient, by turns."""
    rows = []
    for size, entry in STEPS:
        D, F, k, batch = map(int, size.split(","))
        x = torch.randn(batch, D, generator=torch.Generator().manual_seed(0))
        trainers = {name: Trainer(params.check("train", {"d_sae": F, "k": k, "batch_size": batch, "mode": "batch",
                                                         "samples": 1000 * batch, "ingredients": entries}),
                                  Activations(x)) for name, entries in (("plain", []), ("with", [entry]))}
        found = {name: [] for name in trainers}
        for _ in range(rounds):
            for name, trainer in trainers.items():
                found[name].append(median(lambda _, t=trainer: t.one_step(t.source.batch), times, "cpu"))
        plain, full = (sorted(found[name])[rounds // 2] for name in ("plain", "with"))
        rows.append({"D, F, k, batch": size.replace(",", ", "), "ingredient": entry["name"], "topk ms": plain,
                     "with ms": full, "adds": f"{full / plain - 1:.0%}"})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tracked, stepped = tracking(), steps()  # the dense form needs most of the memory
    runs.write_json(Path(__file__).parent / "results" / "pairs-cpu.json", {
        "tracking": tracked.to_dict("records"), "steps": stepped.to_dict("records"),
        "threads": torch.get_num_threads(), "provenance": runs.provenance()})
    for table in (tracked, stepped):
        print(table.to_markdown(index=False, floatfmt=".3g"), end="\n\n")
