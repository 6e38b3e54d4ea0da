"""A run's folder: its name, atomic writing, provenance.

Files are written under a temporary name and renamed: a file that exists is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from sae_lib import presence
from sae_lib.params import Common, ParameterError, load_yaml

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._=-]{0,99})?")
PACKAGES = ("torch", "transformers", "sae-bench", "sae-lens", "transformer-lens", "datasets", "numpy", "plotly")


NO_ROOM = ("No space left on device", "Disk quota exceeded")


class RunError(RuntimeError):
    """A run's folder cannot be used as asked; the message says why and what would be right."""


def project() -> Path:
    """The folder that holds notebooks/ and params/: the checkout, or the current folder."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def home() -> Path:
    """Where runs/ and activations/ live: $SAE_WORKBOOK_HOME, or the project."""
    return Path(os.environ.get("SAE_WORKBOOK_HOME") or project())


def cache() -> Path:
    """Where downloads are kept between projects: $SAE_WORKBOOK_CACHE, or ~/.cache/sae-workbook."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("SAE_WORKBOOK_CACHE") or base / "sae-workbook")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def folder_of(name: str) -> Path:
    """The folder of a run's name (``topk`` or ``study/topk-s42``). Raises ParameterError for an unsafe name."""
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name) or ".." in name:
        raise ParameterError(f"run: '{name}' is not a name; use letters, digits, . _ = - and at most one /")
    base = home() / "runs"
    folder, tree = base / name, base.resolve()
    for path in (folder, *folder.glob("*")):
        if not path.resolve().is_relative_to(tree):
            raise ParameterError(f"run: {path.relative_to(base.parent)} is a link out of {base}; remove it, or link "
                                 "runs/ itself to another disk")
    return folder


@contextlib.contextmanager
def whole(path: Path):
    """Yield a temporary sibling of ``path`` to write (a file or a folder), renamed onto it on success only."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)  # of a killed process that had the same number, as in a container
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:  # writers have kinds of their own, and torch.save does not say why
        if any(sign in str(error) for sign in NO_ROOM) or shutil.disk_usage(path.parent).free < 4096:
            raise RunError(f"{path}: no space left on the disk; nothing was written. Free some, or set "
                           "SAE_WORKBOOK_HOME (and SAE_WORKBOOK_CACHE) to a larger one") from None
        raise
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; for who works on it alone."""
    for pattern in (".*.tmp", ".tmp??????"):  # ours, and those of safetensors, which has a temporary file of its own
        for path in Path(folder).glob(pattern):
            _remove(path)


def write_text(path: Path, text: str) -> Path:
    """Write a whole text file or none."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a whole JSON file or none; a NaN is written as null, which readers understand as missing."""
    return write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises RunError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged JSON ({error}); delete it and run its stage again") from None


def read_table(path: Path, columns: list[str] | None = None):
    """Read a parquet file as a DataFrame. Raises RunError naming the file when it is missing or damaged."""
    import pandas as pd

    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:  # Arrow raises all of them
        raise RunError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def library_digest(*rooms: str) -> str:
    """Hash of the library's own source (or of some rooms): a run made by another one is stale, not retrained."""
    total = hashlib.sha256()
    for room in rooms or ("",):
        for file in sorted((Path(__file__).parent / room).rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()[:12]


def provenance(**extra: Any) -> dict[str, Any]:
    """Package versions, git commit, machine and time, for the JSON that a stage writes."""
    git = subprocess.run(["git", "-C", str(project()), "rev-parse", "HEAD"], capture_output=True, text=True)
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "packages": versions,
            "python": platform.python_version(), "git_commit": git.stdout.strip() or None,
            "library": library_digest(), "machine": platform.machine(), "cpus": os.cpu_count(), **extra}


class Run:
    """One run's folder under runs/, opened by name."""

    def __init__(self, name: str):
        self.name, self.path = name, folder_of(name)

    def __repr__(self) -> str:
        return f"Run({self.name!r})"

    @property
    def finished(self) -> bool:
        """Whether an SAE was saved; its folder alone may be one that Snakemake made for what is to come."""
        return (self.path / "sae/cfg.json").exists()

    @property
    def params(self) -> dict[str, Any]:
        """The resolved parameters that the run was trained with."""
        file = self.path / "params.yaml"
        if not file.exists():
            raise RunError(f"run '{self.name}': no params.yaml in {self.path}; run 02_train_variant first")
        try:
            return load_yaml(file)
        except ParameterError as error:
            raise RunError(str(error)) from None

    def json(self, name: str, default: Any = None) -> Any:
        """Read one of the run's JSON files; ``default`` when it is not there."""
        path = self.path / name
        if not path.exists():
            return default
        value = read_json(path)
        if not isinstance(value, dict):
            raise RunError(f"{path}: expected a mapping, got a {type(value).__name__}; run its stage again")
        return value

    @contextlib.contextmanager
    def stage(self, stage: str, keep_finished: bool = False):
        """Run a stage's work: a fault is written to validity.json as ``failed`` with its reason, then raised.

        With ``keep_finished`` a folder that holds an SAE already is left as it is.
        """
        try:
            yield self
        except Exception as error:
            if keep_finished and self.finished:
                raise
            reason = f"{stage} failed: {type(error).__name__}: {error}"
            where = traceback.format_exc(limit=-3)
            write_json(self.path / "validity.json", {"status": "failed", "reasons": [reason], "flags": [],
                                                     "traceback": where, **provenance()})
            raise


def resolved(p: Common) -> dict[str, Any]:
    """The parameters that decide a run's figures: without who reads, where, and how often it is saved."""
    return p.model_dump(exclude={"mode", "overwrite", "threads", "run", "checkpoint_every"})


def start(p: Common, **made_from: Any) -> Run:
    """Open the run's folder for training and write its resolved parameters; checkpoints stay for training to judge.

    Raises RunError when the folder holds a finished run of other parameters and ``overwrite`` is not set, and Busy
    when another process works on it.
    """
    run, asked = Run(p.run), resolved(p) | made_from
    with presence.alone(run.path, f"run '{p.run}'"):
        if run.finished and not p.overwrite:
            other = sorted(k for k in {*asked, *run.params} if asked.get(k) != run.params.get(k))
            if other:
                raise RunError(f"run '{p.run}' is finished with other parameters ({', '.join(other)}); "
                               "choose another name for `run`, or set overwrite: true to replace it")
        sweep(run.path)
        with contextlib.suppress(RunError):  # what an interrupted training goes on from stays
            if asked != run.params:
                _remove(run.path / "snapshots")
        for stale in ("sae", "validity.json", "training.json", "history.parquet", "evals", "latents", "hashes.json"):
            _remove(run.path / stale)
        write_text(run.path / "params.yaml", yaml.safe_dump(asked, sort_keys=True))
    return run
