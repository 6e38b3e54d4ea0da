"""Letter recovery: how well single latents say a word's first letter.

For each letter, the latent and the threshold with the best F1 on the training words are taken, and their F1 on the
test words; the mean over letters is the figure. No probe is trained. Words, their activations and the split are those
that 04 keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sae_lib import params
from sae_lib.data import language_model
from sae_lib.evaluation.saebench import adapter, letter_words


def material(p: params.Train, store) -> letter_words.Material:
    """04's words of the model and hook of ``p``, by 04's own defaults: from the cache, or computed."""
    asked = params.check("letters", {"mode": p.mode})
    info, device = language_model.describe(p.model), language_model.pick_device(p.device)
    dtype = store.manifest["dtype"]
    tokenizer, bos_id = language_model.load_tokenizer(p.model)

    def load():
        return language_model.load(p.model, hook=p.hook, dtype=dtype, device=p.device)

    with adapter.settings(p.threads):
        words = letter_words.choose(tokenizer, asked.absorption_words_per_letter)
        return letter_words.prepare(words, tokenizer, bos_id, functools.cache(load), d_model=info.d_model,
                                    identity=[info.identity, p.hook, dtype, device.type],
                                    seed=asked.absorption_seeds[0], mode=p.mode)


def f1_by_letter(latents: Tensor, labels: Tensor, train: int) -> Tensor:
    """(letters,) F1 on the words from ``train`` on, of ``latents`` (words, F) whose ``labels`` (words,) are letters.

    Each entry of a latent on a training word is a threshold to try: of those at or above it, ``true`` counts the
    letter's words.
    """
    one_hot = torch.nn.functional.one_hot(labels).float()
    latent, word = latents[:train].T.nonzero(as_tuple=True)
    value = latents[word, latent]
    order = value.argsort(descending=True)
    order = order[latent[order].argsort(stable=True)]
    latent, word, value = latent[order], word[order], value[order]
    starts = torch.searchsorted(latent, latent)
    before = torch.cat([torch.zeros(1, one_hot.shape[1]), one_hot[word].cumsum(0)])
    true, taken = before[1:] - before[starts], torch.arange(1, len(word) + 1) - starts
    best = (2 * true / (taken[:, None] + one_hot[:train].sum(0))).argmax(0)
    said, right = (latents[train:, latent[best]] >= value[best]).float(), one_hot[train:]
    return 2 * (said * right).sum(0) / (said.sum(0) + right.sum(0)).clamp_min(1)


def letter_recovery(encode: Callable[[Tensor], Tensor], words: letter_words.Material) -> float:
    """Mean F1 over the letters of ``words``, by the latents that ``encode`` gives of activations."""
    with torch.no_grad():
        latents = torch.cat([encode(part) for part in words.x.split(2048)])
    return float(f1_by_letter(latents, torch.tensor(words.labels), words.train).mean())
