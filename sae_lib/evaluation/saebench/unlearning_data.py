"""The data of SAEBench's unlearning: a folder of the user's, or the hub; the forget corpus is gated, and only a folder.

``bio-forget-corpus.jsonl`` has a ``text`` a line; ``wikitext.jsonl`` too (other text, else the hub's WikiText-2);
``wmdp-bio.jsonl`` and ``<subject of MMLU>.jsonl`` have ``question``, four ``choices`` and ``answer`` (0 to 3).
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from sae_lib import params
from sae_lib.params import ParameterError, digest

FORGET = "bio-forget-corpus"
WHERE = "ask for it where https://huggingface.co/datasets/cais/wmdp-corpora says how"
SHOWN = "in the folder that `unlearning_data` names"


class Data:
    """What SAEBench's unlearning reads, by the names that it asks for."""

    def __init__(self, folder: str | None):
        self.folder = None if folder is None else params.local_path(folder)
        if folder is not None and (self.folder is None or not self.folder.is_dir()):
            raise ParameterError(f"unlearning_data: no folder {folder}; it holds {FORGET}.jsonl, and what else is not "
                                 "to come from the hub")
        if self.folder is None or not (self.folder / f"{FORGET}.jsonl").exists():
            raise ParameterError(f"unlearning_data: no {FORGET}.jsonl {self.folder or SHOWN}; it is gated: {WHERE}, "
                                 f"and put it there, a JSON line with `text` for each document")
        self.about: dict[str, str] = {}
        """Of each part read: the file, or the hub's data set."""
        self.keys: dict[str, str] = {}
        """Of each part read: a hash."""

    def place(self, target: Path) -> None:
        """Copy the forget corpus to where SAEBench opens it."""
        rows = self._file(FORGET)
        target.mkdir(parents=True)
        shutil.copyfile(self.folder / f"{FORGET}.jsonl", target / f"{FORGET}.jsonl")
        self._note(FORGET, f"{FORGET}.jsonl", rows)

    def load(self, path: str, name: str, split: str) -> list[dict[str, Any]]:
        """``load_dataset`` as SAEBench calls it, from the folder where it has the file."""
        return self.rows("wikitext" if path == "wikitext" else name)

    @functools.cache  # noqa: B019 - as long as one evaluation
    def rows(self, name: str) -> list[dict[str, Any]]:
        """``wikitext``, ``wmdp-bio`` or a subject of MMLU. Raises ParameterError where it is neither here nor there."""
        rows = self._file(name)
        if rows is None:
            hub = {"wikitext": ("wikitext", "wikitext-2-raw-v1"), "wmdp-bio": ("cais/wmdp", "wmdp-bio")}.get(
                name, ("cais/mmlu", name))
            rows = _of_hub(name, hub)
            self._note(name, f"{hub[0]} {hub[1]}, of the hub", rows)
        else:
            self._note(name, f"{name}.jsonl", rows)
        return rows

    def long_enough(self, tokens: tuple[Any, Any]) -> tuple[Any, Any]:
        """The tokens (sequences, length) of both corpora. Raises ParameterError for one too short for a sequence."""
        for name, found in zip((FORGET, "wikitext"), tokens):
            if not len(found):
                raise ParameterError(f"unlearning_data: {name} is shorter than one sequence of the preset")
        return tokens

    def _note(self, name: str, about: str, rows: list[dict[str, Any]]) -> None:
        self.about[name], self.keys[name] = about, digest(rows, 16)

    def _file(self, name: str) -> list[dict[str, Any]] | None:
        file = self.folder / f"{name}.jsonl"
        if not file.exists():
            return None
        rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(_row(json.loads(line), name))
            except (ValueError, KeyError, TypeError) as error:
                raise ParameterError(f"unlearning_data: {file}, line {number}: {error}; a line is a JSON mapping with "
                                     + ("text" if name in (FORGET, "wikitext") else
                                        "question, four choices and answer (0 to 3)")) from None
        return rows


def _row(row: dict[str, Any], name: str) -> dict[str, Any]:
    if name in (FORGET, "wikitext"):
        return {"text": str(row["text"])}
    question = {key: row[key] for key in ("question", "choices", "answer")}
    if len(question["choices"]) != 4 or question["answer"] not in range(4):
        raise ValueError(f"{len(question['choices'])} choices, answer {question['answer']!r}")
    return question


def _of_hub(name: str, hub: tuple[str, str]) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(*hub, split="test")]
    except Exception as error:  # of the network, the hub or the data set
        raise ParameterError(f"unlearning_data: no {name}.jsonl there, and the hub did not give {' '.join(hub)} "
                             f"({type(error).__name__}: {error}); put the file {SHOWN}") from None
