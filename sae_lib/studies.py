"""A study is a matrix: models x variants x seeds, with a sweep over any parameter. This module expands it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from sae_lib import params, runs

FOLDER = "params"


class Study(BaseModel):
    """The content of params/studies/<name>.yaml."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = ["smollm2"]
    """Files of params/models."""
    variants: list[str]
    """Files of params/variants."""
    seeds: list[int] = [42]
    shared: dict[str, Any] = {}
    """Parameters of every run, over those of the model's and the variant's file."""
    sweep: dict[str, list[Any]] = {}
    """Values to try of any parameter, all combinations."""
    baseline: str | None = None
    """The variant that the others are compared with; None takes the first."""


class Member(NamedTuple):
    """One run of a study."""

    name: str
    """Folder under runs/: <study>/<model>-<variant>[-<sweep>]-s<seed>."""
    model: str
    variant: str
    seed: int
    params: dict[str, Any]
    """Flat parameters of all stages."""
    origin: dict[str, str]
    """The file that each parameter came from."""


def load(name: str) -> Study:
    """Read a study's file. Raises ParameterError naming file and key."""
    path = _file("studies", name)
    try:
        return Study(**params.load_yaml(path))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise params.ParameterError(f"{path}: {key}: {fault['msg']}{params.nearest(key, Study.model_fields)}") from None


def expand(name: str) -> list[Member]:
    """The runs of a study, every parameter of every stage checked.

    Raises ParameterError naming the file and the key of the first fault.
    """
    study = load(name)
    members = []
    for model, variant, values, seed in itertools.product(study.models, study.variants,
                                                          itertools.product(*study.sweep.values()), study.seeds):
        swept = dict(zip(study.sweep, values))
        label = "-".join([model, variant, *(f"{key}={value}" for key, value in swept.items()), f"s{seed}"])
        layers = [(_file("models", model), None), (_file("variants", variant), None),
                  (_file("studies", name), {**study.shared, **swept, "seed": seed})]
        merged, origin = {}, {}
        for path, given in layers:
            found = params.load_yaml(path) if given is None else given
            merged |= found
            origin |= dict.fromkeys(found, _shown(path))
        merged["run"] = f"{name}/{label}"
        runs.folder_of(merged["run"])
        for stage in ("extract", "train", "eval", "letters"):
            params.check(stage, merged, origin)
        members.append(Member(merged["run"], model, variant, seed, merged, origin))
    return members


def check_ingredients(members) -> None:
    """Check every run's architecture and ingredients too. Apart from ``expand``, because it must import torch.

    What this library has once found right is not checked again.
    """
    asked = {member.name: [member.variant, member.params] for member in members}
    found_right = runs.cache() / "checked" / params.digest([asked, runs.library_digest()])
    if found_right.exists():
        return
    from sae_lib.sae import architectures
    from sae_lib.training.ingredients import configured

    for member in members:
        try:
            p = params.check("train", member.params, member.origin)
            architectures.get(p.architecture)
            configured(p)
        except params.ParameterError as error:
            raise params.ParameterError(f"params/variants/{member.variant}.yaml: {error}") from None
    found_right.parent.mkdir(parents=True, exist_ok=True)
    found_right.touch()


def baseline(name: str) -> str:
    """The study's baseline variant."""
    study = load(name)
    return study.baseline or study.variants[0]


def _file(kind: str, name: str) -> Path:
    if not isinstance(name, str) or not runs.SAFE_NAME.fullmatch(name) or "/" in name:
        raise params.ParameterError(f"{kind}: '{name}' is not a name of a file in params/{kind}")
    return runs.project() / FOLDER / kind / f"{name}.yaml"


def _shown(path: Path) -> str:
    return path.relative_to(runs.project()).as_posix()
