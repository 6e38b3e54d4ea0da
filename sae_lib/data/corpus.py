"""Documents to packed blocks of tokens: a mixture of sources, BOS before every block, training and held-out apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from sae_lib.data import sources, words
from sae_lib.params import Extract, ParameterError

SPELLING = "spelling"
HELDOUT_SHARE = 20
"""One document in twenty is held out."""
LEAST_HELDOUT, MOST_STREAMED_HELDOUT = 2048, 65_536


class Document(NamedTuple):
    """A document as it enters the blocks: possibly cut where its source's share is full."""

    source: str
    text: str
    ids: list[int]
    """Its tokens, and EOS where the tokenizer has one."""


class Blocks(NamedTuple):
    """Packed blocks of one split."""

    tokens: np.ndarray
    """(N, context) int32; the first of each block is BOS."""
    document: np.ndarray
    """(N, context) int32: which document a token is of; -1 at BOS."""
    sources: list[str]
    """Source of each document."""
    texts: list[str]
    """Whole text of each document (held-out split only)."""


class Corpus(NamedTuple):
    """Both splits and what they are made of."""

    train: Blocks
    heldout: Blocks
    counts: dict[str, Any]
    """Text tokens and documents per split and source."""


def shares(p: Extract) -> dict[str, float]:
    """Share of the tokens per source, adding up to 1, first-letter prompts included."""
    weights = {p.corpus: 1.0} if isinstance(p.corpus, str) else p.corpus
    total = sum(weights.values())
    mixed = {name: weight / total * (1 - p.spelling_share) for name, weight in weights.items()}
    return mixed | ({SPELLING: p.spelling_share} if p.spelling_share else {})


def is_heldout(text: str) -> bool:
    """Whether a document is held out: by a hash of its text, so that a copy of it goes the same way."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def heldout_budget(p: Extract) -> int:
    """Tokens wanted for the held-out split."""
    return max(p.tokens // HELDOUT_SHARE, LEAST_HELDOUT)


def build(p: Extract, tokenizer, bos_id: int) -> Corpus:
    """Both splits as packed blocks.

    Raises ParameterError naming ``corpus`` and ``tokens`` when there is too little text.
    """
    train = pack_all(stream(p, tokenizer, "train", p.tokens), p, bos_id, "train")
    heldout = pack_all(stream(p, tokenizer, "heldout", heldout_budget(p)), p, bos_id, "heldout")
    return Corpus(train, heldout, {"train": counts(train), "heldout": counts(heldout)})


def stream(p: Extract, tokenizer, split: str, tokens: int) -> Iterator[Document]:
    """Documents of one split, mixed by share, ``tokens`` in all (rounded up to whole blocks).

    The source that is furthest behind its share comes next. When one runs out, training is an error naming what
    there is, and the held-out split ends with what it has.
    """
    room = p.context - 1
    tokens = -(-tokens // room) * room
    mixed = shares(p)
    quota = {name: round(share * tokens) for name, share in mixed.items()}
    quota[next(iter(quota))] += tokens - sum(quota.values())
    readers = {name: _tokenized(name, p, tokenizer, split) for name in mixed}
    got = dict.fromkeys(mixed, 0)
    while any(got[name] < quota[name] for name in mixed):
        name = min((n for n in mixed if got[n] < quota[n]), key=lambda n: got[n] / mixed[n])
        document = next(readers[name], None)
        if document is None:
            if split == "heldout":
                return
            _too_little(p, name, got[name], quota[name], mixed[name])
        ids = document.ids[:quota[name] - got[name]]
        got[name] += len(ids)
        yield document._replace(ids=ids)


def _tokenized(name: str, p: Extract, tokenizer, split: str) -> Iterator[Document]:
    texts = (words.prompt_documents(tokenizer, p.corpus_seed) if name == SPELLING else sources.documents(name, p))
    texts = (text for text in texts if is_heldout(text) == (split == "heldout"))
    ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    while batch := list(islice(texts, 32)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(batch, encoded):
            if ids:
                yield Document(name, text, ids + ending)


def _too_little(p: Extract, name: str, got: int, wanted: int, share: float) -> None:
    if not got:
        raise ParameterError(f"corpus: '{name}' holds no text for training")
    room = p.context - 1
    fits = max(int(got / share) // room * room, 0)
    raise ParameterError(f"tokens: corpus '{name}' holds {got:,} training tokens, but {wanted:,} are needed "
                         f"({share:.0%} of tokens: {p.tokens:,}); use tokens: {fits} or less, or more text")


def pack(documents: Iterator[Document], context: int, bos_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks one by one: token ids (context,) led by BOS, and document numbers (context,), -1 at BOS.

    What is left at the end and does not fill a block is dropped.
    """
    room, ids, numbers = context - 1, [], []
    for number, document in enumerate(documents):
        ids += document.ids
        numbers += [number] * len(document.ids)
        while len(ids) >= room:
            yield (np.array([bos_id, *ids[:room]], dtype=np.int32), np.array([-1, *numbers[:room]], dtype=np.int32))
            del ids[:room], numbers[:room]


def streamed_heldout(p: Extract, tokenizer, bos_id: int) -> Blocks:
    """The held-out split of a stream, which stays in memory and is bounded therefore."""
    budget = min(heldout_budget(p), MOST_STREAMED_HELDOUT)
    return pack_all(stream(p, tokenizer, "heldout", budget), p, bos_id, "heldout")


def pack_all(documents: Iterator[Document], p: Extract, bos_id: int, split: str) -> Blocks:
    """All blocks of a split. Raises ParameterError naming ``corpus`` when they do not fill one."""
    seen, texts = [], []

    def noted() -> Iterator[Document]:
        for document in documents:
            seen.append(document.source)
            if split == "heldout":
                texts.append(document.text)
            yield document

    packed = list(pack(noted(), p.context, bos_id))
    if not packed:
        which = f"held-out documents (one in {HELDOUT_SHARE})" if split == "heldout" else "documents"
        raise ParameterError(f"corpus: the {which} of {', '.join(repr(name) for name in shares(p))} do not fill one "
                             f"block of {p.context} tokens; give more, or shorter, documents, or a smaller context")
    tokens, numbers = (np.stack(column) for column in zip(*packed))
    return Blocks(tokens, numbers, seen, texts)


def places(blocks: Blocks, p: Extract) -> np.ndarray:
    """(documents,) int32: the place of each document's source among ``shares(p)``."""
    order = {name: place for place, name in enumerate(shares(p))}
    return np.array([order[source] for source in blocks.sources], dtype=np.int32)


def counts(blocks: Blocks) -> dict[str, Any]:
    """Blocks, text tokens, and documents and tokens per source."""
    text = blocks.document[:, 1:].ravel()
    sizes = np.bincount(text, minlength=len(blocks.sources))
    tokens: Counter[str] = Counter()
    for source, size in zip(blocks.sources, sizes.tolist()):
        tokens[source] += size
    return {"blocks": len(blocks.tokens), "text_tokens": int(text.size), "documents": dict(Counter(blocks.sources)),
            "tokens": dict(tokens)}


def examples(blocks: Blocks, tokenizer, number: int = 6) -> list[dict[str, Any]]:
    """A few blocks spread over a split, decoded: number, sources and text."""
    chosen = np.linspace(0, len(blocks.tokens) - 1, min(number, len(blocks.tokens))).astype(int).tolist()
    return [{"block": i, "sources": sorted({blocks.sources[d] for d in set(blocks.document[i, 1:].tolist())}),
             "text": tokenizer.decode(blocks.tokens[i, 1:].tolist())} for i in chosen]
