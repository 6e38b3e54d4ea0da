"""Extraction: text and a model give a store of activations, resumable by shard; and the way to find it again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from sae_lib import params, presence, runs
from sae_lib.data import assets, capture, corpus, language_model
from sae_lib.data.language_model import LanguageModel
from sae_lib.data.manifest import FORMAT
from sae_lib.data.store import Batch, Store, join, open_store
from sae_lib.params import Extract, ParameterError, Train
from sae_lib.progress import progress

__all__ = ["Batch", "Store", "extract", "find", "open_store", "source"]


def folder(p: Extract) -> Path:
    """Where the store of these parameters is, or will be."""
    return runs.home() / "activations" / params.activations_name(p)


def extract(p: Extract):
    """The store of these parameters, extracted as far as it is not there yet.

    With ``store: stream`` nothing is written: a calibrated stream comes back. Raises ParameterError naming what
    cannot be used (model, layer, corpus, tokens, store) before the model runs.
    """
    if p.threads:
        torch.set_num_threads(p.threads)
    language_model.check_layer(p.model, p.hook)
    if p.store == "stream":
        from sae_lib.data.stream import Stream

        return Stream(p)
    target = folder(p)
    if not (target / "manifest.json").exists():
        finished = (target / "finished.json").exists()
        if not finished:
            _announce(p, target)
        with presence.alone(target, f"activations/{target.name}", patience=math.inf):
            if not (target / "manifest.json").exists() and not _taken_up(p, target):
                if finished:
                    _announce(p, target)
                _extract(p, target)
    return open_store(target, p.store_buffer_mb)


def find(p: Train) -> Store:
    """The finished store that training reads. Raises ParameterError saying how to get it when it is not there."""
    if p.activations == "auto":
        target = folder(p)
        if not (target / "manifest.json").exists():
            raise ParameterError(f"activations: no finished store {target}; run 01_extract with these parameters "
                                 "(model, layer, corpus, tokens, ...), or set store: stream")
        return open_store(target, p.store_buffer_mb)
    store = open_named(p.activations, p.store_buffer_mb)
    held = store.manifest["inputs"]
    if (held["model"], held["hook"]) != (p.model, p.hook):
        raise ParameterError(f"activations: store {store.name} holds {held['hook']} of '{held['model']}', but the "
                             f"parameters say {p.hook} of '{p.model}'; set model and layer to the store's")
    return store


def open_named(name: str, buffer_mb: int = 2048) -> Store:
    """A store by its name under activations/ or its folder, one of activations computed elsewhere included.

    Raises ParameterError where it is not there, RunError where it is damaged.
    """
    from sae_lib.data import planted, precomputed

    place = planted.place_of(name)
    target = place if place.is_dir() else runs.home() / "activations" / name
    if not (target / "manifest.json").exists():
        raise ParameterError(f"activations: no finished store {target}; name a folder that 01_extract wrote or that "
                             "holds activations computed elsewhere, or auto")
    said = runs.read_json(target / "manifest.json")
    ours = not isinstance(said, dict) or "files" not in said
    return open_store(target, buffer_mb) if ours else precomputed.Precomputed(target, buffer_mb)


def source(p: Train):
    """What training reads: the store found on disk, or a stream for ``store: stream``."""
    if p.store == "stream" and p.activations == "auto":
        return extract(p)
    return find(p)


def heldout_texts(p: Train) -> list[str]:
    """Whole texts of the held-out documents that ``source(p)`` has, without running a model."""
    if p.store == "stream" and p.activations == "auto":
        tokenizer, bos_id = language_model.load_tokenizer(p.model)
        return corpus.streamed_heldout(p, tokenizer, bos_id).texts
    return find(p).heldout_texts()


def heldout_sources(p: Train) -> list[str] | None:
    """The corpus of each of ``heldout_texts(p)``; None where that is not known."""
    if p.store == "stream" and p.activations == "auto":
        tokenizer, bos_id = language_model.load_tokenizer(p.model)
        return corpus.streamed_heldout(p, tokenizer, bos_id).sources
    return find(p).heldout_sources()


# -- extraction --------------------------------------------------------------------------------------------------

def _announce(p: Extract, target: Path) -> None:
    """Say what the store will take; stop when the disk has no room for it."""
    info = language_model.describe(p.model)
    rows = p.tokens + corpus.heldout_budget(p)
    need = rows * (info.d_model * (2 if p.dtype == "bfloat16" else 4) + 16 + 8)
    place = next(parent for parent in target.parents if parent.exists())
    there = sum(f.stat().st_size for f in _partial(target).glob("*")) if _partial(target).exists() else 0
    free = shutil.disk_usage(place).free + there
    most = "at most " if p.dtype == "auto" else ""
    print(f"{rows:,} tokens x {info.d_model} of {p.model} at {p.hook}: {most}{need / 1e9:.2f} GB in "
          f"activations/{target.name} ({free / 1e9:.0f} GB free)", flush=True)
    if need > free:
        raise ParameterError(f"store: {need / 1e9:.1f} GB are needed in {target.parent} and {free / 1e9:.1f} GB are "
                             "free; set store: stream, fewer tokens, or SAE_WORKBOOK_HOME to a larger disk")


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _inputs(p: Extract) -> dict[str, Any]:
    return {name: getattr(p, name) for name in params.EXTRACT_INPUTS} | {"hook": p.hook}


def _extract(p: Extract, target: Path) -> None:
    began = time.perf_counter()
    partial = _partial(target)
    runs.sweep(partial)
    if (partial / "manifest.json").exists() and not (partial / "state.json").exists():
        return _publish(partial, target)  # only its name was left to give
    state = _resume(p, partial)
    if not state:
        assets.begin(name.partition("_")[0] for name in corpus.shares(p))  # while the model is fetched and converted
    model = language_model.load(p.model, hook=p.hook, dtype=state.get("dtype") or p.dtype, device=p.device)
    if not state:
        state = _prepare(p, model, partial)
    arrays = load_file(partial / "blocks.safetensors")
    shards: dict[str, list[dict]] = {}
    work = [(split, i, span) for split in ("heldout", "train")
            for i, span in enumerate(_spans(len(arrays[f"{split}.tokens"]), p))]
    text_tokens = sum(arrays[f"{split}.tokens"].shape[0] for split in ("heldout", "train")) * (p.context - 1)
    with progress(text_tokens, f"extracting {model.hook}", p.mode, "tokens") as bar:
        for split, number, span in work:
            file = partial / f"{split}-{number:05d}.safetensors"
            done = _finished(file)
            if done is None:
                done = _write_shard(p, model, arrays, split, span, state["median_norm"], file, bar)
            else:
                bar.initial += (span[1] - span[0]) * (p.context - 1)
                bar.advance((span[1] - span[0]) * (p.context - 1))
            shards.setdefault(split, []).append(done)
    _finish(p, model, state, shards, partial, time.perf_counter() - began)
    _publish(partial, target)


def _taken_up(p: Extract, target: Path) -> bool:
    """Give a finished store its manifest back, where all else exists and is what was written.

    Snakemake removes its outputs, the manifest among them, before it runs an interrupted job again.
    """
    with contextlib.suppress(runs.RunError, OSError, KeyError, TypeError):
        kept = runs.read_json(target / "finished.json")
        same = (kept["provenance"]["library"], kept["model"]["identity"]) == (
            runs.library_digest(), language_model.describe(p.model).identity)
        if same:
            Store(target, manifest=kept).verify()
            runs.write_json(target / "manifest.json", kept)
            print(f"activations/{target.name}: finished before, every shard as it was written", flush=True)
            return True
    return False


def _publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name; where the name is taken, the manifest, which says finished, moves last."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    for file in sorted(partial.iterdir(), key=lambda f: f.name == "manifest.json"):
        os.replace(file, target / file.name)
    partial.rmdir()


def _spans(blocks: int, p: Extract) -> list[tuple[int, int]]:
    """First and last block of each shard."""
    size = max(p.store_shard_tokens // (p.context - 1), 1)
    return [(start, min(start + size, blocks)) for start in range(0, blocks, size)]


def _resume(p: Extract, partial: Path) -> dict[str, Any]:
    """What an interrupted extraction had settled; empty when there is nothing that can be continued."""
    state = partial / "state.json"
    if not state.exists():
        return {}
    with contextlib.suppress(runs.RunError, OSError, KeyError):
        found = runs.read_json(state)
        same = (found["format"], found["inputs"], found["identity"]) == (
            FORMAT, json.loads(json.dumps(_inputs(p))), language_model.describe(p.model).identity)
        if same and runs.sha256(partial / "blocks.safetensors") == found["blocks_sha256"]:
            return found
    print(f"{partial.name}: left by another version or damaged; starting again", file=sys.stderr, flush=True)
    shutil.rmtree(partial)
    return {}


def _prepare(p: Extract, model: LanguageModel, partial: Path) -> dict[str, Any]:
    """Build the blocks, write them, and settle what all shards share."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = corpus.build(p, model.tokenizer, model.bos_id)
    with runs.whole(partial / "blocks.safetensors") as temporary:
        save_file({"train.tokens": text.train.tokens, "train.document": text.train.document,
                   "train.source": corpus.places(text.train, p),
                   "heldout.tokens": text.heldout.tokens, "heldout.document": text.heldout.document}, temporary)
    lines = (json.dumps({"source": s, "text": t}) for s, t in zip(text.heldout.sources, text.heldout.texts))
    runs.write_text(partial / "heldout.jsonl", "".join(line + "\n" for line in lines))
    state = {"format": FORMAT, "inputs": _inputs(p), "identity": model.identity,
             "dtype": str(model.dtype).removeprefix("torch."), "corpus": text.counts,
             "median_norm": capture.median_norm(model, text.train.tokens),
             "examples": corpus.examples(text.train, model.tokenizer),
             "blocks_sha256": runs.sha256(partial / "blocks.safetensors")}
    runs.write_json(partial / "state.json", state)
    return runs.read_json(partial / "state.json")


def _finished(file: Path) -> dict[str, Any] | None:
    """The record of a shard that exists and is what was written, else None."""
    note = file.with_suffix(".json")
    with contextlib.suppress(runs.RunError, OSError, KeyError, TypeError):
        record = runs.read_json(note)
        if runs.sha256(file) == record["sha256"]:
            return record
    return None


def _write_shard(p: Extract, model: LanguageModel, arrays, split: str, span: tuple[int, int], median: float,
                 file: Path, bar) -> dict[str, Any]:
    began, batches, parts = time.perf_counter(), [], []
    size = capture.blocks_per_batch(model, p.context)
    for start in range(span[0], span[1], size):
        end = min(start + size, span[1])
        batch, measured = capture.capture(model, arrays[f"{split}.tokens"][start:end],
                                          arrays[f"{split}.document"][start:end], start, median, p.max_norm_ratio)
        batches.append(batch)
        parts.append(measured)
        bar.advance((end - start) * (p.context - 1))
    rows = join(batches)
    with runs.whole(file) as temporary:
        save_tensors({name: column.contiguous() for name, column in zip(Batch._fields, rows)}, temporary)
    record = {"file": file.name, "rows": len(rows.x), "sha256": runs.sha256(file),
              "seconds": time.perf_counter() - began, "measured": capture.add(parts)._asdict()}
    runs.write_json(file.with_suffix(".json"), record)
    return record


def _finish(p: Extract, model: LanguageModel, state: dict, shards: dict[str, list[dict]], partial: Path,
            seconds: float) -> None:
    """Write the manifest and take the notes of single shards away."""
    try:
        measured = {split: capture.add([capture.Measured(**s["measured"]) for s in shards[split]]) for split in shards}
    except (KeyError, TypeError, SafetensorError) as error:
        raise runs.RunError(f"{partial}: a shard's note is damaged ({error}); delete the folder and extract "
                            "again") from None
    described = capture.statistics(measured["train"], state["median_norm"], p.max_norm_ratio)
    seen = ("rows", "bos_dropped", "special_dropped", "outliers_dropped")
    counts = {"train": described.pop("counts") | state["corpus"]["train"],
              "heldout": {name: getattr(measured["heldout"], name) for name in seen} | state["corpus"]["heldout"]}
    working = sum(s["seconds"] for split in shards for s in shards[split])
    listed = {split: [{k: s[k] for k in ("file", "rows", "sha256")} for s in shards[split]] for split in shards}
    hashes = [s["sha256"] for split in ("train", "heldout") for s in listed[split]]
    manifest = {"format": FORMAT, "inputs": state["inputs"], "name": params.activations_name(p),
                "content_hash": params.digest(hashes, 24), "dtype": state["dtype"], "d_in": model.d_model,
                "model": language_model.describe(p.model)._asdict() | {"bos_id": model.bos_id}, "hook": model.hook,
                "shares": corpus.shares(p), "counts": counts, **described, "shards": listed,
                "examples": state["examples"], "seconds": {"model": working, "last_session": seconds},
                "tokens_per_second": sum(counts[split]["text_tokens"] for split in counts) / max(working, 1e-9),
                "provenance": runs.provenance(threads=torch.get_num_threads(), device=str(model.device))}
    runs.write_json(partial / "finished.json", manifest)
    runs.write_json(partial / "manifest.json", manifest)
    for note in [*partial.glob("train-*.json"), *partial.glob("heldout-*.json"), partial / "state.json"]:
        note.unlink(missing_ok=True)
