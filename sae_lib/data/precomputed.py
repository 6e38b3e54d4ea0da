"""Activations computed elsewhere: a folder of safetensors or npy files and a small manifest.json, read as a store is.

``manifest.json``::

    {"model": "gpt2", "hook": "blocks.8.hook_resid_post", "d_in": 768,
     "files": ["part-0.safetensors", {"file": "part-1.npy", "sha256": "..."}],
     "context": 128, "heldout_share": 0.05, "tensor": "x", "heldout_texts": "texts.jsonl"}

Each file holds rows (N, d_in), or blocks (n, context, d_in). Optional: ``context`` (rows of a block of text, in order),
``heldout_share`` (the last rows of the last files; a twentieth), ``tensor`` (which one of a safetensors file),
``heldout_texts`` (documents, one JSON object with "text" a line, that 03 evaluates on), and each file's ``sha256``.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from sae_lib import params, runs
from sae_lib.data import language_model
from sae_lib.data.store import COLUMNS, Batch, Store
from sae_lib.params import ParameterError

SPAN = 65_536
"""Rows read at once: what a shard is to a store."""


Name = Annotated[str, Field(pattern=r"^[^\x00]{1,200}$")]
"""A file of the folder."""


class File(BaseModel):
    """One file of rows."""

    model_config = ConfigDict(extra="forbid")

    file: Name
    sha256: str | None = None


class Manifest(BaseModel):
    """What manifest.json must say."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    hook: str
    d_in: int = Field(ge=1)
    files: list[Name | File] = Field(min_length=1)
    context: int | None = Field(None, ge=1)
    heldout_share: float = Field(0.05, gt=0, lt=1)
    tensor: str | None = None
    heldout_texts: Name | None = None


class Measured(NamedTuple):
    """What one pass over all rows gives."""

    mean: torch.Tensor
    """(D,) of the training rows."""
    scale: float
    """x * scale has E|x|^2 = d_in."""
    content_hash: str


class Precomputed(Store):
    """Reads like a Store. Token ids are not known (-1); a block is ``context`` rows, or one row where none is given."""

    def __init__(self, path: Path, buffer_mb: int = 2048):
        """Open a folder and read each file's shape. Raises RunError naming the file and what would be right."""
        self.path, self.buffer_mb = Path(path), buffer_mb
        said = _manifest(self.path / "manifest.json")
        self.d_in, self.context, self._tensor, self._texts = said.d_in, said.context, said.tensor, said.heldout_texts
        self._files = [File(file=entry) if isinstance(entry, str) else entry for entry in said.files]
        sizes = {entry.file: self._size(entry.file) for entry in self._files}
        total, block = sum(sizes.values()), said.context or 1
        held = max(math.ceil(said.heldout_share * total / block), 1) * block
        self.n_train, self.n_heldout = total // block * block - held, held
        if self.n_train < 1:
            raise self._wrong("manifest.json", f"{total} rows in all leave none for training beside {held} held out")
        self._shards = {"train": self._spans(sizes, 0, self.n_train),
                        "heldout": self._spans(sizes, self.n_train, self.n_train + held)}
        self._memory: Batch | None = None
        self.manifest: dict[str, Any] = {
            "inputs": {"model": said.model, "hook": said.hook}, "hook": said.hook, "d_in": said.d_in,
            "dtype": "float32", "name": self.name, "model": self._model(said)}

    @cached_property
    def measured(self) -> Measured:
        """Mean, scale and hash, by one pass over all rows. Raises RunError for a file that is not what it should be."""
        total, squares, digest = torch.zeros(self.d_in, dtype=torch.float64), 0.0, hashlib.sha256()
        for entry in self._files:
            found = runs.sha256(self._place(entry.file))
            if entry.sha256 is not None and entry.sha256 != found:
                raise self._wrong(entry.file, "its hash is not the manifest's")
            digest.update(found.encode())
        for shard in self._shards["train"]:
            x = self._read(shard).double()
            total += x.sum(0)
            squares += float(x.square().sum())
        if not squares:
            raise self._wrong("manifest.json", "every activation is 0")
        scale = math.sqrt(self.d_in * self.n_train / squares)
        told = f"{self.d_in} {self.context} {self.n_heldout}"
        return Measured((total / self.n_train).float(), scale, params.digest([digest.hexdigest(), told], 24))

    @property
    def mean(self) -> torch.Tensor:
        """(D,) mean of the training rows."""
        return self.measured.mean

    @property
    def scale(self) -> float:
        """x * scale has E|x|^2 = d_in."""
        return self.measured.scale

    @property
    def content_hash(self) -> str:
        """Of the files' bytes and of how they are split."""
        return self.measured.content_hash

    def heldout_blocks(self, limit: int | None = None) -> torch.Tensor:
        """Raises ParameterError: activations alone do not say which tokens they are of."""
        raise ParameterError(f"activations: {self.name} was computed elsewhere and holds no tokens; use a store that "
                             "01_extract wrote")

    train_blocks = heldout_blocks

    def heldout_texts(self) -> list[str]:
        """The documents to evaluate on. Raises ParameterError where the manifest names none."""
        if self._texts is None:
            raise ParameterError(f"activations: {self.path / 'manifest.json'} names no heldout_texts, a file of "
                                 "documents that the model is evaluated on ({\"text\": ...} a line)")
        try:
            lines = self._place(self._texts).read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line)["text"] for line in lines if line.strip()]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._wrong(self._texts, f"not a JSON object with \"text\" in each line: {error}") from None
        if not texts or not all(isinstance(text, str) for text in texts):
            raise self._wrong(self._texts, "no documents in it")
        return texts

    def heldout_sources(self) -> None:
        """Not known: nothing says which rows a text's are."""
        return None

    def train_sources(self) -> None:
        """Not known: nothing says which rows a text's are."""
        return None

    def verify(self) -> None:
        """Read every row. Raises RunError naming the first file that is not what it should be."""
        _ = self.measured
        for shard in self._shards["heldout"]:
            self._read(shard)

    # -- within --------------------------------------------------------------------------------------------------

    def _model(self, said: Manifest) -> dict[str, Any]:
        """The model as ``describe`` knows it; one that is not to be had here is known by its name alone."""
        try:
            info = language_model.describe(said.model)
        except ParameterError:
            return {"identity": f"{said.model} (as the manifest says)", "d_model": said.d_in}
        if info.d_model != said.d_in:
            raise self._wrong("manifest.json", f"d_in: {said.d_in}, but '{said.model}' has width {info.d_model}")
        return info._asdict()

    def _place(self, name: str) -> Path:
        """A file of the folder, and of no other."""
        place = (self.path / name).resolve()
        if not place.is_relative_to(self.path.resolve()):
            raise self._wrong(name, "outside the folder; name files within it")
        if not place.is_file():
            raise self._wrong(name, "not there")
        return place

    def _wrong(self, name: str, why: str) -> runs.RunError:
        return runs.RunError(f"{self.path / name}: {why}")

    def _spans(self, sizes: dict[str, int], start: int, stop: int) -> list[dict]:
        """Pieces of files that hold rows start to stop of all."""
        spans, base = [], 0
        step = max(SPAN // (self.context or 1), 1) * (self.context or 1)
        for name, size in sizes.items():
            first, last = max(start - base, 0), min(stop - base, size)
            spans += [{"file": name, "start": at, "rows": min(at + step, last) - at, "base": base}
                      for at in range(first, last, step)]
            base += size
        return spans

    def _array(self, name: str):
        """A file's rows as (N, D) or (n, context, D), sliced without reading all of it."""
        place = self._place(name)
        try:
            if place.suffix == ".npy":
                return np.load(place, mmap_mode="r", allow_pickle=False)
            if place.suffix == ".safetensors":
                file = safe_open(place, "pt")
                names = sorted(file.keys())
                wanted = self._tensor or (names[0] if len(names) == 1 else None)
                if wanted not in names:
                    raise self._wrong(name, f"tensors {', '.join(names)}; say in manifest.json which one `tensor` is")
                return file.get_slice(wanted)
        except (OSError, ValueError, SafetensorError, EOFError) as error:
            raise self._wrong(name, f"cannot be read as plain numbers ({error})") from None
        raise self._wrong(name, "expected a .safetensors or .npy file")

    def _size(self, name: str) -> int:
        """Rows in a file."""
        array = self._array(name)
        shape = tuple(array.shape if isinstance(array, np.ndarray) else array.get_shape())
        fits = len(shape) == 2 or (len(shape) == 3 and shape[1] == self.context)
        if not fits or shape[-1] != self.d_in:
            blocks = f" or (n, {self.context}, {self.d_in})" if self.context else ""
            raise self._wrong(name, f"expected shape (N, {self.d_in}){blocks}, got {shape}")
        if isinstance(array, np.ndarray) and array.dtype.kind != "f":
            raise self._wrong(name, f"expected floating-point numbers, got {array.dtype}")
        return math.prod(shape[:-1])

    def _read(self, shard: dict) -> torch.Tensor:
        """Rows (n, D) of one piece, float32."""
        array, start, stop = self._array(shard["file"]), shard["start"], shard["start"] + shard["rows"]
        try:
            if len(array.shape if isinstance(array, np.ndarray) else array.get_shape()) == 3:
                first, last = start // self.context, -(-stop // self.context)
                piece = array[first:last]
                start, stop = start - first * self.context, stop - first * self.context
            else:
                piece, start, stop = array[start:stop], 0, stop - start
            x = torch.from_numpy(piece.astype(np.float32)) if isinstance(piece, np.ndarray) else piece.float()
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise self._wrong(shard["file"], f"cannot be read ({error})") from None
        x = x.reshape(-1, self.d_in)[start:stop]
        if not bool(x.isfinite().all()):
            raise self._wrong(shard["file"], "holds numbers that are not finite")
        return x

    def _bytes(self, shard: dict) -> int:
        return shard["rows"] * self.d_in * 4

    def _load(self, split: str, group, limit: int | None = None) -> Batch:
        """As a store's: pieces in one place of memory, at most ``limit`` rows; numbered by where they stand."""
        shards = [self._shards[split][i] for i in group]
        total = sum(shard["rows"] for shard in shards)
        total = total if limit is None else min(limit, total)
        rows = Batch(torch.empty(total, self.d_in), *(torch.empty(total, dtype=torch.int32) for _ in COLUMNS))
        at = 0
        for shard in shards:
            if at >= total:
                break
            end = min(at + shard["rows"], total)
            rows.x[at:end] = self._read(shard)[:end - at]
            number = torch.arange(shard["base"] + shard["start"], shard["base"] + shard["start"] + end - at)
            block = number // (self.context or 1)
            rows.token[at:end], rows.position[at:end] = -1, (number % (self.context or 1)).int()
            rows.document[at:end], rows.block[at:end] = block.int(), block.int()
            at = end
        return rows


def _manifest(file: Path) -> Manifest:
    found = runs.read_json(file)
    if not isinstance(found, dict):
        raise runs.RunError(f"{file}: expected a mapping, got a {type(found).__name__}")
    try:
        said = Manifest(**found)
    except (ValidationError, TypeError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(str(part) for part in fault["loc"])
        raise runs.RunError(f"{file}: {key}: {fault['msg']}{params.nearest(key, Manifest.model_fields)}") from None
    language_model.parse_hook(said.hook)
    return said
