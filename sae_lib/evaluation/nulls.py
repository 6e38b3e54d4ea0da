"""What SAEs that learnt nothing score in the evaluations of a run: measured once, kept for every SAE of that shape.

A figure says something of an SAE only beside these: a dead one, for one, scores an absorption of 0. Each null goes
through the very function that the run's own SAE did. Where a null does not apply it has a sentence, never a number.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.evaluation import embedded_nulls, null_saes
from sae_lib.evaluation.sharing import alone
from sae_lib.params import digest
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training import measure

HELDOUT = "heldout"
"""The measures of training.json, on the store's held-out rows."""
EVALUATIONS = (HELDOUT, "core", "sparse_probing", "sae_probes", "scr", "tpp", "absorption", "truth")
SILENT = "absorption asks which latents stay silent on a word, and a {} never does"
POSITIVE = "TPP ranks latents by positive activations alone, and would see half of a {}, which is signed"
NOT_APPLICABLE = {
    ("pca", "absorption"): SILENT.format("principal component"), ("pca", "tpp"): POSITIVE.format("principal component"),
    ("pca", "truth"): SILENT.format("principal component"),
    ("residual", "truth"): SILENT.format("channel of the residual stream"),
    ("residual", "absorption"): SILENT.format("channel of the residual stream"),
    ("residual", "tpp"): POSITIVE.format("channel of the residual stream")}
"""Why a null has no figure in an evaluation."""

Measure = Callable[[str, SparseAutoencoder], dict[str, Any]]
"""Gives the report of an evaluation, by its name, of an SAE."""
Found = dict[str, dict[str, dict[str, Any]]]
"""By null and evaluation: metrics, config, note, seconds; or status and reason."""


def of_evaluations(p: params.Evaluate, run: runs.Run, asked: params.Train, sae: SparseAutoencoder,
                   reports: dict[str, dict[str, Any]], evaluate: Measure) -> Found:
    """The nulls that ``p`` asks for, in each evaluation of 03 whose report is given; written into evals/nulls.json.

    What the file holds of evaluations that were not asked for this time stays, as their reports do.
    """
    content = run.json("training.json")["activations"]["content_hash"]
    here = {"comparable": digest([HELDOUT, content])}

    def measured(name: str, null: SparseAutoencoder) -> dict[str, Any]:
        return _on_heldout(null, asked) | {"config": here} if name == HELDOUT else evaluate(name, null)

    found = beside(p.nulls, run, asked, sae, {HELDOUT: {"config": here}, **reports}, measured)
    before = run.json("evals/nulls.json", {})
    found = {name: {**before.get(name, {}), **entries} for name, entries in found.items()}
    return _written(run.path / "evals/nulls.json", found)


def of_letters(p: params.Letters, run: runs.Run, asked: params.Train, sae: SparseAutoencoder,
               report: dict[str, Any], evaluate: Measure) -> Found:
    """The nulls that ``p`` asks for in 04's evaluation, whose ``report`` is given; in evals/absorption_nulls.json."""
    found = beside(p.nulls, run, asked, sae, {"absorption": report}, evaluate)
    return _written(run.path / "evals/absorption_nulls.json", found)


def _written(file: Path, found: Found) -> Found:
    if found:
        runs.write_json(file, found)
    else:
        file.unlink(missing_ok=True)
    return found


def beside(names: Iterable[str], run: runs.Run, asked: params.Train, sae: SparseAutoencoder,
           reports: dict[str, dict[str, Any]], evaluate: Measure) -> Found:
    """By null of ``names`` and evaluation of ``reports`` (the run's own): metrics, config, note, seconds.

    ``evaluate(evaluation, null)`` is called for what no earlier SAE had asked for. An entry without metrics has a
    status instead, ``not applicable`` or ``failed``, and a reason: a null's fault is not the run's.
    """
    training, wanted = run.json("training.json"), [name for name in EVALUATIONS if name in reports]
    found = {}
    for name in names:
        try:
            held = null_saes.ground_of(training["activations"]["content_hash"], asked)
            made = null_saes.make(name, sae, training["l0"], held)
            about = {"what": null_saes.described(name, made, sae), "architecture": made.architecture.name,
                     "d_sae": made.d_sae, "weights": weights_digest(made)}
            made = made.to(sae.W_dec.device)
            found[name] = {one: _entry(name, one, reports[one], made, about, asked, evaluate) for one in wanted}
        except Exception as error:  # a store that is gone, say
            found[name] = {one: _failed(error) for one in wanted}
    return found


def weights_digest(sae: SparseAutoencoder) -> str:
    """A short hash of all that an SAE computes with."""
    total = hashlib.sha256(digest([sae.architecture.name, sae.architecture.config()]).encode())
    parts = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, **sae.further}
    for name, part in parts.items():
        total.update(name.encode() + part.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:24]


def _entry(name: str, evaluation: str, report: dict[str, Any], null: SparseAutoencoder, about: dict[str, Any],
           asked: params.Train, evaluate: Measure) -> dict[str, Any]:
    """What one null scores in one evaluation, from the workbook, the cache or measured; or why there is no figure."""
    if (name, evaluation) in NOT_APPLICABLE:
        return {"status": "not applicable", "reason": NOT_APPLICABLE[name, evaluation]}
    comparable = report.get("config", {}).get("comparable")
    if comparable is None:
        return {"status": "not applicable", "reason": "the run itself has no figure here"}
    if (name, evaluation) == ("residual", "sparse_probing"):
        return _kept(_on_residual(report), about, 0.0)
    key = embedded_nulls.key(asked, name, null, evaluation, HELDOUT if evaluation == HELDOUT else comparable)
    if shipped := embedded_nulls.find(key):
        return {**shipped, "config": {**about, "comparable": comparable}, "seconds": 0.0, "key": key,
                "origin": embedded_nulls.SHIPPED}
    versions = [runs.provenance()["packages"].get("sae-bench"), runs.library_digest("evaluation", "sae", "metrics")]
    file = runs.cache() / f"evaluation/nulls-{digest([about['weights'], evaluation, comparable, versions], 24)}.json"
    try:
        with alone(file, f"figures of the {null_saes.LABELS[name]}"):
            held = _read(file)
            if held is None:
                began = time.perf_counter()
                held = _kept(evaluate(evaluation, null), about, began) | {"key": key}
                runs.write_json(file, held)
                print(f"{null_saes.LABELS[name]}: {evaluation} measured, {held['seconds']:.0f} s", flush=True)
    except Exception as error:
        return _failed(error)
    return held


def _kept(report: dict[str, Any], about: dict[str, Any], began: float) -> dict[str, Any]:
    """What is kept of a null's report."""
    held = {"metrics": report["metrics"], "note": report.get("note"),
            "config": {**about, "comparable": report["config"]["comparable"]},
            "seconds": round(time.perf_counter() - began, 2) if began else 0.0}
    return held | ({"within_this_sae": report["within_this_sae"]} if report.get("within_this_sae") else {})


def _failed(error: Exception) -> dict[str, Any]:
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def _read(file: Path) -> dict[str, Any] | None:
    """An entry of the cache; None where there is none, or a damaged one, which is computed again and replaced."""
    try:
        held = runs.read_json(file)
        numbers = all(value is None or isinstance(value, (int, float)) for value in held["metrics"].values())
        return held if numbers and held["config"]["comparable"] and {"note", "seconds"} <= {*held} else None
    except (runs.RunError, KeyError, TypeError, AttributeError):
        return None


def _on_residual(report: dict[str, Any]) -> dict[str, Any]:
    """Sparse probing of the raw residual stream: SAEBench's figures of the model, in the place of an SAE's."""
    of_model = {name: value for name, value in report["metrics"].items() if name.startswith("llm_")}
    return {"metrics": of_model | {name.replace("llm_", "sae_", 1): value for name, value in of_model.items()},
            "note": "SAEBench's figures of the model itself", "config": report["config"]}


@torch.no_grad()
def _on_heldout(null: SparseAutoencoder, asked: params.Train) -> dict[str, Any]:
    """What training.json says of an SAE, where it can be said of a null, as a report."""
    source = activations.source(asked)
    rows = source.heldout()
    found = measure.heldout(null, rows, source.scale, within=True)
    within = found.pop("within_this_sae")
    return {"metrics": found | {"mean_cos2": measure.weights(null, rows.x)["mean_cos2"]}, "within_this_sae": within}
