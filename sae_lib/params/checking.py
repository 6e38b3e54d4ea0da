"""Reading and checking values: every fault is a sentence that names file, key and what would be right."""

from __future__ import annotations

import ast
import difflib
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sae_lib.params.stages import STAGES, VOCABULARY, Common


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names file, key and what would be right."""


def check(stage: str, values: dict[str, Any], origin: str | dict[str, str] = "parameters") -> Common:
    """Check ``values`` and return the stage's typed parameters.

    Names that only other stages read are left out. ``origin`` says where values came from: one text, or a file
    per key. Raises ParameterError naming origin, key and the nearest known name.
    """
    kind = STAGES[stage]

    def where(key: str) -> str:
        return origin if isinstance(origin, str) else origin.get(key, "parameters")

    for key in values:
        if key not in VOCABULARY:
            raise ParameterError(f"{where(key)}: unknown parameter '{key}'{nearest(str(key), VOCABULARY)}")
    try:
        return kind(**{key: value for key, value in values.items() if key in kind.model_fields})
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            key = str(fault["loc"][0]) if fault["loc"] else "k" if "k =" in fault["msg"] else "parameters"
            wrong = f" (got {fault['input']!r})" if fault["loc"] else ""
            lines.append(f"{where(key)}: {key}: {fault['msg'].removeprefix('Value error, ')}{wrong}")
        raise ParameterError("\n".join(dict.fromkeys(lines))) from None


def nearest(key: str, known) -> str:
    """The sentence that offers the nearest known name, or nothing."""
    def likeness(name: str) -> tuple[float, int]:  # of two that are equally like, the one that begins alike
        return difflib.SequenceMatcher(None, name, key).ratio(), len(os.path.commonprefix([name, key]))

    best = max(sorted(known), key=likeness, default="")
    return f"; did you mean '{best}'?" if likeness(best)[0] >= 0.6 else ""


def read(stage: str, namespace: dict[str, Any]) -> Common:
    """Check a notebook's parameters cell: pass ``globals()``.

    Also checks the names that papermill injected: it drops unknown ones into the notebook without a word.
    """
    injected = _injected_names(namespace.get("In", []))
    values = {key: namespace[key] for key in STAGES[stage].model_fields if key in namespace}
    values |= {key: namespace.get(key) for key in injected}
    return check(stage, values, "notebook parameters")


def _injected_names(cells: list[str]) -> list[str]:
    """Names assigned by the cell that papermill injects (it starts with ``# Parameters``)."""
    names = []
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            names += [node.targets[0].id for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    return names


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a params file into a dict. Raises ParameterError for a file that is missing or not a mapping."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ParameterError(f"{path}: cannot be read ({error.strerror}); known here: {', '.join(known)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ParameterError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance({} if values is None else values, dict):
        raise ParameterError(f"{path}: expected a mapping of names to values, got a {type(values).__name__}")
    for key in values or {}:
        if not isinstance(key, str):
            raise ParameterError(f"{path}: {key!r}: names are words, not a {type(key).__name__}")
    return values or {}
