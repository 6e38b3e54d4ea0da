"""Names from parameters: content hashes, and the folder of the store that an extraction's inputs ask for."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from sae_lib.params.checking import ParameterError
from sae_lib.params.stages import Extract


def digest(value: Any, length: int = 12) -> str:
    """A short content hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


EXTRACT_INPUTS = ("model", "dtype", "corpus", "corpus_column", "corpus_split", "corpus_seed", "tokens", "context",
                  "spelling_share", "max_norm_ratio", "store_shard_tokens")


def activations_name(p: Extract) -> str:
    """The store's folder name: readable, and ending in the hash of the inputs as asked."""
    asked = {name: getattr(p, name) for name in EXTRACT_INPUTS} | {"hook": p.hook}
    asked |= {"contents": {name: _folder_digest(path) for name, path in _local_sources(p).items()}}
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(p.model).name).strip("-").lower()
    return f"{label}-{p.hook.removeprefix('blocks.').replace('.hook_', '-')}-{p.tokens}-{digest(asked)}"


ALIASES = {"smollm2", "tiny", "planted", "news", "wikipedia", "wikitext", "wmdp_bio"}


def local_path(name: str) -> Path | None:
    """The file or folder that a model or corpus names, relative to here or to the project; None for an alias or hub id.

    JupyterLab runs a notebook in its own folder, papermill in the caller's: both must find the same file.
    """
    try:
        places = (Path(name).expanduser(), Path(__file__).resolve().parents[2] / name)
        return None if name in ALIASES else next((place.resolve() for place in places if place.exists()), None)
    except (OSError, RuntimeError, ValueError):  # too long to be a path, no such user's home, a folder kept from us
        return None


def _local_sources(p: Extract) -> dict[str, Path]:
    names = [p.model, *([p.corpus] if isinstance(p.corpus, str) else p.corpus)]
    return {name: path for name in names if (path := local_path(name))}


def _folder_digest(path: Path) -> str:
    """Hash of a local model's or corpus' bytes, so that changed content is another store."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file()):
        total.update(file.name.encode("utf-8", "surrogateescape"))
        try:
            with file.open("rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise ParameterError(f"{file}: cannot be read ({error.strerror}); model and corpus must be readable "
                                 "files") from None
    return total.hexdigest()
