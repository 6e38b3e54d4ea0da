"""SAEBench's ``core`` evaluation of one of our SAEs, on a loaded model and held-out text, without a hub.

Its metrics are SAEBench's own code. Put in place for the length of one evaluation: the model that it loads by name,
and the text that it loads by name. Put right: errors that it logs and swallows are raised, text that runs out is
said instead of silently repeated, and explained variance is ours (its own gives a mean predictor 0.9 and more).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lib import metrics, runs
from sae_lib.evaluation import rerun
from sae_lib.evaluation.reported import settings as reported
from sae_lib.evaluation.saebench import checking, reconstruction
from sae_lib.evaluation.saebench.adapter import check_sae, import_sae_bench, in_place, settings, wrap
from sae_lib.evaluation.saebench.core_blocks import Blocks
from sae_lib.params import ParameterError, digest
from sae_lib.runs import RunError

SEED = 42
"""Order of the held-out documents; SAEBench shuffles what it is given by the same number."""
VARIANCE_ROWS = 32_768
"""Tokens that explained variance is computed on, at most: it holds activations and reconstructions at once."""
NOT_COMPARABLE = ("explained_variance", "mse")
"""Scalars of SAEBench that stay in ``raw`` only: a wrong formula, and one that depends on the batch size."""


class Batches(NamedTuple):
    """How much of the text an evaluation reads."""

    reconstruction: int
    """Batches through the whole model: cross-entropy and KL."""
    sparsity: int
    """Batches up to the hook: L0, density, cosine."""
    rows: int
    """Blocks of ``context`` tokens in a batch."""

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return (self.reconstruction + self.sparsity) * self.rows


PRESETS = {"smoke": Batches(1, 1, 4), "default": Batches(4, 16, 8), "paper": Batches(200, 2000, 16)}


def core(sae, lm, texts: list[str], preset: str = "default", *, context: int = 128,
         output_folder: Path | None = None, threads: int = 0) -> dict[str, Any]:
    """Run SAEBench core on ``sae`` (a SparseAutoencoder for raw activations) in the whole model ``lm`` at ``lm.hook``.

    ``texts`` are held-out documents. Returns eval, metrics (flat; units in ``metrics.METRICS``), config, raw
    (SAEBench's own JSON), intervals "within this SAE", provenance, seconds; written as ``output_folder/core.json`` if
    a folder is given. Where the text is too short for the preset, fewer batches are read, and config.note says so.
    Raises ParameterError for what cannot be evaluated, RunError with SAEBench's own words when it gives no result.
    """
    start = time.perf_counter()
    known = {name: (own, context) for name, own in PRESETS.items()}
    asked, context = reported.chosen(preset, known, "core", lm, _reported)
    _check(sae, lm, context)
    import_sae_bench()
    blocks = _blocks(lm, texts, asked, context)
    batches, available = fit(asked, len(blocks), context), len(blocks)
    blocks = blocks[:batches.blocks]
    with settings(threads), rerun.opened(lm, blocks) as model, tempfile.TemporaryDirectory() as folder:
        wrapped = wrap(sae, lm.name, lm.hook, device=lm.device, dtype=lm.dtype, context=context, seen=Seen(model))
        setup = time.perf_counter() - start
        result, raw = _multiple_evals(wrapped, model, blocks, batches, context, folder)

    x, x_hat, positions = wrapped.seen.rows()
    scalars = {name: value for group in result["metrics"].values() for name, value in group.items()}
    values = {name: value for name, value in scalars.items() if name not in NOT_COMPARABLE}
    values["explained_variance"] = metrics.explained_variance(x, x_hat)
    note = None if batches == asked else (
        f"the held-out text has {available} blocks of {context} tokens, expected {asked.blocks} for '{preset}'")
    config = {
        "preset": preset, "model": lm.name, "model_identity": lm.identity, "hook": lm.hook, "d_in": sae.d_in,
        "d_sae": sae.d_sae, "context": context, "dtype": _dtype(lm), "device": str(lm.device), "seed": SEED,
        **batches._asdict(), "blocks": batches.blocks, "tokens": batches.blocks * context,
        "tokens_evaluated": positions, "explained_variance_tokens": len(x),
        "text_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16], "note": note,
        "special_tokens": "kept as they are, and left out of every mean"}
    provenance = runs.provenance()
    config["comparable"] = digest([provenance["packages"]["sae-bench"],
                                   {key: value for key, value in config.items() if key != "d_sae"}])
    config["not_as_reported"] = reported.differences(preset, "core", raw)
    seconds = time.perf_counter() - start
    report = {"eval": "core", "metrics": values, "config": config, "raw": raw, "provenance": provenance,
              "within_this_sae": wrapped.seen.blocks.within(), "seconds": round(seconds, 2),
              "seconds_setup": round(setup, 2), "model_reused": model.reused}
    if output_folder is not None:
        runs.write_json(Path(output_folder) / "core.json", report)
    return report


def fit(asked: Batches, available: int, context: int) -> Batches:
    """The asked batches, or as many as ``available`` blocks give without reading one twice: a third through the model.

    Raises ParameterError for fewer than two blocks.
    """
    if available >= asked.blocks:
        return asked
    rows = min(asked.rows, available // 2)
    if rows < 1:
        raise ParameterError(f"held-out text: {available} blocks of {context} tokens, at least 2 are needed; "
                             "extract more tokens or shorten `context`")
    total = available // rows
    reconstruction = min(asked.reconstruction, max(1, total // 3))
    return Batches(reconstruction, min(asked.sparsity, total - reconstruction), rows)


def _reported(settings: dict[str, Any]) -> tuple[Batches, int]:
    return Batches(settings["n_eval_reconstruction_batches"], settings["n_eval_sparsity_variance_batches"],
                   settings["batch_size_prompts"]), settings["context_size"]


def _check(sae, lm, context: int) -> None:
    if not lm.whole:
        raise ParameterError(f"model: {lm.name} is loaded up to {lm.hook} only; core needs load(..., whole=True)")
    limit = lm.hf.config.max_position_embeddings
    if not 2 <= context <= limit:
        raise ParameterError(f"context: {context}, but {lm.name} reads 2 to {limit} tokens")
    check_sae(sae, lm.name, lm.d_model)


def _blocks(lm, texts: list[str], wanted: Batches, context: int) -> Tensor:
    return packed(lm, texts, wanted.blocks, context)


def packed(lm, texts: list[str], most: int, context: int) -> Tensor:
    """Token blocks (N, context), each led by BOS, cut as SAEBench cuts text, but never one twice; ``most`` at most.

    Documents are shuffled once by SEED and joined with BOS between them; no more than needed are made.
    """
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    order = random.Random(SEED).sample(range(len(texts)), len(texts))
    encode = lm.tokenizer
    ids = (torch.tensor(encode(texts[i], add_special_tokens=False, verbose=False)["input_ids"]) for i in order)
    cut = concat_and_batch_sequences((t for t in ids if len(t)), context, begin_batch_token_id=lm.bos_id,
                                     sequence_separator_token_id=lm.bos_id)
    blocks = [block for _, block in zip(range(most), cut)]
    return torch.stack(blocks) if blocks else torch.empty(0, context, dtype=torch.long)


def as_read(blocks: Tensor) -> Tensor:
    """Blocks (N, T) in the order in which SAEBench reads them: through the model first, then up to the hook."""
    import datasets

    return blocks[list(datasets.Dataset.from_dict({"place": range(len(blocks))}).shuffle(seed=SEED)["place"])]


def left_out(model) -> Tensor:
    """Ids that SAEBench leaves out of every mean: padding, EOS and BOS of a HookedTransformer's tokenizer."""
    tokenizer = model.tokenizer
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    return torch.tensor(sorted(special), device=model.W_E.device)


def _dtype(lm) -> str:
    return str(lm.dtype).removeprefix("torch.")


class Seen:
    """Activations and reconstructions that an evaluation passes by, special tokens left out, up to VARIANCE_ROWS.

    All of them are told to ``blocks``, which sums by block of text.
    """

    def __init__(self, model):
        self.model = model
        """Knows the tokens (B, T) that it is reading."""
        self.special = left_out(model)
        self.blocks = Blocks()
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.kept = self.positions = 0
        self._x: Tensor | None = None

    def encoded(self, x: Tensor) -> None:
        """Remember the activations (B, T, D) until their reconstruction comes."""
        self._x = x

    def decoded(self, latents: Tensor, x_hat: Tensor) -> None:
        """Keep the pair's rows of ordinary tokens, and their sums."""
        text = ~torch.isin(self.model.tokens, self.special)
        room = max(0, VARIANCE_ROWS - self.kept)
        self.blocks.hook(self._x, latents, x_hat, text)
        if room:
            self.blocks.rows(self._x.float(), x_hat.float(), text, room)
        self.inputs.append(self._x[text][:room].float().cpu())
        self.outputs.append(x_hat[text][:room].float().cpu())
        self.kept += len(self.inputs[-1])
        self.positions += int(text.sum())

    def rows(self) -> tuple[Tensor, Tensor, int]:
        """Activations (N, D), reconstructions (N, D), and how many ordinary tokens were evaluated in all."""
        return torch.cat(self.inputs), torch.cat(self.outputs), self.positions


def _multiple_evals(wrapped, model, blocks: Tensor, batches: Batches, context: int, folder: str):
    """SAEBench's own run on our model and blocks: its result and the JSON that it wrote."""
    import datasets
    from sae_bench.evals.core import main

    class Model:
        @staticmethod
        def from_pretrained_no_processing(*_args, **_options):
            return model

    class Store:
        @staticmethod
        def from_sae(model, sae, context_size, **_options):
            rows = datasets.Dataset.from_dict({"tokens": blocks.tolist()})
            return store.from_sae(model, sae, dataset=rows, context_size=context_size)

    own = main.get_recons_loss
    if reconstruction.applies(model, wrapped.cfg.dtype):
        own = reconstruction.recons_loss(model)
    store, said = main.ActivationsStore, io.StringIO()
    listener = logging.StreamHandler(said)
    main.logger.addHandler(listener)
    try:
        with (in_place(main, HookedTransformer=Model, ActivationsStore=Store,
                       get_recons_loss=wrapped.seen.blocks.recording(own)),
              contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)):
            results = main.multiple_evals(
                [("workbook", wrapped)], batches.reconstruction, batches.sparsity, batches.rows,
                compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
                exclude_special_tokens_from_reconstruction=True, dataset="held-out text", context_size=context,
                output_folder=folder, dtype=wrapped.cfg.dtype, device=str(wrapped.device), force_rerun=True)
    finally:
        main.logger.removeHandler(listener)
    files = sorted(Path(folder).glob("*_eval_results.json"))
    if not results or not files:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        raise RunError("SAEBench core gave no result; it said: " + (" | ".join(lines[-5:]) or "nothing"))
    raw = runs.read_json(files[0])
    checking.configuration("core", raw, {
        "n_eval_reconstruction_batches": batches.reconstruction, "n_eval_sparsity_variance_batches": batches.sparsity,
        "batch_size_prompts": batches.rows, "context_size": context, "llm_dtype": wrapped.cfg.dtype,
        "exclude_special_tokens_from_reconstruction": True})
    raw.pop("sae_bench_commit_hash", None)  # of the working directory, not of SAEBench
    return results[0], raw
