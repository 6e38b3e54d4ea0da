"""Is what SAEBench gave what it was asked for? Its configuration, every figure wanted, and each of them finite."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from sae_lib.runs import RunError


def asked(config: Any) -> dict[str, Any]:
    """SAEBench's configuration (a dataclass) as its JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def configuration(name: str, raw: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise RunError where the JSON's ``eval_config`` has another value than ``wanted`` for one of its keys."""
    found = raw.get("eval_config") or {}
    other = [f"{key} {found.get(key)!r:.60} instead of {value!r:.60}" for key, value in wanted.items()
             if found.get(key) != value]
    if other:
        raise RunError(f"SAEBench {name} was run with another configuration than asked: {'; '.join(other)}")


def figures(name: str, found: dict[str, Any], wanted: list[str]) -> dict[str, float]:
    """The figures that are there. Raises RunError for one of ``wanted`` that is missing, and for any not finite."""
    values = {key: value for key, value in found.items() if value is not None}
    missing = [key for key in wanted if key not in values]
    unfit = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
    if missing or unfit:
        raise RunError(f"SAEBench {name} gave no usable result: " + "; ".join(
            [f"no {', '.join(missing)}"] * bool(missing) + unfit))
    return values


def data_sets(name: str, raw: dict[str, Any], wanted: list[str]) -> None:
    """Raise RunError where the JSON has no details of a data set of ``wanted``."""
    held = [str(row.get("dataset_name")) for row in raw.get("eval_result_details") or []]
    missing = [one for one in wanted if not any(row.startswith(one) for row in held)]
    if missing:
        raise RunError(f"SAEBench {name} gave nothing for {', '.join(missing)}")
