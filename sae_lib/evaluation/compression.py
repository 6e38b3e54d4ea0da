"""Quality against the share of latents kept, of one trained SAE: the compression curve, and localization.

The curve keeps the ceil(r F) latents of the largest mean; localization those that are most one corpus' own beside
another's, and measures both corpora: what the latents kept know of the one and not of the other. The mask comes after
the code (``sae.kept``), the decoder stays as it is. Measured are explained variance, L0 and the loss recovered, on
held-out documents that took no part in the ranking (``importance``).
"""

from __future__ import annotations

import hashlib
import itertools
import time
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lib import intervals, params, runs
from sae_lib.data import corpus
from sae_lib.evaluation import importance, masked_passes, validity
from sae_lib.evaluation.importance import Importance
from sae_lib.evaluation.saebench import packed
from sae_lib.evaluation.saebench.adapter import check_sae
from sae_lib.params import ParameterError, digest

TOKENS = 8192
"""Tokens in blocks that the model reads for each mask, all corpora together."""
FEWEST_BLOCKS = 2
FILE, RANKING = "compression.json", "compression_importance.safetensors"


class Text(NamedTuple):
    """What is measured on."""

    blocks: Tensor
    """(N, context) token ids, each block of one corpus and led by BOS."""
    corpora: list[str]
    """The corpus of each block."""


class Ranking(NamedTuple):
    """An order of the latents, and the corpora that its masks are measured on."""

    name: tuple[str, ...]
    """("overall",), or (own, other) for a localization."""
    scores: Tensor
    """(F,)"""
    corpora: tuple[str, ...]


def compression(p: params.Evaluate, run: runs.Run, asked: params.Train, sae, lm) -> dict[str, Any]:
    """The content of evals/compression.json: the run's SAE with each of ``p.compression_ratios`` of its latents.

    ``lm`` is the whole model. Importances go to evals/compression_importance.safetensors. Of a run that is not valid
    the figures stand under ``raw`` alone, with the reason. Raises ParameterError where there is too little text.
    """
    start = time.perf_counter()
    check_sae(sae, lm.name, lm.d_model)
    found, held = importance.of_run(sae, asked)
    with runs.whole(run.path / "evals" / RANKING) as temporary:
        save_file({"overall": found.overall, **{f"corpus.{name}": part for name, part in found.by_corpus.items()}},
                  temporary)
    shares = corpus.shares(asked)
    text, notes = text_of(lm, held, shares, asked.context)
    own = [name for name in shares if name != corpus.SPELLING and name in text.corpora and found.tokens.get(name)]
    measured = measure(sae, lm, text, found, p.compression_ratios, own, threads=p.threads, mode=p.mode)
    config = {
        "ratios": p.compression_ratios, "model": lm.name, "model_identity": lm.identity, "hook": lm.hook,
        "d_in": sae.d_in, "d_sae": sae.d_sae, "context": asked.context, "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device), "blocks": {name: text.corpora.count(name) for name in dict.fromkeys(text.corpora)},
        "ranked_on": held.ranked_on, "ranked_on_tokens": found.tokens, "notes": notes,
        "text_sha256": hashlib.sha256(text.blocks.numpy().tobytes()).hexdigest()[:16],
        "interval": f"bootstrap over blocks of text, {intervals.LEVEL:.0%}: within this SAE"}
    config["comparable"] = digest({key: value for key, value in config.items() if key != "d_sae"})
    report = {"eval": "compression", **measured, "config": config, "provenance": runs.provenance(seed=asked.seed),
              "seconds": round(time.perf_counter() - start, 2)}
    return marked(report, validity.update(run))


def marked(report: dict[str, Any], verdict: validity.Verdict) -> dict[str, Any]:
    """The report with its run's status; figures that are no result move to ``raw``, with the reason."""
    why = "; ".join(verdict.reasons) if verdict.status == "invalid" else None
    report = report | {"status": verdict.status, "not_a_result": why}
    if why:
        figures = [key for key in ("curve", "by_corpus", "localization", "by_ratio", "points") if key in report]
        report |= {"raw": {"not_a_result": why} | {key: report[key] for key in figures}}
        report |= {key: type(report[key])() for key in figures}
    return report


def text_of(lm, held: importance.HeldOut, shares: dict[str, float], context: int) -> tuple[Text, list[str]]:
    """Blocks of each corpus, in its share of TOKENS; a note for one that gives fewer, or none.

    Raises ParameterError where no corpus fills two blocks.
    """
    parts, names, notes = [], [], []
    for name in dict.fromkeys(held.sources):
        wanted = max(FEWEST_BLOCKS, round(shares.get(name, 1.0) * TOKENS / context))
        texts = [text for text, source in zip(held.texts, held.sources) if source == name]
        blocks = packed(lm, texts, wanted, context)
        if len(blocks) < wanted:
            few = len(blocks) < FEWEST_BLOCKS
            notes.append(f"{name}: held-out documents fill {len(blocks)} blocks of {context} tokens, "
                         f"expected {wanted}" + ("; left out" if few else ""))
            if few:
                continue
        parts.append(blocks)
        names += [name] * len(blocks)
    if not parts:
        raise ParameterError(f"compression_ratios: {'; '.join(notes) or 'no held-out document is left to measure'}; "
                             "extract more tokens")
    return Text(torch.cat(parts), names), notes


def rankings(found: Importance, corpora: list[str], every: list[str]) -> list[Ranking]:
    """By mean latent, for all corpora; for each ordered pair of ``corpora``, by how much more it is the first one's."""
    pairs = itertools.permutations(corpora, 2)
    return [Ranking(("overall",), found.overall, tuple(every)),
            *(Ranking(pair, importance.leaning(*(found.by_corpus[name] for name in pair)), pair) for pair in pairs)]


def measure(sae, lm, text: Text, found: Importance, ratios: list[float], corpora: list[str], *, threads: int = 0,
            mode: str = "batch") -> dict[str, Any]:
    """The figures of compression.json: ``curve``, ``by_corpus``, ``localization``, a row a ratio.

    ``corpora`` are compared in pairs. A row has ratio, kept, explained_variance, loss_recovered, l0, and an
    ``interval`` of the first two. Where two masks are the same latents the model runs once.
    """
    every = list(dict.fromkeys(text.corpora))
    asked = [(ranking, ratio, importance.most(ranking.scores, ratio))
             for ranking in rankings(found, corpora, every) for ratio in ratios]
    masks, wanted = {}, {}
    for ranking, _, kept in asked:
        key = kept.numpy().tobytes()
        masks[key] = kept
        wanted[key] = wanted.get(key, set()) | set(ranking.corpora)
    sums = masked_passes.run(sae, lm, text.blocks, text.corpora, [(kept, wanted[key]) for key, kept in masks.items()],
                             threads=threads, mode=mode)
    places = {key: number for number, key in enumerate(masks)}

    def rows(ranking: Ranking, on: tuple[str, ...]) -> list[dict[str, Any]]:
        chosen = [name in on for name in text.corpora]
        return [{"ratio": ratio, "kept": int(kept.sum())} | sums.figures(places[kept.numpy().tobytes()], chosen)
                for of, ratio, kept in asked if of is ranking]

    named = {ranking.name: ranking for ranking, _, _ in asked}
    overall = named.pop(("overall",), None)
    curve = rows(overall, tuple(every)) if overall else []
    by_corpus = {name: rows(overall, (name,)) for name in every} if overall else {}
    local = [{"kept_for": own, "against": other, "on": {name: rows(ranking, (name,)) for name in (own, other)}}
             for (own, other), ranking in named.items()]
    return {"curve": curve, "by_corpus": by_corpus, "localization": local}
