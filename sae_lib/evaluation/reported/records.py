"""Reported results read and placed: study, variant, model, hook, width, k and L0, steps, samples, settings, figures."""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from sae_lib import runs
from sae_lib.metrics import METRICS, of_core

FILE = resources.files("sae_lib.evaluation.reported") / "results.json"
MODEL, D_IN, BATCH = "google/gemma-2-2b", 2304, 2048
"""All four studies': the file's ``about`` names the model, its d_in is 2304, and batches had 2048 tokens."""
SIGNS = {"<": operator.lt, ">": operator.gt}


class Described(NamedTuple):
    """What a study says of itself; it places the records that do not say."""

    stem: str
    """How the names of its variants begin in params/variants."""
    base: str
    """The variant that its others are compared with."""
    d_sae: int | None
    k: int | None
    layer: int | None
    """None where the study used several, and a record must tell."""
    steps: int | None


STUDIES = {"progressive-orthogonality": Described("progressive_orthogonality", "topk", 16384, 320, 12, 2441),
           "temporal-coactivation": Described("temporal_coactivation", "topk", None, None, 12, None),
           "hybrid-contrastive": Described("hybrid_contrastive", "standard", 2304, None, None, 2441),
           "bounded-compression": Described("bounded_compression", "standard", 2304, None, None, 2441)}


class Target(NamedTuple):
    """What a study wanted of a metric."""

    sign: str
    """< or >."""
    value: float

    def met(self, figure: float) -> bool:
        """Whether a figure reaches it."""
        return SIGNS[self.sign](figure, self.value)


class Record(NamedTuple):
    """One run of a study as it was reported."""

    study: str
    run: str
    variant: str
    """As a file of params/variants is called."""
    model: str
    hook: str | None
    layer: int | None
    d_in: int
    d_sae: int | None
    k: int | None
    l0: float | None
    steps: int | None
    samples: int | None
    by_study: frozenset[str]
    """Of these fields, those that only the study's description tells, and no record."""
    figures: dict[str, float]
    """Finite figures by their names in ``METRICS``."""
    of: dict[str, str]
    """By figure, the evaluation that it is of; ``prose`` where only a text has it."""
    missing: list[str]
    """Figures that were asked for and are no number."""
    letters: tuple[str, ...]
    """Letters that absorption is a mean over."""
    settings: dict[str, dict[str, Any]]
    """By evaluation, its configuration."""
    evals: dict[str, dict[str, Any]]
    """The record itself."""
    note: str
    """What was noted with it."""

    @property
    def name(self) -> str:
        """Study and run."""
        return f"{self.study} {self.run}"

    @property
    def configuration(self) -> dict[str, Any]:
        """What training was asked for; empty where it is not recorded."""
        return (self.evals.get("training") or {}).get("config") or {}

    @property
    def summary(self) -> dict[str, Any]:
        """What training said of itself when it ended; in some records it lies beside an evaluation's keys."""
        training = self.evals.get("training") or {}
        places = [training.get("final_info") or {}, training, *self.evals.values()]
        return next((place for place in places if "training_steps" in place), {})


class Reported(NamedTuple):
    """The file."""

    records: list[Record]
    targets: dict[str, dict[str, Target]]
    about: str


def read(path: Path | None = None) -> Reported:
    """Read and place every record. Raises RunError, naming the file, for whatever is wrong with it."""
    file = Path(str(path or FILE))
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        records = [_placed(raw) for raw in held["runs"]]
        targets = {study: {_known(name): _target(text) for name, text in wanted.items()}
                   for study, wanted in held["targets"].items()}
        twice = [name for name, count in Counter(record.name for record in records).items() if count > 1]
        if twice or not set(targets) <= set(STUDIES) or not isinstance(held["about"], str):
            raise ValueError(f"twice there: {twice}" if twice else "its targets or its text are of something else")
        return Reported(records, targets, held["about"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise runs.RunError(f"{file}: the reported results are damaged ({type(error).__name__}: {error}); "
                            "install the workbook again") from None


def _target(text: str) -> Target:
    sign, value = text.split()
    if sign not in SIGNS:
        raise ValueError(f"target '{text}'")
    return Target(sign, float(value))


def _placed(raw: dict[str, Any]) -> Record:
    """A record with its place: from its own evaluations, then its training, then the study's description."""
    study, evals = STUDIES[raw["source"]], raw["evals"]
    if any(not isinstance(raw[key], str) for key in ("run", "variant", "note")):
        raise ValueError(f"a record of {raw['source']} without a name")
    figures, missing = _figures(evals, raw["reported"])
    own = Record(raw["source"], raw["run"], raw["variant"], MODEL, None, None, D_IN, None, None, None, None, None,
                 frozenset(), {name: value for name, (value, _) in figures.items()},
                 {name: place for name, (_, place) in figures.items()}, missing, _letters(evals),
                 {name: part.get("eval_config") or part.get("eval_cfg") for name, part in evals.items()
                  if part.get("eval_config") or part.get("eval_cfg")}, evals, raw["note"])
    saes = [part["sae_cfg_dict"] for part in evals.values() if "sae_cfg_dict" in part]
    asked, said = own.configuration, own.summary
    told = {"layer": _first([sae["hook_layer"] for sae in saes], asked.get("layer"), said.get("layer")),
            "d_sae": _first(asked.get("dict_size"), said.get("dict_size"), [sae["d_sae"] for sae in saes]),
            "k": _first(asked.get("k")), "steps": _first(said.get("training_steps"), asked.get("steps"))}
    described = {"layer": study.layer, "d_sae": study.d_sae, "steps": study.steps,
                 "k": None if raw["variant"] == "standard" else study.k}
    places = {name: described[name] if value is None else value for name, value in told.items()}
    by_study = {name for name, value in told.items() if value is None and places[name] is not None}
    layer, steps = places["layer"], places["steps"]
    return own._replace(
        **places, hook=None if layer is None else f"blocks.{layer}.hook_resid_post",
        model=_first(asked.get("lm_name"), [sae["model_name"] for sae in saes]) or MODEL,
        d_in=_first(asked.get("activation_dim"), [sae["d_in"] for sae in saes]) or D_IN,
        l0=own.figures.get("core/l0"), samples=None if steps is None else steps * BATCH, by_study=frozenset(by_study))


def _first(*values: Any) -> Any:
    """The first value that is known; of a list its most frequent."""
    for value in values:
        if isinstance(value, list):
            value = Counter(value).most_common(1)[0][0] if value else None
        if value is not None:
            return value
    return None


def _figures(evals: dict[str, Any], reported: dict[str, Any]) -> tuple[dict[str, tuple[float, str]], list[str]]:
    """Finite figures with the evaluation of each, and the names of those that should be there and are no number."""
    found, missing = {}, []
    for place, part in {**evals, "prose": {"metrics": {"reported": reported}}}.items():
        groups = part.get("metrics") or part.get("eval_result_metrics") or {}
        asked = (part.get("eval_config") or {}).get("k_values")
        for name, value in ((name, value) for group in groups.values() for name, value in group.items()):
            known = _known(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name} is {str(value)[:40]!r}")
            if value is not None and math.isfinite(value):
                found[known] = (float(value), place)
            elif "_top_" not in name or asked is None or int(name.split("_")[2]) in asked:
                missing.append(known)
    return found, missing


def _known(name: str) -> str:
    """Name in METRICS. Raises ValueError for one that is not there."""
    if of_core(name) not in METRICS:
        raise ValueError(f"'{name}' is no metric that is known")
    return of_core(name)


def _letters(evals: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row["first_letter"] for row in (evals.get("absorption") or {}).get("eval_result_details", []))
