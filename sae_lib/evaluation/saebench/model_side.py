"""What SAEBench's evaluations on labelled texts need of the model alone: activations and probes, computed once.

They do not depend on the SAE, and take most of the time. SAEBench keeps them as pickles named by model and layer; here
they are safetensors named by all that they depend on, and an evaluation that finds them gives the same figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lib import runs
from sae_lib.data.assets import AssetError
from sae_lib.data.language_model import parse_hook
from sae_lib.evaluation import kept_tensors
from sae_lib.evaluation.hooked_model import to_hooked
from sae_lib.evaluation.rerun import identity
from sae_lib.evaluation.saebench import checking
from sae_lib.evaluation.saebench.adapter import seeded
from sae_lib.evaluation.sharing import all_cores, alone
from sae_lib.params import ParameterError, digest
from sae_lib.progress import progress
from sae_lib.runs import RunError

LIMIT = 2**31
"""Bytes of one data set's activations that are kept; of a larger one only the probes are."""
BATCH = 32
"""Texts that the model reads at once."""
LATENT_BYTES = 2**28
"""Latents of one batch of texts that SAEBench holds at once, about."""

Texts = dict[str, list[str]]
"""Texts by class."""
Activations = dict[str, Tensor]
"""(texts, tokens, D) by class; zero where there is no text, which is how SAEBench knows it."""


class ModelSide:
    """Activations of labelled texts at ``lm.hook``, and what is learnt from them without an SAE, through the cache."""

    def __init__(self, lm, context: int, mode: str = "batch"):
        self.lm, self.context, self.mode = lm, context, mode
        self.reused = True
        """Whether all that was asked for was already there."""
        self.keys: dict[str, str] = {}
        """Of each data set asked for: a hash of its texts by class."""
        self._hooked = None
        self._out = sys.stdout, sys.stderr  # progress is shown where the page is, not among SAEBench's words
        self._files: dict[str, Path] = {}

    def activations(self, name: str, train: Texts, test: Texts) -> tuple[Activations, Activations]:
        """Activations of the training and the test texts of data set ``name``; BOS and padding are zero.

        Each text is cut to ``context`` tokens, BOS first (given also where the tokenizer adds none).
        """
        text = json.dumps([self.context, train, test], sort_keys=True).encode()
        found = self._kept("labelled", name, text, lambda: self._compute({"train": train, "test": test}, name))
        return tuple({label: self._spread(found, f"{part} {label}") for label in texts}
                     for part, texts in (("train", train), ("test", test)))

    def last_token(self, name: str, texts: list[str], labels: list[int]) -> Tensor:
        """(texts, D) float32 activations of each text's last token, which has read all the others.

        Of a longer text the last ``context`` tokens are read, BOS among them. ``labels`` tell equal texts of two data
        sets apart.
        """
        text = json.dumps([self.context, texts, labels]).encode()
        return self._kept("last", name, text, lambda: self._compute_last(texts, name))["rows"].float()

    def _kept(self, kind: str, name: str, text: bytes, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``compute()`` makes of ``text``, which is a whole data set; from the cache if it is in it."""
        self.keys[name] = hashlib.sha256(text).hexdigest()[:16]
        key = digest([*identity(self.lm, text), importlib.metadata.version("sae-bench")], 24)
        file = self._files[name] = runs.cache() / "evaluation" / f"{kind}-{key}.safetensors"
        with (contextlib.redirect_stdout(self._out[0]), contextlib.redirect_stderr(self._out[1]),
              alone(file, "labelled texts' activations")):
            found = kept_tensors.read(file)
            if found is None:
                self.reused = False
                with all_cores():
                    found = compute(), {}
                if sum(tensor.nbytes for tensor in found[0].values()) <= LIMIT:
                    kept_tensors.write(file, *found)
        return found[0]

    def learnt(self, name: str, settings: Any, compute: Callable[[], tuple[dict[str, Tensor], dict]]):
        """Tensors and JSON that ``compute()`` makes of a data set's activations under ``settings``, once."""
        made = self._files[name].stem
        key = digest([made, settings, importlib.metadata.version("scikit-learn")], 24)
        file = runs.cache() / "evaluation" / f"probes-{key}.safetensors"
        with alone(file, "probes of the model"):
            found = kept_tensors.read(file)
            if found is None:
                self.reused = False
                found = compute()
                kept_tensors.write(file, *found)
        return found

    def _spread(self, tensors: dict[str, Tensor], key: str) -> Tensor:
        mask, rows = tensors["mask " + key], tensors["rows " + key]
        x = torch.zeros(*mask.shape, rows.shape[1], dtype=rows.dtype)
        x[mask] = rows
        return x.to(self.lm.device)

    def _compute(self, parts: dict[str, Texts], name: str) -> dict[str, Tensor]:
        """Activations of the tokens that are text, row by row, and where those tokens stand (texts, tokens)."""
        from sae_bench.sae_bench_utils import activation_collection

        model, found = self._model(), {}
        ids = {f"{part} {label}": self._tokens(texts) for part, of in parts.items() for label, texts in of.items()}
        # A text in several classes (SCR's groups overlap) is read once. One length for all: SCR and TPP mix classes.
        once = list(dict.fromkeys(tuple(row) for rows in ids.values() for row in rows))
        number, longest = {row: place for place, row in enumerate(once)}, max(map(len, once))
        tokens, text = self._padded(once, longest), [torch.empty(0)] * len(once)
        with self._bar(name, once) as bar:
            for some, width, x in self._batches(once, tokens, bar, masked=True):
                masks = activation_collection.get_bos_pad_eos_mask(tokens[some, :width], model.tokenizer)
                for place, one, mask in zip(some, x, masks):
                    text[place] = one[mask]
        for key, rows in ids.items():
            mask = activation_collection.get_bos_pad_eos_mask(self._padded(rows, longest), model.tokenizer)
            found |= {"mask " + key: mask, "rows " + key: torch.cat([text[number[tuple(row)]] for row in rows])}
        return found

    def _compute_last(self, texts: list[str], name: str) -> dict[str, Tensor]:
        """Activations of last tokens; a text that stands several times is read once."""
        number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        rows = self._tokens(list(number), last=True)
        tokens = self._padded(rows, max(map(len, rows)))
        x = torch.zeros(len(rows), self.lm.d_model, dtype=self.lm.dtype)
        with self._bar(name, rows) as bar:
            for some, _, read in self._batches(rows, tokens, bar, masked=False):
                x[some] = read[range(len(some)), [len(rows[place]) - 1 for place in some]]
        return {"rows": x[[number[text] for text in texts]]}

    def _model(self):
        if self._hooked is None:
            self._hooked = to_hooked(self.lm, parse_hook(self.lm.hook)[0] + 1)
        return self._hooked

    def _padded(self, rows: list[list[int]], length: int) -> Tensor:
        tokens = torch.full((len(rows), length), self._model().tokenizer.pad_token_id)
        for place, row in enumerate(rows):
            tokens[place, :len(row)] = torch.tensor(row)
        return tokens

    def _bar(self, name: str, *sets: list[list[int]]):
        return progress(sum(len(row) for rows in sets for row in rows), f"activations of '{name}'", self.mode)

    def _batches(self, rows: list[list[int]], tokens: Tensor, bar, masked: bool):
        """Batches of padded ``tokens``, whose ids are ``rows``: places, width, and what the model makes of them.

        ``masked``: of BOS, padding and EOS it is zero.
        """
        from sae_bench.sae_bench_utils import activation_collection

        model, layer = self._model(), parse_hook(self.lm.hook)[0]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for start in range(0, len(order), BATCH):  # of like length, cut to the longest
            some = order[start:start + BATCH]
            width = len(rows[some[-1]])
            yield some, width, activation_collection.get_llm_activations(
                tokens[some, :width].to(self.lm.device), model, BATCH, layer, self.lm.hook,
                mask_bos_pad_eos_tokens=masked, show_progress=False).cpu()
            bar.advance(sum(len(rows[place]) for place in some))

    def _tokens(self, texts: list[str], last: bool = False) -> list[list[int]]:
        """Ids of texts, BOS first, cut to the first (or last) ``context``."""
        tokenizer, room = self.lm.tokenizer, self.context - 1
        if last:
            return [[self.lm.bos_id, *row[-room:]] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        cut = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=room)
        return [[self.lm.bos_id, *row] for row in cut["input_ids"]]


def sae_batch(d_sae: int, context: int) -> int:
    """Texts that SAEBench encodes at once: its own 125, or fewer where their latents are many."""
    return max(1, min(125, LATENT_BYTES // (4 * d_sae * context)))


def reseed(*parts: Any) -> None:
    """Seed torch by ``parts``: what is drawn then does not depend on what was found in the cache before."""
    torch.manual_seed(int(digest(list(parts), 12), 16))


def run(name: str, call: Callable[[str], Any], seed: int, config: Any, optional: bool = False) -> dict[str, Any] | None:
    """Run one of SAEBench's evaluations, ``call(folder)``, in an empty folder, and return the JSON that it wrote there.

    Raises RunError with SAEBench's own words when it fails or writes none, and where the JSON says another
    configuration than ``config`` (SAEBench's). With ``optional`` no JSON at all gives None.
    """
    said, wanted = io.StringIO(), checking.asked(config)
    with tempfile.TemporaryDirectory() as folder, seeded(seed):
        try:
            with (contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(folder)):
                call(folder)
        except (ParameterError, RunError, AssetError):
            raise
        except Exception as error:
            hint = "; beartype 0.14.1 is needed" if "Beartype" in type(error).__name__ else ""
            raise RunError(f"SAEBench {name} failed: {type(error).__name__}: {error}{hint}{_words(said)}") from error
        files = sorted(Path(folder).rglob("*_eval_results.json"))
        if not files and optional:
            return None
        if not files:
            raise RunError(f"SAEBench {name} gave no result{_words(said)}")
        raw = runs.read_json(files[0])
    checking.configuration(name, raw, wanted)
    raw.pop("sae_bench_commit_hash", None)  # of the working directory, not of SAEBench
    return raw


def _words(said: io.StringIO) -> str:
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return "; it said: " + (" | ".join(lines[-5:]) or "nothing")
