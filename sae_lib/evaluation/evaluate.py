"""03's work: one SAE through the evaluations asked for, each into its own JSON, and the gate completed."""

from __future__ import annotations

import functools
from typing import Any

from sae_lib import params, runs
from sae_lib.evaluation import faults, foreign_run, nulls, validity
from sae_lib.evaluation.reported import settings
from sae_lib.memory import keep_freed_memory


def trained(run: runs.Run) -> params.Train:
    """The typed parameters that a run was trained with. Raises RunError where it was not trained."""
    return params.check("train", {**run.params, "run": run.name}, str(run.path / "params.yaml"))


def hook_of(layer: int | None, asked: params.Train) -> str:
    """The hook to evaluate at: the trained one, unless another ``layer`` is named (the gate then says so)."""
    return asked.hook if layer in (None, asked.layer) else f"blocks.{layer}.hook_resid_post"


def evaluate(p: params.Evaluate) -> dict[str, Any]:
    """Run ``p.evals`` on the run's SAE on held-out text; write evals/*.json and validity.json; return them by name.

    Each result is written as soon as it is measured. One that fails is a report of status ``failed`` with its reason,
    the others still run, and the verdict is ``failed``; ``faults.insist`` then raises. What stops all of them is raised
    at once.

    With ``p.compression_ratios`` the SAE is measured with those shares of its latents too (``evaluation.compression``).

    So are, with ``p.over_training``, the SAEs that training kept on the way (``evaluation.over_training``).

    With ``p.sae`` the SAE of that folder, made elsewhere, becomes the run first.

    With ``p.nulls`` the same evaluations of SAEs that learnt nothing are in ``nulls`` (``evaluation.nulls``).

    An SAE whose weights are not finite is not evaluated: it is invalid already, and every figure would be NaN.
    """
    run = foreign_run.bring_in(p) if p.sae else runs.Run(p.run)
    with run.stage("03_eval"):
        asked = trained(run)
        (run.path / "evals/done.json").unlink(missing_ok=True)
        faults.forget(run, p.evals + ["compression"] * bool(p.compression_ratios))
        verdict, results = validity.update(run), {}
        if run.json("training.json")["nonfinite"]:
            print(f"not evaluated: {'; '.join(verdict.reasons)}")
        else:
            results = _measured(p, run, asked)
        verdict = validity.update(run)
        if not any(map(faults.reason, results.values())):
            runs.write_json(run.path / "evals" / "done.json", {"evals": sorted({*results} - {"nulls"}),
                                                               "status": verdict.status})
    return results


def _measured(p: params.Evaluate, run: runs.Run, asked: params.Train) -> dict[str, Any]:
    """The report of every evaluation that ``p`` asks for, failed ones among them; each is written."""
    measures = {name: functools.partial(measure, p, asked) for name, measure in EVALS.items() if name in p.evals}
    if p.compression_ratios:
        measures["compression"] = functools.partial(_compression, p, run, asked)
    if p.over_training and run.json("training.json").get("snapshots"):
        measures["over_training"] = functools.partial(_over_training, p, run, asked)
    config = {"preset": p.eval_preset, "model": p.model or asked.model, "hook": hook_of(p.layer, asked)}
    try:
        sae, model = _loaded(p, run, asked)
        stamp = runs.sha256(run.path / validity.WEIGHTS)
    except Exception as error:
        for name in measures:
            runs.write_json(run.path / f"evals/{name}.json", faults.failed(name, error, config))
        raise
    found = {name: faults.attempt(run, name, lambda measure=measure: measure(sae, model) | {"sae_sha256": stamp},
                                  config) for name, measure in measures.items()}
    beside = nulls.of_evaluations(p, run, asked, sae, found, lambda name, null: EVALS[name](p, asked, null, model))
    return found | ({"nulls": beside} if beside else {})


def _loaded(p: params.Evaluate, run: runs.Run, asked: params.Train):
    """The run's SAE, and the whole model that it is evaluated in; none for the truth of a planted world alone."""
    from sae_lib.data import language_model
    from sae_lib.training.ingredients import load_sae

    keep_freed_memory()
    site = hook_of(p.layer, asked)
    if p.evals == ["truth"] and not p.compression_ratios:
        return load_sae(run.path / "sae"), None
    model = language_model.load(p.model or asked.model, hook=site, dtype=settings.dtype(p.eval_preset),
                                device=p.device, whole=True)
    return load_sae(run.path / "sae").to(model.device), model


def _core(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.data import activations
    from sae_lib.evaluation import saebench

    texts = activations.heldout_texts(asked)
    return saebench.core(sae, model, texts, p.eval_preset, context=asked.context, threads=p.threads)


def _sparse_probing(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.sparse_probing import sparse_probing

    return sparse_probing(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _sae_probes(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.sae_probes import sae_probes

    return sae_probes(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _scr(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.scr_tpp import scr

    return scr(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _tpp(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.scr_tpp import tpp

    return tpp(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _unlearning(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.unlearning import unlearning

    return unlearning(sae, model, p.eval_preset, folder=p.unlearning_data, threads=p.threads,
                      declared=p.model not in (None, asked.model))


def _truth(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation import planted_run

    return planted_run.evaluate(sae.to("cpu"), asked)


EVALS = {"core": _core, "sparse_probing": _sparse_probing, "sae_probes": _sae_probes, "scr": _scr, "tpp": _tpp,
         "unlearning": _unlearning, "truth": _truth}
"""What each of ``evals`` runs, in this order."""


def _compression(p: params.Evaluate, run: runs.Run, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation import compression

    return compression.compression(p, run, asked, sae, model)


def _over_training(p: params.Evaluate, run: runs.Run, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation import compression, over_training

    return compression.marked(over_training.quality(p, run, asked, model), validity.update(run))
