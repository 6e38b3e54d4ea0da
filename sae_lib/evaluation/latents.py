"""What each latent of a run does: written once when training ends, read by every dashboard.

``latents/codes.npz`` holds the latents of some held-out tokens (scipy CSC, a column per latent), ``tokens.parquet``
those tokens, ``latents.parquet`` a row per latent, ``about.json`` what a reader should know. T tokens, F latents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from sae_lib import params, runs
from sae_lib.data import activations, language_model, words
from sae_lib.evaluation.logit_effects import logit_effects
from sae_lib.precision import has_bfloat16
from sae_lib.sae.codes import CSR
from sae_lib.training.coactivation.counting import codes_of
from sae_lib.training.ingredients import load_sae

TOKENS, ENTRIES = 16_384, 4_000_000
"""Held-out tokens that are kept at most, and active entries (fewer tokens of a code that is not sparse)."""
EXAMPLES, EFFECTS = 5, 10


class Latents(NamedTuple):
    """The content of a run's ``latents/``."""

    codes: sparse.csc_matrix
    """(T, F) float32"""
    tokens: pd.DataFrame
    """(T rows) text, document, block, position; no text where activations were computed elsewhere."""
    table: pd.DataFrame
    """One row per latent: density, mean, largest, tokens, nearest by decoder cosine, raised and lowered tokens."""
    notes: list[str]
    """What is not known, and why."""


def record(run: runs.Run, source=None) -> Latents:
    """Encode held-out tokens with the run's SAE and write ``latents/``; ``source`` as training had it, or found again.

    Not an error: a model that cannot be loaded here, which leaves the logits' effects out with a note. Raises RunError
    or ParameterError where the SAE or its activations cannot be read.
    """
    found = _measure(run, source)
    with runs.whole(run.path / "latents") as temporary:
        temporary.mkdir()
        sparse.save_npz(temporary / "codes.npz", found.codes)
        found.tokens.to_parquet(temporary / "tokens.parquet", index=False)
        found.table.to_parquet(temporary / "latents.parquet", index=False)
        runs.write_json(temporary / "about.json", {"tokens": len(found.tokens), "notes": found.notes})
    return found


def read(run: runs.Run) -> Latents:
    """What ``record`` wrote; made now, and not kept, for a run of before. Raises RunError where it cannot be had."""
    folder = run.path / "latents"
    if not (folder / "about.json").exists():
        return _now(run)
    try:
        notes = list(runs.read_json(folder / "about.json")["notes"])
        found = Latents(sparse.csc_matrix(sparse.load_npz(folder / "codes.npz")),
                        runs.read_table(folder / "tokens.parquet"), runs.read_table(folder / "latents.parquet"), notes)
        if found.codes.shape != (len(found.tokens), len(found.table)):
            raise ValueError(f"codes of {found.codes.shape}, {len(found.tokens)} tokens, {len(found.table)} latents")
        return found
    except (runs.RunError, OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise runs.RunError(f"{folder}: damaged ({error}); run 02_train_variant again") from None


def _now(run: runs.Run) -> Latents:
    if not run.finished:
        raise runs.RunError(f"run '{run.name}': no SAE in {run.path}; run 02_train_variant first")
    found = _measure(run)
    return found._replace(notes=[*found.notes, "computed now: the run keeps no latents/"])


def _measure(run: runs.Run, source=None) -> Latents:
    p = params.check("train", {k: v for k, v in run.params.items() if k in params.Train.model_fields}, "params.yaml")
    sae = load_sae(run.path / "sae")
    rows, codes = _codes(sae, source or activations.source(p))
    held = _columns(codes)
    model, fault = _model(p)
    text, notes = _texts(rows, p, model)
    tokens = pd.DataFrame({"text": text, "document": rows.document.numpy(), "block": rows.block.numpy(),
                           "position": rows.position.numpy()})
    table = summary(held, tokens.text).assign(**nearest(sae.W_dec))
    if fault:
        notes.append(f"no effects on logits: {fault}")
    return Latents(held, tokens, _with_effects(table, sae, model), notes)


def _model(p: params.Train):
    """The whole language model, or None and what is wrong."""
    try:
        fast = "bfloat16" if has_bfloat16(language_model.pick_device(p.device).type) else "float32"
        return language_model.load(p.model, hook=p.hook, dtype=fast if p.dtype == "auto" else p.dtype,
                                   device=p.device, whole=True), None
    except params.ParameterError as error:
        return None, error


def _codes(sae, source):
    """Held-out rows and their codes, of as many tokens as ENTRIES allows."""
    rows = source.heldout(TOKENS)
    first = codes_of(sae, rows.x[:1024])
    density = max(first.l0(), 1.0)
    kept = max(256, min(len(rows.x), int(ENTRIES / density)))
    rows = type(rows)(*(column[:kept] for column in rows))
    return rows, codes_of(sae, rows.x)


def _columns(codes: CSR) -> sparse.csc_matrix:
    """(T, F) codes by latent, values that are not finite left out."""
    values = codes.values.float().numpy()
    matrix = sparse.csr_matrix((np.where(np.isfinite(values), values, 0), codes.indices.numpy().astype(np.int32),
                                codes.offsets.numpy()), shape=(len(codes.offsets) - 1, codes.n_latents))
    matrix.eliminate_zeros()
    return matrix.tocsc()


def _texts(rows, p: params.Train, model) -> tuple[list[str], list[str]]:
    """The text of each token, and a note where it is not known. A ``model`` has its tokenizer with it."""
    ids = rows.token.tolist()
    if not ids or min(ids) < 0:
        return [""] * len(ids), ["activations computed elsewhere hold no text"]
    try:
        tokenizer = model.tokenizer if model else language_model.load_tokenizer(p.model)[0]
    except params.ParameterError as error:
        return [""] * len(ids), [f"no text: {error}"]
    known = words.texts(tokenizer, ids)
    return [known[token] for token in ids], []


def summary(codes: sparse.csc_matrix, text: pd.Series) -> pd.DataFrame:
    """One row per latent of (T, F) codes: density, mean and largest activation where active, tokens that excite it."""
    n_tokens, n_latents = codes.shape
    firings = np.diff(codes.indptr)
    total, most = np.asarray(codes.sum(0)).ravel(), codes.max(0).toarray().ravel() if codes.nnz else np.zeros(n_latents)
    texts, examples = text.to_numpy(), []
    for start, end in zip(codes.indptr[:-1], codes.indptr[1:]):
        strongest = codes.indices[start:end][np.argsort(-codes.data[start:end], kind="stable")[:4 * EXAMPLES]]
        examples.append(list(dict.fromkeys(texts[strongest]))[:EXAMPLES])
    return pd.DataFrame({"latent": np.arange(n_latents), "density": firings / max(n_tokens, 1), "firings": firings,
                         "mean": np.where(firings, total / np.maximum(firings, 1), np.nan), "largest": most,
                         "tokens": examples})


def nearest(rows: torch.Tensor) -> dict[str, np.ndarray]:
    """For each of the decoder ``rows`` (F, D), the other row of the largest |cosine|, and the cosine."""
    unit = torch.nn.functional.normalize(torch.nan_to_num(rows.detach().float()), dim=1)
    found, cosines = [], []
    for start in range(0, len(unit), 1024):
        block = unit[start:start + 1024] @ unit.T
        own = torch.arange(len(block))
        block[own, start + own] = 0
        best = block.abs().argmax(1)
        found.append(best)
        cosines.append(block[own, best])
    return {"nearest": torch.cat(found).cpu().numpy(), "nearest_cosine": torch.cat(cosines).cpu().numpy()}


def _with_effects(table: pd.DataFrame, sae, model) -> pd.DataFrame:
    """The table with the tokens that each latent raises and lowers; none where there is no model."""
    if model is None:
        empty = pd.Series([[]] * len(table))
        return table.assign(**dict.fromkeys(("raised", "raised_by", "lowered", "lowered_by"), empty))
    effects = logit_effects(sae.W_dec, model, EFFECTS)
    text = words.texts(model.tokenizer, torch.cat([effects.raised, effects.lowered]).flatten().tolist())
    said = {name: [[text[token] for token in row] for row in getattr(effects, name).tolist()]
            for name in ("raised", "lowered")}
    return table.assign(**said, raised_by=effects.raised_by.tolist(), lowered_by=effects.lowered_by.tolist())


# -- reading -----------------------------------------------------------------------------------------------------

class Context(NamedTuple):
    """A stretch of text around a token on which a latent is active."""

    texts: list[str]
    strengths: list[float]
    """The latent on each token, 0 where it is silent."""
    at: int
    """Place of the token itself."""
    strength: float


def contexts(latents: Latents, latent: int, count: int = 10, spread: bool = False, around: int = 12) -> list[Context]:
    """The strongest contexts of a latent, or (``spread``) contexts over the range of its activations.

    Of tokens nearer than ``around`` in one block only the first, the strongest, is shown.
    """
    codes, tokens = latents.codes, latents.tokens
    own = slice(codes.indptr[latent], codes.indptr[latent + 1])
    places, values = codes.indices[own], codes.data[own]
    column = np.zeros(codes.shape[0], np.float32)
    column[places] = values
    ranked = places[np.argsort(-values, kind="stable")]
    if spread and len(ranked) > count:
        ranked = ranked[np.linspace(0, len(ranked) - 1, 4 * count).astype(int)]
    block, text = tokens.block.to_numpy(), tokens.text.to_numpy()
    found, taken = [], []
    for place in ranked:
        if any(block[place] == block[other] and abs(place - other) < around for other in taken):
            continue
        taken.append(place)
        low, high = max(0, place - around), min(len(block), place + around + 1)
        near = [i for i in range(low, high) if block[i] == block[place]]
        found.append(Context([text[i] for i in near], [float(column[i]) for i in near], near.index(place),
                             float(column[place])))
        if len(found) == count and not spread:
            break
    if spread:
        found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, count).astype(int))] if found else []
    return found

