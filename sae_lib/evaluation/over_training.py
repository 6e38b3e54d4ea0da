"""One training as a curve: the SAEs that 02 kept on the way (``snapshots``), measured as the finished one is.

03 measures explained variance, loss recovered and L0 on the tokens of SAEBench core; 04 absorption and split latents on
its own words. Each point is judged by the gate's rules for itself: one that is dead, or whose probes find nothing, has
no score. The SAE before the first step is a null baseline. All is within one SAE: nothing about a variant.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from sae_lib import intervals, params, runs
from sae_lib.data import activations
from sae_lib.evaluation import masked_passes, validity
from sae_lib.evaluation.saebench import PRESETS, as_read, fit, packed
from sae_lib.evaluation.saebench.adapter import check_sae
from sae_lib.params import digest
from sae_lib.training.ingredients import load_sae
from sae_lib.training.snapshots import LAST

WHOLE, TO_HOOK = "through the model", "up to the hook"
FIGURES = ("explained_variance", "loss_recovered", "l0")


def kept(run: runs.Run) -> list[dict[str, Any]]:
    """What training.json lists of the run's snapshots, the finished SAE as the last; empty where it kept none."""
    return run.json("training.json", {}).get("snapshots") or []


def each(run: runs.Run, finished: Any, measure) -> list[tuple[dict[str, Any], Any]]:
    """Each of ``kept``, and the seconds it took, with what ``measure(sae)`` finds; of the last, ``finished`` is known.

    An SAE whose weights are not finite is not measured: None stands for it.
    """
    found = []
    for one in kept(run):
        began = time.perf_counter()
        known = None if one["nonfinite"] else finished if one["folder"] == LAST else measure(_load(run, one))
        found.append((one | {"seconds": round(time.perf_counter() - began, 2)}, known))
        print(f"after {one['samples']:,} samples: measured, {found[-1][0]['seconds']:.0f} s", flush=True)
    return found


def quality(p: params.Evaluate, run: runs.Run, asked: params.Train, lm) -> dict[str, Any]:
    """The content of evals/over_training.json, before the run's verdict, for a run that kept snapshots.

    The tokens are core's (at most those of its preset ``default``), so that the last point is what core says, and what
    the whole model ``lm`` computes without an SAE is there already: the loss on blocks that core reads through the
    model, the rest on those and the ones that it reads up to the hook. All SAEs are in memory at once.
    """
    start = time.perf_counter()
    preset = "default" if p.eval_preset == "paper" else p.eval_preset
    texts = activations.heldout_texts(asked)
    blocks = packed(lm, texts, PRESETS[preset].blocks, asked.context)
    batches = fit(PRESETS[preset], len(blocks), asked.context)
    as_cut = blocks[:batches.blocks]
    blocks = as_read(as_cut)
    labels = [WHOLE] * (batches.reconstruction * batches.rows) + [TO_HOOK] * (batches.sparsity * batches.rows)
    points = [one for one in kept(run) if not one["nonfinite"]]
    saes = [(_load(run, one).to(lm.device), {WHOLE, TO_HOOK}) for one in points]
    for sae, _ in saes:
        check_sae(sae, lm.name, lm.d_model)
    sums = masked_passes.run_each(saes, lm, blocks, labels, "SAEs over training", to_hook=frozenset({TO_HOOK}),
                                  kept_with=as_cut, threads=p.threads, mode=p.mode) if saes else None
    found = {one["folder"]: _figures(sums, number, labels) for number, one in enumerate(points)}
    config = {"preset": preset, "model": lm.name, "model_identity": lm.identity, "hook": lm.hook, "d_in": lm.d_model,
              "d_sae": asked.d_sae, "context": asked.context, **batches._asdict(),
              "text_sha256": hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16],
              "dtype": str(lm.dtype).removeprefix("torch."), "device": str(lm.device),
              "interval": f"bootstrap over blocks of text, {intervals.LEVEL:.0%}: within this SAE"}
    rows = []
    for one in kept(run):
        row = found.get(one["folder"]) or {"metrics": {}, "interval": {}, "note": None}
        core = {"metrics": {"ce_loss_score": row["metrics"].get("loss_recovered"), "l0": row["metrics"].get("l0")},
                "config": config}
        rows.append(_point(run, asked, one, row, core=core))
    return _report("over training", run, rows, config, time.perf_counter() - start)


def absorption(run: runs.Run, asked: params.Train, rows: list[tuple[dict[str, Any], dict[str, Any] | None]],
               config: dict[str, Any]) -> dict[str, Any]:
    """The content of evals/absorption_over_training.json, before the run's verdict; empty without ``rows``.

    A row is of ``each``: what 04 found of that SAE, with ``metrics``, ``interval``, ``letters``, ``note`` and
    ``l0_words``.
    """
    points = []
    for one, found in rows:
        row = found or {"metrics": {}, "interval": {}, "note": None, "l0_words": None}
        points.append(_point(run, asked, one, row, absorption={"l0_words": row["l0_words"], "config": config}))
    seconds = sum(one["seconds"] for one, _ in rows)
    return _report("absorption over training", run, points, config, seconds) if rows else {}


def _load(run: runs.Run, one: dict[str, Any]):
    return load_sae(run.path / one["folder"])


def _figures(sums: masked_passes.Sums, number: int, labels: list[str]) -> dict[str, Any]:
    """Explained variance and L0 over all blocks, the loss over those read through the model; with intervals."""
    every = sums.figures(number, [True] * len(labels))
    through = sums.figures(number, [label == WHOLE for label in labels])
    every["interval"]["loss_recovered"] = through["interval"]["loss_recovered"]
    every["loss_recovered"] = through["loss_recovered"]
    return {"metrics": {name: every[name] for name in FIGURES}, "interval": every["interval"], "note": None}


def _point(run: runs.Run, asked: params.Train, one: dict[str, Any], row: dict[str, Any], *,
           core: dict[str, Any] | None = None, absorption: dict[str, Any] | None = None) -> dict[str, Any]:
    """A point of the curve: place, status, why there is no score, figures.

    The gate's rules apply to the snapshot's own measures, as if training had been meant to end there. What is no
    result has no metrics; what was computed all the same stands under ``raw``.
    """
    training = run.json("training.json") | one | {"planned_steps": one["steps"], "measured": {}}
    role = asked.role if one["steps"] else "null"
    verdict = validity.judge(training, core, role, absorption)
    why = "; ".join(verdict.reasons) or row["note"] or None
    place = {name: one[name] for name in ("samples", "steps", "share", "folder")}
    place |= {"status": verdict.status, "not_a_result": why}
    if why is None:
        return place | row
    return place | row | {"metrics": {}, "interval": {}, "raw": {"not_a_result": why, "metrics": row["metrics"]}}


def _report(name: str, run: runs.Run, points: list[dict[str, Any]], config: dict[str, Any],
            seconds: float) -> dict[str, Any]:
    config = {"comparable": digest({key: value for key, value in config.items() if key != "d_sae"}), **config}
    return {"eval": name, "points": points, "config": config,
            "provenance": runs.provenance(seed=run.params.get("seed")),
            "seconds": round(seconds, 2)}
