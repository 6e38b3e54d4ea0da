"""Reading a store of activations: shuffled or in order, from memory where it fits, by groups of shards where not.

A store is a folder: ``manifest.json``, ``blocks.safetensors`` (token blocks of both splits), ``heldout.jsonl`` (texts
of the held-out documents), and shards ``train-00000.safetensors``, ``heldout-00000.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sae_lib import params, runs
from sae_lib.data.manifest import told_by

COLUMNS = ("token", "document", "block", "position")


class Batch(NamedTuple):
    """Rows of a store."""

    x: torch.Tensor
    """(B, D) float32 activations as the model gave them (unscaled)."""
    token: torch.Tensor
    """(B,) int32 token ids."""
    document: torch.Tensor
    """(B,) int32 document numbers within the split."""
    block: torch.Tensor
    """(B,) int32 block numbers within the split."""
    position: torch.Tensor
    """(B,) int32 position within the block; BOS is 0 and not kept."""


def select(rows: Batch, index: torch.Tensor) -> Batch:
    """The rows of an index (B,), in its order; x becomes float32."""
    x, *columns = (column.index_select(0, index) for column in rows)
    return Batch(x.float(), *columns)


def join(parts: list[Batch]) -> Batch:
    """Batches after one another."""
    return parts[0] if len(parts) == 1 else Batch(*(torch.cat(column) for column in zip(*parts)))


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on nothing but the key."""
    return torch.Generator().manual_seed(int(params.digest([str(part) for part in key], 15), 16))


def order_of(rows: Batch, order: str, draw: torch.Generator) -> torch.Tensor:
    """A random order of rows: of each row, or of whole blocks with their rows in sequence."""
    if order == "shuffled":
        return torch.randperm(len(rows.x), generator=draw)
    _, lengths = torch.unique_consecutive(rows.block, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    mixed = torch.randperm(len(lengths), generator=draw)
    starts, lengths = starts[mixed], lengths[mixed]
    within = torch.arange(len(rows.x)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within


class Store:
    """A finished store of activations."""

    reads_ahead = True
    """Gathering a batch takes little of a core: it can be done while the one before is trained on."""

    def __init__(self, path: Path, buffer_mb: int = 2048, manifest: dict | None = None):
        """Open a folder. Raises RunError naming what is missing or damaged; shards are hashed when first read."""
        self.path, self.buffer_mb = Path(path), buffer_mb
        self.manifest = runs.read_json(self.path / "manifest.json") if manifest is None else manifest
        told = told_by(self.manifest, self.path / "manifest.json")
        self._shards = told.shards.model_dump()
        self.content_hash, self.d_in, self.scale = told.content_hash, told.d_in, told.scale
        self.mean = torch.tensor(told.mean, dtype=torch.float32)
        """(D,) of the training rows."""
        self.n_train, self.n_heldout = (sum(s["rows"] for s in self._shards[k]) for k in ("train", "heldout"))
        for shard in (*self._shards["train"], *self._shards["heldout"]):
            if not (self.path / shard["file"]).is_file():
                raise self._damaged(shard["file"], "missing")
        self._checked: set[str] = set()
        self._memory: Batch | None = None

    def __repr__(self) -> str:
        return f"Store({self.name!r}, {self.n_train:,} + {self.n_heldout:,} rows of {self.d_in})"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def batches(self, batch_size: int, samples: int, *, order: str = "shuffled", seed: int = 0,
                start: int = 0) -> Iterator[Batch]:
        """``samples // batch_size`` batches of exactly ``batch_size`` rows, from batch ``start`` on.

        Epochs are reshuffled and follow on without a break; the same seed gives the same batches. A store larger
        than the buffer is shuffled within groups of shards that fill it, the groups' shards being drawn anew.
        """
        if not self.n_train:
            raise runs.RunError(f"store '{self.name}' holds no training rows")
        parts, missing = [], batch_size
        left = samples // batch_size - start
        for rows, index in self._pieces(order, seed, start * batch_size):
            at = 0
            while left > 0 and at < len(index):
                take = index[at:at + missing]
                parts.append(select(rows, take))
                at, missing = at + len(take), missing - len(take)
                if not missing:
                    yield join(parts)
                    parts, missing, left = [], batch_size, left - 1
            if left <= 0:
                return

    def heldout(self, limit: int | None = None) -> Batch:
        """The held-out rows in order, or the first ``limit`` of them."""
        rows = self._load("heldout", range(len(self._shards["heldout"])), limit)
        return rows._replace(x=rows.x.float())

    def heldout_blocks(self, limit: int | None = None) -> torch.Tensor:
        """Token ids (n, context) int64 of held-out blocks, each led by BOS."""
        return self._blocks("heldout.tokens")[:limit].long()

    def train_blocks(self, limit: int | None = None) -> torch.Tensor:
        """Token ids (n, context) int64 of training blocks, each led by BOS."""
        return self._blocks("train.tokens")[:limit].long()

    def heldout_texts(self) -> list[str]:
        """Whole texts of the held-out documents."""
        try:
            return [document["text"] for document in self._documents()]
        except (KeyError, TypeError) as error:
            raise self._damaged("heldout.jsonl", str(error)) from None

    def heldout_sources(self) -> list[str] | None:
        """The corpus that each held-out document is of; None where that is not known."""
        try:
            return [document["source"] for document in self._documents()]
        except (KeyError, TypeError):
            return None

    def train_sources(self) -> list[str] | None:
        """The corpus that each training document is of; None for a store that was written before this was kept."""
        names = list(self.manifest.get("shares", {}))
        with self._opened("blocks.safetensors") as file:
            known = "train.source" in set(file.keys())
        try:
            return [names[place] for place in self._blocks("train.source").tolist()] if known else None
        except IndexError:
            raise self._damaged("blocks.safetensors", "a source that the manifest does not have") from None

    def verify(self) -> None:
        """Hash every shard. Raises RunError naming the first that is not what was written."""
        for shard in (*self._shards["train"], *self._shards["heldout"]):
            self._check(shard)

    # -- within --------------------------------------------------------------------------------------------------

    def _pieces(self, order: str, seed: int, skip: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Rows in memory and the order to take them in, epoch after epoch, without the first ``skip`` rows."""
        epoch, skip = divmod(skip, self.n_train)
        while True:
            for number, group in enumerate(self._groups(epoch, seed)):
                rows = sum(self._shards["train"][i]["rows"] for i in group)
                if skip >= rows:
                    skip -= rows
                    continue
                held = self._hold(group)
                yield held, order_of(held, order, generator(seed, epoch, number))[skip:]
                skip = 0
            epoch += 1

    def _groups(self, epoch: int, seed: int) -> list[list[int]]:
        """Shards drawn together, as many as the buffer holds; all in one where the store fits."""
        shards = self._shards["train"]
        size = sum(self._bytes(shard) for shard in shards)
        groups = min(-(-size // (self.buffer_mb << 20)), len(shards))
        if groups <= 1:
            return [list(range(len(shards)))]
        drawn = torch.randperm(len(shards), generator=generator(seed, epoch, "shards")).numpy()
        return [sorted(part.tolist()) for part in np.array_split(drawn, groups)]

    def _bytes(self, shard: dict) -> int:
        return (self.path / shard["file"]).stat().st_size

    def _hold(self, group: list[int]) -> Batch:
        if len(group) < len(self._shards["train"]):
            return self._load("train", group)
        if self._memory is None:
            self._memory = self._load("train", group)
        return self._memory

    def _load(self, split: str, group, limit: int | None = None) -> Batch:
        """Copy shards into one contiguous piece of memory, at most ``limit`` rows."""
        shards = [self._shards[split][i] for i in group]
        total = sum(shard["rows"] for shard in shards)
        total = total if limit is None else min(limit, total)
        dtype, at = getattr(torch, self.manifest["dtype"]), 0
        for shard in shards:  # before memory is asked for
            if at < total:
                self._check(shard)
                if shard["rows"] * self.d_in * dtype.itemsize > self._bytes(shard):
                    raise self._damaged(shard["file"], f"too short for the manifest's {shard['rows']} rows")
            at += shard["rows"]
        rows = Batch(torch.empty(total, self.d_in, dtype=dtype), *(torch.empty(total, dtype=torch.int32)
                                                                   for _ in COLUMNS))
        at = 0
        for shard in shards:
            if at >= total:
                break
            end = min(at + shard["rows"], total)
            try:
                with self._opened(shard["file"]) as file:
                    for name, column in zip(Batch._fields, rows):
                        column[at:end] = file.get_tensor(name)[:end - at]
            except (SafetensorError, RuntimeError) as error:
                raise error if isinstance(error, runs.RunError) else self._damaged(shard["file"], str(error)) from None
            at = end
        return rows

    def _documents(self) -> list[dict]:
        try:
            lines = (self.path / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines if line]
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged("heldout.jsonl", str(error)) from None

    def _blocks(self, name: str) -> torch.Tensor:
        try:
            with self._opened("blocks.safetensors") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged("blocks.safetensors", str(error)) from None

    def _opened(self, name: str):
        try:
            return safe_open(self.path / name, "pt")
        except (SafetensorError, OSError) as error:
            raise self._damaged(name, str(error)) from None

    def _check(self, shard: dict) -> None:
        if shard["file"] not in self._checked:
            if runs.sha256(self.path / shard["file"]) != shard["sha256"]:
                raise self._damaged(shard["file"], "its hash is not the manifest's")
            self._checked.add(shard["file"])

    def _damaged(self, name: str, why: str) -> runs.RunError:
        return runs.RunError(f"{self.path / name}: damaged ({why}); delete the folder {self.path.name} and run "
                             "01_extract again")


def open_store(path: Path | str, buffer_mb: int = 2048) -> Store:
    """Open a store's folder; ``buffer_mb`` MiB of memory are used to shuffle. Raises RunError when it is damaged."""
    return Store(Path(path), buffer_mb)
