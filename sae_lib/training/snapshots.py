"""Whole SAEs kept on the way, at shares of training (``snapshots``): what evaluation over training measures.

``snapshots/<samples>/`` of a run has the format of its ``sae``. The share 1 is ``sae`` itself and not written twice.
What training knows of each stands in training.json; checkpoints carry it, so that a resumed run lists the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sae_lib import params, runs
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training import measure
from sae_lib.training.ingredients import load_sae

FOLDER, LAST = "snapshots", "sae"


def save(trainer, folder: Path) -> SparseAutoencoder:
    """Save the SAE as it is now with the activation scale folded back, and return it as read from the file."""
    p = trainer.p
    sae = trainer.sae.folded(trainer.source.scale)
    sae.metadata = {"model_name": p.model, "hook_name": p.hook, "context_size": p.context, "prepend_bos": True,
                    "dataset_path": str(p.corpus), "run": p.run,
                    "model_identity": trainer.source.manifest["model"]["identity"]}
    sae.save(folder)
    return load_sae(folder)


def keep(trainer) -> None:
    """Keep the SAE where the step that was just done (or step 0) is one of ``snapshots``, once, and list it."""
    step = trainer.step
    due = trainer.folder and step in trainer.p.snapshot_steps and step < trainer.total_steps
    if not due or trainer.nonfinite or any(one["steps"] == step for one in trainer.snapshots):
        return
    name = f"{FOLDER}/{step * trainer.p.batch_size}"
    sae, rows = save(trainer, trainer.folder / name), trainer.source.heldout()
    knows = measure.weights(sae, rows.x) | measure.heldout(sae, rows, trainer.source.scale)
    trainer.snapshots.append(entry(trainer, name, knows) | {"sha256": _hash(trainer.folder / name)})


def entry(trainer, folder: str, knows: dict[str, Any]) -> dict[str, Any]:
    """What training.json lists of the SAE in ``folder`` as it is now, ``knows`` being what was measured of it.

    Before the first step no latent can have fired: its dead share is null.
    """
    step = trainer.step
    return {"folder": folder, "share": step / trainer.total_steps if trainer.total_steps else 1.0, "steps": step,
            "samples": step * trainer.p.batch_size,
            **{key: value for key, value in knows.items() if key not in ("heldout_tokens", "within_this_sae")},
            "dead_share": trainer.dead_share(step) if step else None,
            "idle_share": float(trainer.idle().double().mean())}


def listed(trainer, knows: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's snapshots in the order of training, its end as the last; none where none were asked for."""
    return [*trainer.snapshots, entry(trainer, LAST, knows)] if trainer.p.snapshots else []


def check(folder: Path, held: list[dict[str, Any]]) -> None:
    """Raises ValueError where one of the snapshots that a checkpoint lists is not in the run's folder as written."""
    for one in held:
        if not (folder / one["folder"]).is_dir() or _hash(folder / one["folder"]) != one["sha256"]:
            raise ValueError(f"its {one['folder']} is missing or changed")


def settle(trainer) -> None:
    """Remove from the run's folder the snapshots of another training, or of steps that are done again."""
    known = {one["folder"] for one in trainer.snapshots}
    for path in (trainer.folder / FOLDER).glob("*"):
        if f"{FOLDER}/{path.name}" not in known:
            shutil.rmtree(path)
    if not known:
        shutil.rmtree(trainer.folder / FOLDER, ignore_errors=True)


def _hash(folder: Path) -> str:
    return params.digest([[path.name, runs.sha256(path)] for path in sorted(folder.iterdir())], 64)
