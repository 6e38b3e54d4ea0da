"""Exact resume: all that training changes, written now and then, and taken back by a run of the same parameters.

``checkpoints/<step>/`` holds ``tensors.safetensors`` and ``state.json``. A run that goes on from one ends in the same
bits as one that was never disturbed, for equal threads; a checkpoint made with anything else is not used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lib import params, runs
from sae_lib.training import snapshots

FORMAT, KEPT = 5, 2


def made_with(trainer) -> dict[str, Any]:
    """Everything that decides the bits of a training: a checkpoint continues only where all of it is the same."""
    held = {**runs.resolved(trainer.p), "activations content": trainer.source.content_hash,
            "threads": torch.get_num_threads(), "device": trainer.device, "kernel": trainer.sae.kernel.name,
            "torch": torch.__version__,
            "code of the training": runs.library_digest("data", "sae", "training"), "checkpoint format": FORMAT}
    return json.loads(json.dumps(held))


def save(trainer, folder: Path) -> None:
    """Write a checkpoint of the step that was just done, whole or not at all, and keep the newest two.

    One that cannot be written (a full disk) is said in a line, and training goes on.
    """
    architecture = trainer.sae.architecture
    numbers = {name: getattr(architecture, name) for name in architecture.state}
    state = {"made_with": made_with(trainer), "step": trainer.step, "rows": trainer.rows, "seconds": trainer.seconds(),
             "waited": trainer.waited, "busy": trainer.busy, "resumed_at": trainer.resumed_at, "phases": trainer.phases,
             "snapshots": trainer.snapshots,
             "architecture": {key: value for key, value in numbers.items() if not isinstance(value, Tensor)}}
    state = json.loads(json.dumps(state, default=float))
    held = {f"architecture.{key}": value for key, value in numbers.items() if isinstance(value, Tensor)}
    try:
        with runs.whole(folder / f"{trainer.step:09d}") as temporary:
            temporary.mkdir()
            save_file({key: value.detach().contiguous() for key, value in (held | _tensors(trainer)).items()},
                      temporary / "tensors.safetensors")
            digest = runs.sha256(temporary / "tensors.safetensors")
            note = {"tensors_sha256": digest, "digest": params.digest([digest, state], 64), "state": state}
            # json's own NaN and Infinity: history rows hold them, and only this module reads this file.
            (temporary / "state.json").write_text(json.dumps(note))
    except (OSError, SafetensorError, runs.RunError) as error:
        print(f"no checkpoint of step {trainer.step} ({error}); training goes on", flush=True)
        return
    for old in _there(folder)[KEPT:]:
        shutil.rmtree(old)


def resume(trainer, folder: Path) -> None:
    """Bring a fresh trainer to the newest checkpoint that is whole and made with the same; say so in a line.

    A damaged one is said and the one before it is used, or the start; those made with anything else are removed.
    """
    runs.sweep(folder)
    wanted = made_with(trainer)
    for path in _there(folder):
        try:
            state, tensors = _read(path)
            snapshots.check(folder.parent, state.get("snapshots", []))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            print(f"checkpoint of step {int(path.name)} is damaged ({error}): not used", flush=True)
            shutil.rmtree(path)
            continue
        other = sorted(key for key in {*wanted, *state["made_with"]}
                       if wanted.get(key) != state["made_with"].get(key))
        if other:
            print(f"checkpoint of step {state['step']} was made with other {', '.join(other)}: not used, removed; "
                  "training starts from step 0", flush=True)
            shutil.rmtree(folder)
            return
        _restore(trainer, state, tensors)
        print(f"going on from the checkpoint of step {trainer.step} of {trainer.total_steps}", flush=True)
        return


def _there(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    note = json.loads((path / "state.json").read_text())
    if (params.digest([note["tensors_sha256"], note["state"]], 64) != note["digest"]
            or runs.sha256(path / "tensors.safetensors") != note["tensors_sha256"]):
        raise ValueError("its hash is not what was written")
    return note["state"], load_file(path / "tensors.safetensors")


def _tensors(trainer) -> dict[str, Tensor]:
    found = {f"weights.{name}": value for name, value in trainer.sae.named_parameters()}
    found |= {f"adam.{key}": value for key, value in trainer.optimiser.state_dict().items()}
    for i, part in enumerate(trainer.ingredients):
        found |= {f"ingredient.{i}.{key}": value for key, value in part.state_dict().items()}
        found[f"generator.{i}"] = part.generator.get_state()
    return found | {"silent": trainer.silent}


@torch.no_grad()
def _restore(trainer, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}

    for name, parameter in trainer.sae.named_parameters():
        parameter.copy_(tensors[f"weights.{name}"])
    trainer.optimiser.load_state_dict(under("adam."))
    for i, part in enumerate(trainer.ingredients):
        part.load_state_dict(under(f"ingredient.{i}."))
        part.generator.set_state(tensors[f"generator.{i}"].clone())
    trainer.silent.copy_(tensors["silent"])
    for key, value in (state["architecture"] | under("architecture.")).items():
        setattr(trainer.sae.architecture, key, value.to(trainer.device) if isinstance(value, Tensor) else value)
    trainer.step, trainer.rows, trainer.before = state["step"], state["rows"], state["seconds"]
    trainer.waited, trainer.busy, trainer.phases = state["waited"], state["busy"], state["phases"]
    trainer.snapshots = state["snapshots"]
    trainer.resumed_at = [*state["resumed_at"], state["step"]]
