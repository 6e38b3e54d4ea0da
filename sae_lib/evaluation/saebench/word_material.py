"""What 04 needs of the language model alone: before any SAE is trained, or when the first one is evaluated."""

from __future__ import annotations

import contextlib
import functools
import json

from sae_lib import params, runs, studies
from sae_lib.data import activations, language_model
from sae_lib.data.language_model import PLANTED
from sae_lib.evaluation.evaluate import hook_of
from sae_lib.evaluation.saebench import adapter, letter_words


class WordReading:
    """The model, words and place that 04 of parameters ``p`` reads for a run trained with ``asked``."""

    def __init__(self, p: params.Letters, asked: params.Train):
        """Raises ParameterError for a model, layer or device that cannot be used."""
        self.model, self.hook, self.mode = p.model or asked.model, hook_of(p.layer, asked), p.mode
        language_model.check_layer(self.model, self.hook)
        self.info, self.device = language_model.describe(self.model), language_model.pick_device(p.device)
        self.tokenizer, self.bos_id = language_model.load_tokenizer(self.model)
        self.dtype = precision(asked)
        self.load = functools.cache(lambda: language_model.load(self.model, hook=self.hook, dtype=self.dtype,
                                                                device=p.device))
        self.preset = p.absorption_preset
        paper = self.preset == "paper"
        self.held_out = not paper or asked.spelling_share > 0
        """Whether words of the training text's first-letter prompts are left out."""
        self.words_per_letter = None if paper else p.absorption_words_per_letter
        self.words = letter_words.choose(self.tokenizer, self.words_per_letter, self.held_out)

    def material(self, seed: int) -> letter_words.Material:
        """Words' activations and the letters' probes, from the cache or computed."""
        identity = [self.info.identity, self.hook, self.dtype, self.device.type]
        return letter_words.prepare(self.words, self.tokenizer, self.bos_id, self.load, identity=identity,
                                    d_model=self.info.d_model, seed=seed, preset=self.preset, mode=self.mode)


def prepare(p: params.Letters, asked: params.Train) -> None:
    """Compute and keep what 04 will find."""
    with adapter.settings(p.threads):
        side = WordReading(p, asked)
        for seed in p.absorption_seeds:
            reused = side.material(seed).reused
            print(f"{side.model} {side.hook}, seed {seed}: {len(side.words.tokens):,} words, "
                  f"{'found' if reused else 'computed'}", flush=True)


def of_study(study: str) -> int:
    """Prepare for every run of a study, by all cores, so that no 04 waits for another's; the command's exit status.

    What cannot be prepared is said and left to 04, whose error belongs to its run.
    """
    asked = {}
    for member in studies.expand(study):
        p, training = (params.check(stage, member.params, member.origin) for stage in ("letters", "train"))
        p = p.model_copy(update={"run": "", "mode": "batch"})
        if training.model != PLANTED:
            asked.setdefault(json.dumps([p.model_dump(mode="json"), *_kind(training)]), (p, training))
    for p, training in asked.values():
        try:
            prepare(p, training)
        except Exception as error:
            print(f"{p.model or training.model}: words are left to 04: {type(error).__name__}: {error}", flush=True)
    return 0


def _kind(asked: params.Train) -> list:
    """What of a run's training ``WordReading`` depends on."""
    return [asked.model, asked.hook, precision(asked), asked.spelling_share > 0]


def precision(asked: params.Train) -> str:
    """The language model's precision: where it was ``auto``, the store's, not one timed anew."""
    if asked.dtype == "auto":
        with contextlib.suppress(params.ParameterError, runs.RunError):
            held = activations.find(asked).manifest["dtype"]
            return held if held in ("float32", "bfloat16") else "auto"
    return asked.dtype
