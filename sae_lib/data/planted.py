"""A planted truth: SAELens' synthetic features, written as activations that a training reads like any other store.

Features fire, children only with their parents, correlated or not; an activation is the sum of the directions of those
that fire, times their strengths, plus a bias. Which fired, and how strongly, is kept of the held-out rows.

``activations: planted`` (with ``model: planted``, ``layer: 0``) trains on the default world, and
``activations: "planted:features=256,parents=16"`` on another; it is written where it is not there yet.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lib import params, presence, runs
from sae_lib.data.language_model import PLANTED, import_transformers
from sae_lib.data.precomputed import Precomputed
from sae_lib.data.store import generator
from sae_lib.params import ParameterError

HOOK = "blocks.0.hook_resid_post"
"""What the manifest names: ``layer: 0``."""
TRUTH = "truth.safetensors"


class World(BaseModel):
    """What is planted: features, their directions, how often and how strongly they fire, which are whose children."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    d_in: int = Field(64, ge=2)
    """Width of an activation, D."""
    features: int = Field(128, ge=2)
    """True features, G."""
    rows: int = Field(100_000, ge=1)
    """Rows for training."""
    heldout: int = Field(10_000, ge=2)
    """Rows held out, whose features are kept."""
    seed: int = Field(0, ge=0)
    """Of directions, tree, correlations and rows."""
    orthogonality: int = Field(200, ge=0)
    """Steps that drive the directions apart; 0 leaves them random."""
    highest: float = Field(0.2, gt=0, lt=1)
    """Probability of firing of the first feature; probabilities fall as 1 / n^exponent, scaled into the two ends."""
    lowest: float = Field(0.02, gt=0, lt=1)
    """That of the last."""
    exponent: float = Field(0.5, gt=0)
    """Of how fast probabilities fall."""
    magnitude: float = Field(1.0, gt=0)
    """Mean strength of a feature that fires."""
    spread: float = Field(0.15, ge=0)
    """Standard deviation of it; a strength below 0 is no firing."""
    bias: float = Field(1.0, ge=0)
    """Norm of the mean that every activation has beside its features."""
    parents: int = Field(8, ge=0)
    """Features, the first and so the most frequent ones, that have children; 0 makes no tree."""
    children: int = Field(8, ge=2)
    """Children of each parent; they fire only where it does."""
    children_per_row: float = Field(0.4, gt=0)
    """Children that fire on a row of their parent's, on average (a little fewer where they exclude each other)."""
    exclusive: float = Field(0.0, ge=0, le=1)
    """Share of the parents of whose children at most one fires."""
    correlation: float = Field(0.1, ge=0, lt=1)
    """Scale of the low-rank correlation of which features fire together; 0 for independent ones."""
    rank: int = Field(8, ge=1)
    """Rank of it."""

    @model_validator(mode="after")
    def _fits(self):
        if self.parents * (1 + self.children) > self.features:
            raise ValueError(f"features: expected at least {self.parents * (1 + self.children)} for {self.parents} "
                             f"parents of {self.children} children each, got {self.features}")
        if self.children_per_row >= self.children:
            raise ValueError(f"children_per_row: {self.children_per_row} must be below children, {self.children}")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest: {self.lowest} must be below highest, {self.highest}")
        return self


class Truth(NamedTuple):
    """What is known of a world and never told to a training."""

    directions: Tensor
    """(G, D) unit directions of the features."""
    bias: Tensor
    """(D,)"""
    parent: Tensor
    """(G,) int64: each feature's parent, -1 for those without."""
    features: Tensor
    """(N, G) strengths of the features on the held-out rows, in their order; 0 where one does not fire."""


def parse(text: str) -> World:
    """The world that ``planted`` or ``planted:key=value,...`` names. Raises ParameterError naming the key."""
    asked: dict[str, str] = {}
    for part in text.removeprefix(PLANTED).removeprefix(":").split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key and (not equals or key not in World.model_fields):
            raise ParameterError(f"activations: '{text}': '{key}' is not key=value of a planted world"
                                 f"{params.nearest(key, World.model_fields)} (keys: {', '.join(World.model_fields)})")
        if key:
            asked[key] = value
    try:
        return World(**asked)
    except ValidationError as error:
        fault = error.errors()[0]
        at = ".".join(str(place) for place in fault["loc"])
        said = fault["msg"].removeprefix("Value error, ")
        raise ParameterError(f"activations: '{text}': {at + ': ' if at else ''}{said}") from None


def place_of(name: str) -> Path:
    """The folder that ``activations`` names: a world's, written if need be, or the name itself as a path."""
    ours = name.partition(":")[0] == PLANTED
    return write(parse(name)) if ours else Path(name).expanduser()


def folder(world: World) -> Path:
    """Where the world's rows are, or will be: activations/planted-<hash of the world and SAELens' version>."""
    asked = world.model_dump() | {"sae-lens": importlib.metadata.version("sae-lens")}
    return runs.home() / "activations" / f"{PLANTED}-{params.digest(asked)}"


def write(world: World) -> Path:
    """The folder of the world's rows, written as far as it is not there; it reads as ``precomputed.Precomputed``."""
    target = folder(world)
    if (target / "manifest.json").exists():
        return target
    with presence.alone(target, f"activations/{target.name}", patience=math.inf):
        if not (target / "manifest.json").exists():
            _write(world, target)
    return target


def sample(world: World) -> tuple[Tensor, Truth]:
    """(rows, D) activations for training and the held-out truth; the same world gives the same bits."""
    import_transformers()  # before SAELens does, beside a torchvision that does not load
    from sae_lens import synthetic

    apart = synthetic.orthogonal_initializer(world.orthogonality) if world.orthogonality else None
    dictionary = synthetic.FeatureDictionary(world.features, world.d_in, world.bias, apart, seed=world.seed)
    tree = synthetic.generate_hierarchy(world.features, synthetic.HierarchyConfig(
        world.parents, world.children, 1, world.exclusive), world.seed + 1) if world.parents else None
    parent = torch.full((world.features,), -1, dtype=torch.int64)
    for root in tree.roots if tree else []:
        for child in root.children:
            parent[child.feature_index] = root.feature_index
    probabilities = synthetic.zipfian_firing_probabilities(world.features, world.exponent, world.highest, world.lowest)
    probabilities[parent >= 0] = world.children_per_row / world.children  # where the parent fires
    together = synthetic.generate_random_low_rank_correlation_matrix(
        world.features, world.rank, world.correlation, world.seed + 2) if world.correlation else None
    fires = synthetic.ActivationGenerator(world.features, probabilities, world.spread, world.magnitude,
                                          tree.modifier if tree else None, together)
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for count, name in ((world.rows, "train"), (world.heldout, "heldout")):
            torch.manual_seed(generator(world.seed, PLANTED, name).initial_seed())
            drawn.append(fires.sample(count))
    truth = Truth(dictionary.feature_vectors.detach(), dictionary.bias.detach(), parent, drawn[1])
    return activations_of(truth, drawn[0]), truth


def activations_of(truth: Truth, features: Tensor) -> Tensor:
    """(N, D) activations in which features (N, G) fire."""
    return features @ truth.directions + truth.bias


def truth_of(path: Path) -> Truth:
    """The truth of a folder that ``write`` made. Raises RunError naming the file that is missing or damaged."""
    file = Path(path) / TRUTH
    try:
        return Truth(**load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        raise runs.RunError(f"{file}: no planted world's truth ({error}); delete the folder and write it "
                            "again") from None


def _write(world: World, target: Path) -> None:
    x, truth = sample(world)
    with runs.whole(target) as temporary:
        temporary.mkdir()
        save_file({"x": x.contiguous()}, temporary / "train.safetensors")
        save_file({"x": activations_of(truth, truth.features).contiguous()}, temporary / "heldout.safetensors")
        save_file(truth._asdict(), temporary / TRUTH)
        (temporary / "world.json").write_text(json.dumps(
            {"world": world.model_dump(), "provenance": runs.provenance(seed=world.seed)}, indent=1))
        manifest = {"model": PLANTED, "hook": HOOK, "d_in": world.d_in, "tensor": "x", "files": [
            {"file": name, "sha256": runs.sha256(temporary / name)} for name in
            ("train.safetensors", "heldout.safetensors")]}
        # Half a row less, as the share is rounded up to whole rows.
        manifest["heldout_share"] = (world.heldout - 0.5) / (world.rows + world.heldout)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))


def open_world(world: World) -> tuple[Precomputed, Truth]:
    """The world's activations, to train on, and its truth."""
    path = write(world)
    return Precomputed(path), truth_of(path)
