"""How important each latent is: its mean over tokens, of all text and of each corpus apart.

A latent is not chosen by the text that it is judged on: training tokens rank the latents, held-out documents measure
what the ranking is worth. Where a source does not say which corpus its training tokens are of (a stream), every other
held-out document of a corpus ranks, and the rest measure. F latents.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lib import params
from sae_lib.data import activations
from sae_lib.params import ParameterError
from sae_lib.training.measure import passes

RANKED = 32_768
"""Tokens that rank at most."""
WHOLE = "held-out text"
"""Stands for the corpora where they are not known."""


class Importance(NamedTuple):
    """Mean latents, in the model's units, over the tokens of the documents that rank."""

    overall: Tensor
    """(F,) float64, over all tokens."""
    by_corpus: dict[str, Tensor]
    """(F,) float64 by corpus."""
    tokens: dict[str, int]
    """Tokens by corpus."""


class HeldOut(NamedTuple):
    """The documents to measure on, none of which ranks."""

    texts: list[str]
    sources: list[str]
    """The corpus of each."""
    ranked_on: str
    """What ranks the latents, in words."""


def of_run(sae, asked: params.Train) -> tuple[Importance, HeldOut]:
    """The importance of an SAE's latents on its training's source, and the documents to measure on.

    Raises ParameterError where the source holds no text.
    """
    source = activations.source(asked)
    texts, sources, trained = source.heldout_texts(), source.heldout_sources(), source.train_sources()
    if trained is not None and sources is not None:
        rows = min(RANKED, source.n_train)
        batch = next(iter(source.batches(rows, rows)))
        found = _by_document(sae, batch.x, batch.document, trained)
        return found, HeldOut(texts, sources, "training tokens, in a random draw")
    held = source.heldout(RANKED)
    if sources is None:
        found = importance(sae, held.x, torch.zeros(len(held.x), dtype=torch.long), [WHOLE])
        return found, HeldOut(texts, [WHOLE] * len(texts), "held-out rows; which texts they are of is not known")
    rank = ranking_documents(sources)
    chosen = rank[held.document.long()]
    found = _by_document(sae, held.x[chosen], held.document[chosen], sources)
    left = [number for number, ranks in enumerate(rank.tolist()) if not ranks]
    return found, HeldOut([texts[i] for i in left], [sources[i] for i in left], "every other held-out document")


def _by_document(sae, x: Tensor, document: Tensor, sources: list[str]) -> Importance:
    names = list(dict.fromkeys(sources))
    place = torch.tensor([names.index(source) for source in sources])
    return importance(sae, x, place[document.long()], names)


def ranking_documents(sources: list[str]) -> Tensor:
    """(documents,) bool: the first, third, ... document of each corpus ranks; one that is alone is left to measure."""
    seen, several, ranks = Counter(), Counter(sources), []
    for source in sources:
        ranks.append(seen[source] % 2 == 0 and several[source] > 1)
        seen[source] += 1
    return torch.tensor(ranks, dtype=torch.bool)


@torch.no_grad()
def importance(sae, x: Tensor, corpus: Tensor, names: list[str]) -> Importance:
    """Mean latents over ``x`` (N, D), activations as the model gives them, by ``corpus`` (N,), a place in ``names``."""
    sums = torch.zeros(len(names), sae.d_sae, dtype=torch.float64)
    counts = torch.bincount(corpus, minlength=len(names))
    at = 0
    for ctx in passes(sae, x):
        codes = ctx.codes.csr()
        where = corpus[at:at + len(ctx.x)][codes.rows().cpu()] * sae.d_sae + codes.indices.cpu()
        sums.view(-1).index_add_(0, where, codes.values.double().cpu() / sae.input_scale)
        at += len(ctx.x)
    means = sums / counts.clamp_min(1)[:, None]
    return Importance(sums.sum(0) / max(len(x), 1), dict(zip(names, means)), dict(zip(names, counts.tolist())))


def leaning(own: Tensor, other: Tensor) -> Tensor:
    """(F,) how much more each latent is one corpus' than another's: (own + e) / (other + e), of mean latents (F,).

    e is the mean over latents of both: a latent that fired once, and only there, does not lead the ranking.
    """
    small = (own.mean() + other.mean()) / 2
    return (own + small) / (other + small) if small > 0 else torch.ones_like(own)


def most(scores: Tensor, ratio: float) -> Tensor:
    """(F,) bool: the ceil(ratio F) latents of the highest scores (F,), the first of equal ones.

    Raises ParameterError for a ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ParameterError(f"compression_ratios: expected shares of the latents, above 0 and at most 1, got {ratio}")
    count = math.ceil(round(ratio * len(scores), 9))  # 0.07 * 100 is 7.000000000000001
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept
