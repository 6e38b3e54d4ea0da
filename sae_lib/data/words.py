"""Words that are one token, kept apart: some for first-letter prompts in the training text, others for evaluation."""

from __future__ import annotations

import hashlib
import random
import string
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from sae_lib.params import ParameterError

FEWEST = 60
"""A letter with fewer words goes to evaluation whole: a quarter of them would starve it."""
SHOTS = 10
TEMPLATE = " {word} has the first letter: {letter}"
"""As SAEBench asks, word by word (its words carry their leading space); examples stand on lines of their own."""


class Words(NamedTuple):
    """The lower-case words of at least two letters that a tokenizer holds as one token with its leading space."""

    prompts: tuple[str, ...]
    """For first-letter prompts in the training text."""
    evaluation: tuple[str, ...]
    """For evaluation; disjoint from ``prompts``."""
    small_letters: dict[str, int]
    """Letters with fewer than 60 words, which are all in ``evaluation``, and how many they have."""


def split(tokenizer) -> Words:
    """Words of a tokenizer, split by a hash of the word: about a quarter go to prompts."""
    words = sorted({text[1:] for text in map(_spaced(tokenizer), tokenizer.get_vocab()) if _is_word(text)})
    count = Counter(word[0] for word in words)
    small = {letter: count[letter] for letter in string.ascii_lowercase if count[letter] < FEWEST}
    prompts = tuple(w for w in words if w[0] not in small and _is_for_prompts(w))
    chosen = set(prompts)
    return Words(prompts, tuple(w for w in words if w not in chosen), small)


def evaluation_tokens(tokenizer, tokens: list[str]) -> list[str]:
    """Those of SAEBench's alphabetic tokens (``" word"``, ``"Word"``) whose word is in no training prompt."""
    prompts = set(split(tokenizer).prompts)
    return [token for token in tokens if token.strip().lower() not in prompts]


def prompt_documents(tokenizer, seed: int = 0) -> Iterator[str]:
    """Endless ten-shot first-letter prompts with their answers, of prompt words only.

    Raises ParameterError naming ``spelling_share`` when the tokenizer has too few words.
    """
    words = split(tokenizer).prompts
    if len(words) <= SHOTS:
        raise ParameterError(f"spelling_share: the tokenizer has {len(words)} words for first-letter prompts, "
                             f"{SHOTS + 1} are needed; set spelling_share: 0")
    draw = random.Random(f"prompts {seed}")
    while True:
        yield "\n".join(TEMPLATE.format(word=word, letter=word[0].upper()) for word in draw.sample(words, SHOTS + 1))


def texts(tokenizer, ids) -> dict[int, str]:
    """The text of each of some token ids, with its leading space."""
    spaced, known = _spaced(tokenizer), sorted(set(ids))
    return dict(zip(known, map(spaced, tokenizer.convert_ids_to_tokens(known))))


def _is_for_prompts(word: str) -> bool:
    return hashlib.sha256(word.encode()).digest()[0] < 64


def _is_word(text: str) -> bool:
    return len(text) > 2 and text[0] == " " and all(letter in string.ascii_lowercase for letter in text[1:])


def _spaced(tokenizer):
    """Token -> text with its leading space (a sentencepiece decoder drops that of a lone token)."""
    def text(token: str) -> str:
        plain = tokenizer.convert_tokens_to_string([token])
        return " " + plain if token.startswith("\u2581") and not plain.startswith(" ") else plain
    return text
