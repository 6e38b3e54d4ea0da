"""First-letter words, their activations and the letters' probes: what absorption needs of the model alone.

Computed once per model, hook, words and seed by SAEBench's own code, and kept for every SAE in the workbook's cache
(SAEBench keeps it in its installed package, by model name and layer, whatever the seed and the words).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import random
import string
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lib import runs
from sae_lib.data import capture
from sae_lib.data import words as vocabulary
from sae_lib.evaluation import kept_tensors
from sae_lib.evaluation.saebench.adapter import in_place, quiet, seeded
from sae_lib.evaluation.sharing import all_cores, alone
from sae_lib.params import digest
from sae_lib.progress import progress
from sae_lib.runs import RunError

TEMPLATE, POSITION = "{word} has the first letter:", -6
"""SAEBench's prompt, and where the word stands in it, counted from the end."""
FEWEST = 15
"""Words that a letter needs: about three of them come into the test split."""
FEWEST_LETTERS = 20
"""SAEBench gives no absorption for fewer."""
BATCH, EPOCHS, LEARNING_RATE = 64, 50, 1e-2
"""Of the probes, as SAEBench trains them."""


class Words(NamedTuple):
    """The words that an evaluation asks for, of one tokenizer."""

    tokens: list[str]
    """SAEBench's alphabetic tokens (``" word"``, ``"Word"``), sorted."""
    letters: str
    """The letters that have enough of them."""
    dropped: dict[str, str]
    """The others, and why."""
    vocabulary: int
    """How many such tokens the tokenizer has in all, prompts' words and those over the cap included."""


class Material(NamedTuple):
    """What the model alone gives, for one seed."""

    letters: str
    """The probed letters, in the order of labels."""
    dropped: dict[str, str]
    words: list[str]
    """Training words, then test words."""
    x: Tensor
    """(words, D) float32 activation at each word, in its ten-shot prompt."""
    labels: list[int]
    """Place of each word's first letter in ``letters``."""
    train: int
    """How many of the words are for training."""
    weight: Tensor
    """(letters, D) of the probes, on activations as the model gives them."""
    bias: Tensor
    prompts: dict[str, Tensor]
    """Activation (D,) at the word of each further prompt that absorption is measured on, by its digest."""
    dtype: str
    """That the model ran in."""
    reused: bool
    """Whether another SAE's evaluation had computed it."""


def choose(tokenizer, cap: int | None, held_out: bool = True) -> Words:
    """SAEBench's alphabetic tokens, at most ``cap`` a letter: always the same ones, whatever the seed.

    ``held_out`` leaves out the words of the training text's first-letter prompts. A word must be one token in the
    prompt, as SAEBench reads a fixed place.
    """
    from sae_bench.evals.absorption.vocab import get_alpha_tokens

    everything = sorted(set(get_alpha_tokens(tokenizer)))  # a tokenizer's own order differs between processes
    tokens = vocabulary.evaluation_tokens(tokenizer, everything) if held_out else everything
    filled = [f"\n{TEMPLATE.format(word=token)}" for token in tokens]
    lengths = [len(ids) for ids in tokenizer(filled, add_special_tokens=False)["input_ids"]] if tokens else []
    usual = Counter(lengths).most_common(1)[0][0] if lengths else 0
    by_letter: dict[str, list[str]] = {letter: [] for letter in string.ascii_lowercase}
    for token, length in zip(tokens, lengths):
        if length == usual:
            by_letter[token.strip()[0].lower()].append(token)
    dropped = {letter: f"{len(found)} words, at least {FEWEST} are needed"
               for letter, found in by_letter.items() if len(found) < FEWEST}
    letters = "".join(letter for letter in by_letter if letter not in dropped)
    chosen = [token for letter in letters for token in sorted(by_letter[letter], key=_draw)[:cap]]
    return Words(sorted(chosen), letters, dropped, len(everything))


def _draw(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class WordModel:
    """A language model as SAEBench's absorption calls it: prompts in, the activation at the word out.

    Prompts that are known need no model; ``load`` is called for the first that is not.
    """

    def __init__(self, tokenizer, bos_id: int, load: Callable[[], Any], known: dict[str, Tensor] | None = None,
                 name: str = "workbook", device: str = "cpu", bar=None):
        self.tokenizer, self.bos_id, self.load, self.device, self.bar = tokenizer, bos_id, load, device, bar
        self.known = {} if known is None else known
        self.cfg = SimpleNamespace(model_name=name, d_model=None)
        """SAEBench reads both."""

    def to_tokens(self, prompts: str | list[str]) -> Tensor:
        """Ids (prompts, T) with BOS first. Raises RunError for prompts of different lengths."""
        given = [prompts] if isinstance(prompts, str) else prompts
        ids = self.tokenizer(given, add_special_tokens=False)["input_ids"]
        if len(set(map(len, ids))) > 1:
            raise RunError(f"first-letter prompts have {min(map(len, ids))} to {max(map(len, ids))} tokens: a word is "
                           "not one token of the model everywhere")
        return torch.tensor([[self.bos_id, *row] for row in ids])

    @torch.no_grad()
    def run_with_cache(self, prompts: list[str], names_filter: list[str]):
        """Activations (prompts, -POSITION, D) in float32 that answer SAEBench's index POSITION, as it reads a cache."""
        self.read(prompts)
        found = torch.stack([self.known[key_of(prompt)] for prompt in prompts]).to(self.device)
        return None, {name: found[:, None].expand(-1, -POSITION, -1) for name in names_filter}

    def read(self, prompts: list[str]) -> None:
        """Run the model on the prompts that are not known yet, those of the same examples together."""
        fresh = sorted(prompt for prompt in set(prompts) if key_of(prompt) not in self.known)
        if not fresh:
            return
        # Nothing after the word can change the activation there.
        tokens = self.to_tokens(fresh)[:, :POSITION + 1]
        x = capture.last_residuals(self.load(), tokens, None if self.bar is None else self.bar.advance)
        self.known |= {key_of(prompt): row for prompt, row in zip(fresh, x)}


def key_of(prompt: str) -> str:
    """A prompt's digest."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


@contextlib.contextmanager
def examples_of(preset: str, seed: int):
    """While it lasts, SAEBench draws a prompt's ten examples once for the first word of every letter, once for the
    second, and so on; in the preset ``paper`` for each word, as it does by itself.

    So a letter's words have examples of their own each, drawn as by SAEBench, and the model reads the examples once
    for all letters, a twentieth of the tokens.
    """
    from sae_bench.evals.absorption import feature_absorption_calculator, probing, prompting

    if preset == "paper":
        yield
        return
    places: Counter = Counter()

    def create(word: str, examples: list[str], **options):
        kind = word.strip()[0].lower(), len(examples)  # words for training and for testing draw from different ones
        places[kind] += 1
        draw = random.Random(digest([seed, places[kind]]))
        with in_place(prompting, random=draw):
            return prompting.create_icl_prompt(word, examples, **options)
    with in_place(probing, create_icl_prompt=create), in_place(feature_absorption_calculator, create_icl_prompt=create):
        yield


def prepare(words: Words, tokenizer, bos_id: int, load: Callable[[], Any], *, identity: list, d_model: int, seed: int,
            preset: str = "default", mode: str = "batch") -> Material:
    """The material of ``words`` for a seed, from the cache or computed by the model that ``load()`` gives.

    ``identity`` names all that the activations depend on beside words and seed: weights, hook, precision, device.
    Where several evaluations start at once, one computes and the others wait for it.
    """
    if len(words.letters) < FEWEST_LETTERS:  # no absorption to come
        nothing = torch.empty(0, d_model)
        return Material(words.letters, words.dropped, [], nothing, [], 0, nothing, torch.empty(0), {}, "none", False)
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "sae-bench")]
    own = preset == "paper"
    key = digest([identity, versions, words.tokens, seed, own, TEMPLATE, POSITION, FEWEST, BATCH, EPOCHS], 24)
    file = runs.cache() / "evaluation" / f"letters-{key}.safetensors"
    with alone(file, "words' activations"):
        found = _read(file)
        if found is None:
            _compute(words, tokenizer, bos_id, load, file, d_model, seed, preset, mode)
            found = _read(file)._replace(reused=False)
    return found


def _compute(words: Words, tokenizer, bos_id: int, load, file: Path, d_model: int, seed: int, preset: str,
             mode: str) -> None:
    """Word activations, probes and the prompts of the absorption stage, by SAEBench's functions, into ``file``."""
    from sae_bench.evals.absorption import probing, util

    device = torch.device("cpu")
    with (all_cores(), seeded(seed), in_place(probing, tqdm=quiet()), in_place(util, tqdm=quiet()),
          tempfile.TemporaryDirectory() as folder):
        letters, dropped, train, test = _splits(words, preset, seed)
        prompts = [prompt for prompt, _ in (*train, *test)]
        model = WordModel(tokenizer, bos_id, load)
        model.cfg.d_model = d_model
        # Test words with a true positive, most of them, are read a second time in other prompts.
        with progress(len(prompts) + len(test), "word activations", mode, unit="words") as model.bar:
            model.read([prompt.base for prompt in prompts])
            *frames, train_x, test_x = probing.gen_and_save_df_acts_probing(
                model, train, test, path=folder, hook_point="word", batch_size=BATCH, position_idx=POSITION)
            probe, data = probing.train_linear_probe_for_task(
                *frames, device, train_x, test_x, num_classes=len(letters), batch_size=BATCH, num_epochs=EPOCHS,
                lr=LEARNING_RATE)
            again = WordModel(tokenizer, bos_id, load, bar=model.bar)
            with torch.no_grad():
                positive = probe(data["X_test"]) > 0
            known = [[prompt.word for (prompt, label), own in zip(test, positive[:, number]) if own and label == number]
                     for number in range(len(letters))]
            _read_again(again, sorted(prompt.word for prompt in prompts), known, seed, preset)
    about = {"letters": letters, "dropped": dropped, "words": [prompt.word for prompt in prompts], "train": len(train),
             "prompts": list(again.known), "dtype": str(load().dtype).removeprefix("torch.")}
    tensors = {"x": torch.cat([data["X_train"], data["X_test"]]),
               "labels": torch.cat([data["y_train"], data["y_test"]]),
               "weight": probe.weights.detach(), "bias": probe.biases.detach(),
               "prompts": torch.stack([*again.known.values()]) if again.known else torch.empty(0, d_model)}
    kept_tensors.write(file, {name: tensor.clone() for name, tensor in tensors.items()}, about)


def _splits(words: Words, preset: str, seed: int) -> tuple[str, dict[str, str], list, list]:
    """Letters, those dropped and why, and SAEBench's (prompt, label) pairs for training and for testing.

    A letter without a word in one of the two makes its code fail (or every probe NaN): drawn again without it.
    """
    from sae_bench.evals.absorption import probing
    from sae_bench.evals.absorption.prompting import first_letter_formatter

    letters, dropped = words.letters, dict(words.dropped)
    while True:
        tokens = [token for token in words.tokens if token.strip()[0].lower() in letters]
        with in_place(probing, LETTERS=letters), examples_of(preset, seed):
            train, test = probing.create_dataset_probe_training(
                tokens, first_letter_formatter(), num_prompts_per_token=1, base_template=TEMPLATE)
        both = {label for _, label in train} & {label for _, label in test}
        gone = [letter for number, letter in enumerate(letters) if number not in both]
        if not gone:
            return letters, dropped, train, test
        dropped |= dict.fromkeys(gone, "no word in the training or the test split")
        letters = "".join(letter for letter in letters if letter not in gone)


def _read_again(model: WordModel, tokens: list[str], asked: list[list[str]], seed: int, preset: str) -> None:
    """Run the prompts that absorption will be measured on: those that SAEBench draws after ``seeded(seed)``."""
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.absorption.prompting import first_letter_formatter

    calculator = FeatureAbsorptionCalculator(model, tokens, max_icl_examples=10, base_template=TEMPLATE,
                                             answer_formatter=first_letter_formatter(), word_token_pos=POSITION)
    with seeded(seed), examples_of(preset, seed):
        model.read([prompt.base for of_letter in asked for prompt in calculator._build_prompts(of_letter)])


def _read(file: Path) -> Material | None:
    """The material of a file; None where there is none, or one that is damaged or was made for another name.

    It is computed again then, and replaced.
    """
    held = kept_tensors.read(file)
    if held is None:
        return None
    tensors, about = held
    try:
        prompts = dict(zip(about["prompts"], tensors["prompts"]))
        return Material(about["letters"], about["dropped"], about["words"], tensors["x"], tensors["labels"].tolist(),
                        about["train"], tensors["weight"], tensors["bias"], prompts, about["dtype"], True)
    except KeyError:
        return None
