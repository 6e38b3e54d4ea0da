"""03's work: one SAE through the evaluations asked for, each into its own JSON, and the gate completed."""

from __future__ import annotations

from typing import Any

from sae_lib import params, runs
from sae_lib.evaluation import foreign_run, validity


def trained(run: runs.Run) -> params.Train:
    """The typed parameters that a run was trained with. Raises RunError where it was not trained."""
    return params.check("train", {**run.params, "run": run.name}, str(run.path / "params.yaml"))


def hook_of(layer: int | None, asked: params.Train) -> str:
    """The hook to evaluate at: the trained one, unless another ``layer`` is named (the gate then says so)."""
    return asked.hook if layer in (None, asked.layer) else f"blocks.{layer}.hook_resid_post"


def evaluate(p: params.Evaluate) -> dict[str, Any]:
    """Run ``p.evals`` on the run's SAE on held-out text; write evals/*.json and validity.json; return them by name.

    With ``p.sae`` the SAE of that folder, made elsewhere, becomes the run first.

    An SAE whose weights are not finite is not evaluated: it is invalid already, and every figure would be NaN.
    """
    run = foreign_run.bring_in(p) if p.sae else runs.Run(p.run)
    with run.stage("03_eval"):
        asked = trained(run)
        verdict = validity.update(run)
        if run.json("training.json")["nonfinite"]:
            print(f"not evaluated: {'; '.join(verdict.reasons)}")
            results = {}
        else:
            results = {"core": _core(p, run, asked)}
        for name, result in results.items():
            runs.write_json(run.path / "evals" / f"{name}.json", result)
        verdict = validity.update(run)
        runs.write_json(run.path / "evals" / "done.json", {"evals": sorted(results), "status": verdict.status})
    return results


def _core(p: params.Evaluate, run: runs.Run, asked: params.Train) -> dict[str, Any]:
    from sae_lib.data import activations, language_model
    from sae_lib.evaluation import saebench
    from sae_lib.training.ingredients import load_sae

    site = hook_of(p.layer, asked)
    model = language_model.load(p.model or asked.model, hook=site, dtype="float32", device=p.device, whole=True)
    sae = load_sae(run.path / "sae").to(model.device)
    texts = activations.heldout_texts(asked)
    return saebench.core(sae, model, texts, p.eval_preset, context=asked.context, threads=p.threads)
