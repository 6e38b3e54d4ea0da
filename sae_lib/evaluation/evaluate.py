"""03's work: one SAE through the evaluations asked for, each into its own JSON, and the gate completed."""

from __future__ import annotations

from typing import Any

from sae_lib import params, runs
from sae_lib.evaluation import foreign_run, nulls, validity


def trained(run: runs.Run) -> params.Train:
    """The typed parameters that a run was trained with. Raises RunError where it was not trained."""
    return params.check("train", {**run.params, "run": run.name}, str(run.path / "params.yaml"))


def hook_of(layer: int | None, asked: params.Train) -> str:
    """The hook to evaluate at: the trained one, unless another ``layer`` is named (the gate then says so)."""
    return asked.hook if layer in (None, asked.layer) else f"blocks.{layer}.hook_resid_post"


def evaluate(p: params.Evaluate) -> dict[str, Any]:
    """Run ``p.evals`` on the run's SAE on held-out text; write evals/*.json and validity.json; return them by name.

    Each result is written as it is there: what a later evaluation fails on does not cost the earlier ones.

    With ``p.compression_ratios`` the SAE is measured with those shares of its latents too (``evaluation.compression``).

    So are, with ``p.over_training``, the SAEs that training kept on the way (``evaluation.over_training``).

    With ``p.sae`` the SAE of that folder, made elsewhere, becomes the run first.

    With ``p.nulls`` the same evaluations of SAEs that learnt nothing are in ``nulls`` (``evaluation.nulls``).

    An SAE whose weights are not finite is not evaluated: it is invalid already, and every figure would be NaN.
    """
    run = foreign_run.bring_in(p) if p.sae else runs.Run(p.run)
    with run.stage("03_eval"):
        asked = trained(run)
        verdict, results = validity.update(run), {}
        if run.json("training.json")["nonfinite"]:
            print(f"not evaluated: {'; '.join(verdict.reasons)}")
        else:
            sae, model = _loaded(p, run, asked)
            for name in EVALS:
                if name in p.evals:
                    results[name] = EVALS[name](p, asked, sae, model)
                    runs.write_json(run.path / f"evals/{name}.json", results[name])
            results["nulls"] = nulls.of_evaluations(p, run, asked, sae, results,
                                                    lambda name, null: EVALS[name](p, asked, null, model))
            if p.compression_ratios:
                results["compression"] = _compression(p, run, asked, sae, model)
                runs.write_json(run.path / "evals/compression.json", results["compression"])
            if p.over_training and run.json("training.json").get("snapshots"):
                results["over_training"] = _over_training(p, run, asked, model)
                runs.write_json(run.path / "evals/over_training.json", results["over_training"])
        verdict = validity.update(run)
        runs.write_json(run.path / "evals" / "done.json", {"evals": sorted({*results} - {"nulls"}),
                                                              "status": verdict.status})
    return results


def _loaded(p: params.Evaluate, run: runs.Run, asked: params.Train):
    """The run's SAE, and the whole model that it is evaluated in; none for the truth of a planted world alone."""
    from sae_lib.data import language_model
    from sae_lib.training.ingredients import load_sae

    site = hook_of(p.layer, asked)
    if p.evals == ["truth"] and not p.compression_ratios:
        return load_sae(run.path / "sae"), None
    model = language_model.load(p.model or asked.model, hook=site, dtype="float32", device=p.device, whole=True)
    return load_sae(run.path / "sae").to(model.device), model


def _core(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.data import activations
    from sae_lib.evaluation import saebench

    texts = activations.heldout_texts(asked)
    return saebench.core(sae, model, texts, p.eval_preset, context=asked.context, threads=p.threads)


def _sparse_probing(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.sparse_probing import sparse_probing

    return sparse_probing(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _scr(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.scr_tpp import scr

    return scr(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _tpp(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.scr_tpp import tpp

    return tpp(sae, model, p.eval_preset, threads=p.threads, mode=p.mode)


def _unlearning(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation.saebench.unlearning import unlearning

    return unlearning(model.name, hook=model.hook, identity=model.identity, d_sae=sae.d_sae)


def _truth(p: params.Evaluate, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation import planted_run

    return planted_run.evaluate(sae.to("cpu"), asked)


EVALS = {"core": _core, "sparse_probing": _sparse_probing, "scr": _scr, "tpp": _tpp, "unlearning": _unlearning,
         "truth": _truth}
"""What each of ``evals`` runs, in this order."""


def _compression(p: params.Evaluate, run: runs.Run, asked: params.Train, sae, model) -> dict[str, Any]:
    from sae_lib.evaluation import compression

    return compression.compression(p, run, asked, sae, model)


def _over_training(p: params.Evaluate, run: runs.Run, asked: params.Train, model) -> dict[str, Any]:
    from sae_lib.evaluation import compression, over_training

    return compression.marked(over_training.quality(p, run, asked, model), validity.update(run))
