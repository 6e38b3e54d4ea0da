"""What evaluations keep for the next SAE: tensors and JSON in one safetensors file, which knows its own name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lib import runs


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and JSON of a file; None where there is none, or one that is damaged or was made for another name.

    It is computed again then, and replaced.
    """
    try:
        with safe_open(file, "pt") as handle:
            if (handle.metadata() or {})["made_for"] != file.stem:
                return None
            about = json.loads(handle.metadata()["about"])
            return {name: handle.get_tensor(name) for name in handle.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def write(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Keep tensors (none of which shares memory with another) and JSON as ``file``, whole or not at all."""
    with runs.whole(file) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary,
                  {"about": json.dumps(about), "made_for": file.stem})
