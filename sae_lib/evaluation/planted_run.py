"""03's evaluation of a run that was trained on a planted world: recovery, true absorption, and SAEBench's beside it."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from sae_lib import params, runs
from sae_lib.data import activations, planted
from sae_lib.data.language_model import PLANTED
from sae_lib.evaluation import truth as truths
from sae_lib.params import ParameterError, digest

FIGURES = ("mcc", "recovered", "true_absorption", "true_absorption_of_parent")
SAEBENCH = ("full_absorption", "full_absorption_with_child", "absorption_fraction")


def evaluate(sae, asked: params.Train) -> dict[str, Any]:
    """The report of ``evals: [truth]`` on ``sae``: metrics, a row per parent, config, provenance.

    SAEBench's figures are named ``saebench_...``; its probes are trained on half of the held-out rows, and all figures
    are of the other half. Raises ParameterError for a run whose features nobody knows.
    """
    from sae_lib.evaluation.saebench import planted as bench

    if asked.model != PLANTED:
        raise ParameterError(f"evals: truth is of SAEs trained on a planted world; this one was trained on "
                             f"'{asked.model}', whose features nobody knows")
    start, store = time.perf_counter(), activations.find(asked)
    truth, x, material = _material(store.path, store.content_hash)
    own = truth._replace(features=truth.features[material.train:])
    found, by_parent = truths.measure(sae, x[material.train:], own)
    scored, table = bench.absorption(sae, material)
    metrics = {name: found[name] for name in FIGURES} | {f"saebench_{name}": scored[name] for name in SAEBENCH}
    provenance = runs.provenance()
    config = {"model": PLANTED, "model_identity": store.manifest["model"]["identity"], "hook": asked.hook,
              "d_sae": sae.d_sae, "world": runs.read_json(store.path / "world.json")["world"],
              "rows": len(own.features), "recovered_cosine": truths.RECOVERED, "carried": truths.CARRIED}
    config["comparable"] = digest([provenance["packages"]["sae-bench"],
                                   {key: value for key, value in config.items() if key != "d_sae"}])
    return {"eval": "truth", "metrics": {name: value for name, value in metrics.items() if value is not None},
            "l0": found["l0"], "true_l0": found["true_l0"], "note": scored["note"], "config": config,
            "by_parent": by_parent.merge(table, on="feature").to_dict("records"), "provenance": provenance,
            "seconds": round(time.perf_counter() - start, 2)}


@functools.lru_cache(maxsize=1)
def _material(folder: Path, _content: str):
    """The truth of a store, its held-out rows, and SAEBench's probes of them: the same for a run and its nulls."""
    from sae_lib.evaluation.saebench import planted as bench

    truth, x = planted.truth_of(folder), activations.open_named(str(folder)).heldout().x
    return truth, x, bench.prepare(x, truth)
