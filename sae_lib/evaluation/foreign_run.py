"""An SAE made elsewhere becomes a run: its folder holds what a trained run's does, as far as it can be known.

Everything after it (SAEBench, letters, the table) then reads it as any other run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sae_lib import params, runs
from sae_lib.data import activations, language_model
from sae_lib.evaluation import latents
from sae_lib.params import ParameterError
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.foreign import load_foreign
from sae_lib.training import measure
from sae_lib.training.ingredients import load_sae


def bring_in(p: params.Evaluate) -> runs.Run:
    """Make run ``p.run`` of the SAE in the folder ``p.sae``, measured on the held-out rows of a store.

    The store is the one of the model and layer: those of ``p``, else those that the folder names; ``p.activations``
    where there are several. Nothing is done where the run is that SAE's already. Raises ParameterError naming sae,
    model, layer or activations, RunError for a folder that cannot be read or a run that is another's.
    """
    folder = params.local_path(p.sae)
    if folder is None or not folder.is_dir():
        raise ParameterError(f"sae: no folder {p.sae}; name one that SAELens, dictionary_learning or sparsify wrote")
    sae = load_foreign(folder)
    store, notes = _store(p, sae)
    if store.d_in != sae.d_in:
        raise ParameterError(f"sae: {folder.name} is for width {sae.d_in}, but {store.manifest['hook']} of "
                             f"'{store.manifest['inputs']['model']}' has {store.d_in}; name the model and layer that "
                             "it was trained on")
    asked = _as_trained(p, sae, store)
    made = {"sae": p.sae, "format": sae.metadata["format"], "sha256": sae.metadata["sha256"],
            "content_hash": store.content_hash}
    run = runs.Run(p.run)
    if (run.json("training.json") or {}).get("made_elsewhere") == made and (run.path / "sae/cfg.json").exists():
        return run
    run = runs.start(asked, sae=p.sae)
    with run.stage("03_eval"):
        sae.metadata |= {"hook_name": asked.hook, "model_name": asked.model, "context_size": asked.context,
                         "prepend_bos": True}
        sae.save(run.path / "sae")
        report = _report(load_sae(run.path / "sae"), asked, store) | {"made_elsewhere": made, "notes": notes}
        runs.write_json(run.path / "training.json", report)
        latents.record(run, store)
        runs.write_json(run.path / "provenance.json", report["provenance"])
    return run


def _store(p: params.Evaluate, sae: SparseAutoencoder):
    """The store to measure on, and what a reader should know of how it fits."""
    notes = [f"made elsewhere ({sae.metadata['format']}): its steps, dead latents in training and loss terms are not "
             "known, and the rules about them were not applied"]
    said = sae.metadata["hook_name"]
    model = p.model or sae.metadata["model_name"]
    hook = said if p.layer is None else f"blocks.{p.layer}.hook_resid_post"
    if p.activations != "auto":
        held = activations.open_named(p.activations)
        model = p.model or held.manifest["inputs"]["model"]
        hook = held.manifest["hook"] if p.layer is None else hook
    else:
        if model is None or hook is None:
            missing = "model" if model is None else "layer"
            raise ParameterError(f"{missing}: the folder {p.sae} does not say it; give the {missing} that the SAE was "
                                 "trained on")
        language_model.check_layer(model, hook)
        held = _only_store(model, hook)
    if (held.manifest["inputs"]["model"], held.manifest["hook"]) != (model, hook):
        raise ParameterError(f"activations: {held.name} holds {held.manifest['hook']} of "
                             f"'{held.manifest['inputs']['model']}', not {hook} of '{model}'")
    if said and said != hook:
        notes.append(f"the SAE says that it was trained on {said}, but it is evaluated at {hook}")
    return held, notes


def _only_store(model: str, hook: str):
    """The one finished store of a model and hook."""
    folder, found = runs.home() / "activations", []
    for manifest in sorted(folder.glob("*/manifest.json")):
        try:
            inputs = runs.read_json(manifest)["inputs"]
            if (inputs["model"], inputs["hook"]) == (model, hook):
                found.append(manifest.parent)
        except (runs.RunError, KeyError, TypeError):
            continue  # damaged, or another's: not one to measure on
    if len(found) != 1:
        what = (f"no store of {hook} of '{model}' in {folder}; run 01_extract with this model and layer: its held-out "
                "part is what the SAE is measured on" if not found else
                f"{len(found)} stores hold {hook} of '{model}': {', '.join(f.name for f in found)}; name one")
        raise ParameterError(f"activations: {what}")
    return activations.open_store(found[0])


def _as_trained(p: params.Evaluate, sae: SparseAutoencoder, store) -> params.Train:
    """What params.yaml holds: the store's parameters and the SAE's shape."""
    inputs = store.manifest["inputs"]
    values: dict[str, Any] = {key: inputs[key] for key in params.EXTRACT_INPUTS if key in inputs}
    layer, _ = language_model.parse_hook(store.manifest["hook"])
    near = store.path.parent == runs.home() / "activations"
    values |= {"layer": layer, "hook_name": store.manifest["hook"], "samples": 0, "run": p.run, "seed": p.seed,
               "activations": store.name if near else str(store.path), "overwrite": p.overwrite, "mode": p.mode,
               "architecture": sae.architecture.name, "d_sae": sae.d_sae}
    values |= {"k": sae.architecture.k} if sae.architecture.name == "topk" else {}
    return params.check("train", values, f"{Path(p.sae).name} with the store {store.name}")


def _report(sae: SparseAutoencoder, asked: params.Train, store) -> dict[str, Any]:
    """The content of training.json: what was measured on held-out rows; what only training knows is null."""
    rows = store.heldout()
    measured = measure.heldout(sae, rows, store.scale, within=True) | measure.weights(sae, rows.x)
    unknown = dict.fromkeys(("steps", "planned_steps", "samples", "dead_share", "explained_variance_untrained",
                             "seconds", "lr"))
    return {**unknown, **measured, "final_loss": {}, "terms": {}, "unfinished_schedules": [], "unused_parameters": [],
            "ingredients": [], "d_in": sae.d_in, "d_sae": sae.d_sae, "hook": asked.hook,
            "model_identity": store.manifest["model"]["identity"],
            "activations": {"name": store.name, "content_hash": store.content_hash},
            "provenance": runs.provenance(stage="03_eval", seed=asked.seed, threads=torch.get_num_threads(),
                                          activations=store.content_hash)}
