"""The model ``tiny``: a random two-layer Gemma-2 with a word-level tokenizer, made on the spot for tests.

Words are made up. Their embeddings hold a planted direction for the first letter, so that every evaluation has
something to find; documents alliterate and repeat words, so that the model predicts them better than chance.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPT_WORDS = ("has", "the", "first", "letter")
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
WORDS_PER_LETTER = 64
RARE_LETTERS, RARE_WORDS = "xqz", 32
D_MODEL, LAYERS, CONTEXT = 64, 2, 1024
VERSION = 2
"""Raised with any change of what is made: the cached folder's name holds it."""


@functools.cache
def words() -> tuple[str, ...]:
    """The made-up words, lower-case, 64 a letter (32 for x, q and z), frequent ones first within a letter."""
    made = []
    for letter in LETTERS:
        draw, found = random.Random(f"tiny {letter}"), {}
        count = RARE_WORDS if letter in RARE_LETTERS else WORDS_PER_LETTER
        while len(found) < count:
            word = letter + ("" if letter in "aeiou" else draw.choice("aeiou"))
            for _ in range(draw.choice((1, 1, 2))):
                word += draw.choice("bcdfglmnprstvw") + draw.choice("aeiou")
            if word not in PROMPT_WORDS:
                found[word] = None
        made += found
    return tuple(made)


def documents(seed: int = 0) -> Iterator[str]:
    """Endless documents of the tiny vocabulary: Zipf frequencies, half the words alliterate, a third repeat."""
    draw = random.Random(f"documents {seed}")
    by_letter = {letter: [w for w in words() if w[0] == letter] for letter in LETTERS}
    order = random.Random("order").sample(LETTERS, 26)
    while True:
        text, last = [], None
        for _ in range(draw.randint(40, 200)):
            kind = draw.random()
            if last is None or kind > 0.8:
                letter = order[_zipf(draw, 26)]
                last = by_letter[letter][_zipf(draw, len(by_letter[letter]))]
            elif kind > 0.3:
                last = by_letter[last[0]][_zipf(draw, len(by_letter[last[0]]))]
            text.append(last + ("." if draw.random() < 0.08 else ""))
        yield " ".join(text)


def _zipf(draw: random.Random, count: int) -> int:
    """A rank in [0, count) with probability about 1 / (rank + 1)."""
    return min(int((count + 1) ** draw.random()) - 1, count - 1)


def write(folder: Path, transformers) -> None:
    """Write the model and its tokenizer into an empty folder, in Hugging Face's format, by its module."""
    tokenizer = _tokenizer(transformers.PreTrainedTokenizerFast)
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=4 * D_MODEL, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=CONTEXT,
        max_position_embeddings=CONTEXT, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
        attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM(config).float()
    _plant(model, tokenizer)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _tokenizer(fast_class):
    """Words with their leading space, one token each; like Gemma's it puts BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    spaced = [*LETTERS.upper(), *PROMPT_WORDS, *words()]
    vocabulary = [*SPECIALS, ":", ".", ",", "\u010a", *("\u0120" + word for word in spaced)]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B",
                                                        special_tokens=[("<bos>", 2)])
    return fast_class(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                      unk_token="<unk>", model_max_length=CONTEXT)


@torch.no_grad()
def _plant(model, tokenizer) -> None:
    """Give embeddings a word's own direction plus its first letter's, and keep the layers from drowning them."""
    draw = torch.Generator().manual_seed(1)
    weight = model.model.embed_tokens.weight
    # Dimension 0 is BOS's own: a norm far above the others', as attention sinks have, that no logit sees.
    own = torch.randn(weight.shape, generator=draw)
    letters = torch.linalg.qr(torch.randn(D_MODEL, 26, generator=draw)).Q.T
    own[:, 0], letters[:, 0] = 0, 0
    own = torch.nn.functional.normalize(own, dim=1)
    for token, index in tokenizer.get_vocab().items():
        first = token.removeprefix("\u0120")[:1].lower()
        if first in LETTERS and first:
            own[index] += 0.8 * letters[LETTERS.index(first)]
    own[tokenizer.bos_token_id] = 20 * torch.eye(D_MODEL)[0]
    weight.copy_(own)
    for layer in model.model.layers:  # a Gemma norm multiplies by 1 + weight
        layer.post_attention_layernorm.weight.fill_(-0.75)
        layer.post_feedforward_layernorm.weight.fill_(-0.75)
    model.model.norm.weight.fill_(-0.4)
    model.model.norm.weight[0] = -1
