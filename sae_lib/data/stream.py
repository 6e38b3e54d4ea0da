"""Activations for what does not fit the disk: the model runs while training reads, through a bounded buffer.

The buffer is filled, half of it is drawn in random order and replaced, and so on; text is read again from the start
when it ends. The held-out split and the calibration (mean, scale, norms) are made first and stay in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from sae_lib import params, runs
from sae_lib.data import capture, corpus, language_model
from sae_lib.data.manifest import FORMAT
from sae_lib.data.store import Batch, generator, join, order_of
from sae_lib.params import Extract
from sae_lib.progress import progress

CALIBRATION_TOKENS = 65_536


class Stream:
    """Reads like a Store. Exact and repeatable, but every pass runs the model."""

    reads_ahead = False
    """The model takes the cores that a training step takes."""

    def __init__(self, p: Extract):
        """Load the model, take the held-out split and calibrate. Raises ParameterError as extraction does."""
        self.p, self.name = p, f"stream-{params.activations_name(p)}"
        self.path = runs.home() / "activations" / self.name  # for figures; activations are not written
        self.model = language_model.load(p.model, hook=p.hook, dtype=p.dtype, device=p.device)
        self.d_in = self.model.d_model
        row = self.d_in * self.model.dtype.itemsize + 16
        # Half of what is allowed: mixing copies the buffer.
        self.buffer_rows = max((p.store_buffer_mb << 20) // row // 2, 2 * p.context)
        print(f"{p.tokens:,} tokens of {p.model} at {p.hook}, streamed: nothing on disk, a buffer of "
              f"{self.buffer_rows:,} rows ({self.buffer_rows * row / 1e9:.2f} GB) in memory", flush=True)
        tokenizer, bos = self.model.tokenizer, self.model.bos_id
        held = corpus.streamed_heldout(p, tokenizer, bos)
        sample = corpus.pack_all(corpus.stream(p, tokenizer, "train", min(p.tokens, CALIBRATION_TOKENS)), p, bos,
                                 "train")
        self.median = capture.median_norm(self.model, sample.tokens)
        with progress((len(held.tokens) + len(sample.tokens)) * (p.context - 1), "calibrating", p.mode) as bar:
            self._heldout, kept = self._capture_all(held, bar)
            rows, measured = self._capture_all(sample, bar)
        described = capture.statistics(measured, self.median, p.max_norm_ratio)
        self._held = held
        self.mean, self.scale = torch.tensor(described["mean"]), described["scale"]
        self.n_heldout = len(self._heldout.x)
        blocks = -(-p.tokens // (p.context - 1))
        self.n_train = round(blocks * measured.rows / len(sample.tokens))
        self.content_hash = _hash(self._heldout, rows)
        self.manifest: dict[str, Any] = self._manifest(described, sample, kept)

    def __repr__(self) -> str:
        return f"Stream({self.name!r}, about {self.n_train:,} + {self.n_heldout:,} rows of {self.d_in})"

    def batches(self, batch_size: int, samples: int, *, order: str = "shuffled", seed: int = 0,
                start: int = 0) -> Iterator[Batch]:
        """As Store.batches. ``start`` is exact, but what is skipped is computed all the same."""
        drawn = self._shuffled(seed) if order == "shuffled" else self._captured(seed, order)
        parts, missing, number = [], batch_size, 0
        for rows in drawn:
            at = 0
            while at < len(rows.x) and number < samples // batch_size:
                take = Batch(*(column[at:at + missing] for column in rows))
                parts.append(take)
                at, missing = at + len(take.x), missing - len(take.x)
                if not missing:
                    if number >= start:
                        batch = join(parts)
                        yield batch._replace(x=batch.x.float())
                    parts, missing, number = [], batch_size, number + 1
            if number >= samples // batch_size:
                return

    def heldout(self, limit: int | None = None) -> Batch:
        """The held-out rows in order, or the first ``limit`` of them."""
        rows = Batch(*(column[:limit] for column in self._heldout))
        return rows._replace(x=rows.x.float())

    def heldout_blocks(self, limit: int | None = None) -> torch.Tensor:
        """Token ids (n, context) int64 of held-out blocks, each led by BOS."""
        return torch.from_numpy(self._held.tokens[:limit]).long()

    def heldout_texts(self) -> list[str]:
        """Whole texts of the held-out documents."""
        return list(self._held.texts)

    def heldout_sources(self) -> list[str]:
        """The corpus that each held-out document is of."""
        return list(self._held.sources)

    def train_sources(self) -> None:
        """Not known: training text is read anew in each pass."""
        return None

    # -- within --------------------------------------------------------------------------------------------------

    def _capture_all(self, blocks: corpus.Blocks, bar) -> tuple[Batch, capture.Measured]:
        size, parts, sums = capture.blocks_per_batch(self.model, self.p.context), [], []
        for start in range(0, len(blocks.tokens), size):
            end = min(start + size, len(blocks.tokens))
            batch, measured = capture.capture(self.model, blocks.tokens[start:end], blocks.document[start:end], start,
                                              self.median, self.p.max_norm_ratio)
            parts.append(batch)
            sums.append(measured)
            bar.advance((end - start) * (self.p.context - 1))
        return join(parts), capture.add(sums)

    def _captured(self, seed: int, order: str) -> Iterator[Batch]:
        """Rows of the training text, a model batch at a time, epoch after epoch; empty model batches are left out."""
        size, epoch = capture.blocks_per_batch(self.model, self.p.context), 0
        while True:
            text = corpus.stream(self.p, self.model.tokenizer, "train", self.p.tokens)
            blocks, first = corpus.pack(text, self.p.context, self.model.bos_id), 0
            while several := list(islice(blocks, size)):
                tokens, documents = (np.stack(column) for column in zip(*several))
                rows, _ = capture.capture(self.model, tokens, documents, first, self.median, self.p.max_norm_ratio)
                if len(rows.x):  # in order, blocks are mixed within what the model reads at once
                    yield _take(rows, order_of(rows, order, generator(seed, epoch, first)))
                first += len(several)
            epoch += 1

    def _shuffled(self, seed: int) -> Iterator[Batch]:
        """Half of a full, mixed buffer at a time; the other half is mixed with what comes next."""
        source, held, refill = self._captured(seed, "shuffled"), [], 0
        while True:
            rows = sum(len(part.x) for part in held)
            while rows < self.buffer_rows:
                held.append(next(source))
                rows += len(held[-1].x)
            pool, held = join(held), []
            index = order_of(pool, "shuffled", generator(seed, "refill", refill))
            half, refill = len(index) // 2, refill + 1
            drawn, held = _take(pool, index[:half]), [_take(pool, index[half:])]
            del pool
            yield drawn

    def _manifest(self, described: dict, sample: corpus.Blocks, kept: capture.Measured) -> dict[str, Any]:
        p, model = self.p, self.model
        counts = {"train": described.pop("counts") | corpus.counts(sample) | {"calibration_only": True},
                  "heldout": {name: getattr(kept, name) for name in kept._fields[:4]} | corpus.counts(self._held)}
        return {"format": FORMAT, "store": "stream", "name": self.name, "content_hash": self.content_hash,
                "inputs": {name: getattr(p, name) for name in params.EXTRACT_INPUTS} | {"hook": p.hook},
                "dtype": str(model.dtype).removeprefix("torch."), "d_in": self.d_in, "hook": model.hook,
                "model": language_model.describe(p.model)._asdict() | {"bos_id": model.bos_id},
                "shares": corpus.shares(p), "counts": counts, **described,
                "examples": corpus.examples(sample, model.tokenizer),
                "provenance": runs.provenance(threads=torch.get_num_threads(), device=str(model.device))}


def _take(rows: Batch, index: torch.Tensor) -> Batch:
    return Batch(*(column[index] for column in rows))


def _hash(*batches: Batch) -> str:
    """Of the rows that every pass begins with: held-out and calibration."""
    total = hashlib.sha256()
    for rows in batches:
        for column in rows:
            total.update(column.contiguous().view(torch.uint8).numpy())
    return "stream-" + total.hexdigest()[:24]
