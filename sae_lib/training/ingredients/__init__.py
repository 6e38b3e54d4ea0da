"""Ingredients: what is added to an architecture to make a variant.

An ingredient is one file here: a subclass of ``Ingredient`` with a typed ``Config``, under ``@ingredient``.
Every method is optional; ``needs`` says what it reads, and so which kernel can be used.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sae_lib.params import ParameterError, nearest
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.codes import Codes
from sae_lib.sae.context import Context
from sae_lib.sae.row_norms import RowNorms
from sae_lib.training.schedules import Schedule

REGISTRY: dict[str, type[Ingredient]] = {}


class IngredientConfig(BaseModel):
    """Base of every ingredient's typed configuration: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class PairsConfig(IngredientConfig):
    """Base of a term over pairs of decoder rows: which pairs it sees (``pair_sum.mean_over_latents``)."""

    pairs: Literal["active", "all"] = "active"
    """active: latents that fired in the batch, in random chunks; all: every pair, exact."""
    chunk: int = Field(128, ge=2)
    """Latents of a chunk (active) or rows of a block (all)."""
    chunks: int = Field(16, ge=1)
    """Chunks of a step at most (active): of a larger partition so many are drawn."""


class Ingredient:
    """A term or a transform. Override only what the ingredient does."""

    name: ClassVar[str]
    Config: ClassVar[type[IngredientConfig]] = IngredientConfig
    needs: ClassVar[frozenset[str]] = frozenset({"codes"})
    """Of codes, pre_acts, dense: gradients through pre-activations take the dense kernel."""
    of_rows: ClassVar[bool] = False
    """True where the term depends on ``ctx.rows`` alone: its gradient may then be sparse, and is added in place."""
    changes_forward: ClassVar[bool] = False
    """True where the saved SAE must carry the ingredient to compute what it computed in training."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Names of ingredients whose work this one reads from ``ctx.own``; they must be listed too, in any order."""
    learnt: ClassVar[frozenset[str]] = frozenset()
    """Names of the tensors in ``state`` that the optimiser changes."""
    pool: int = 1
    """Batches' worth of activations that ``sampling_weights`` chooses one batch from."""

    def __init__(self, config: IngredientConfig, d_in: int, d_sae: int, generator: torch.Generator | None = None):
        self.config, self.d_in, self.d_sae, self.generator = config, d_in, d_sae, generator
        self.state: dict[str, Tensor] = {}
        """What a checkpoint (and, where it changes the forward pass, the saved SAE) keeps."""

    @classmethod
    def refuses(cls, config: IngredientConfig, p) -> str | None:
        """A sentence why it cannot be used with training parameters ``p``; None where it can."""
        return None

    def calibrate(self, sae: SparseAutoencoder, x: Tensor) -> None:
        """Adapt to a sample (B, D) of scaled activations, before the first step."""

    def before_step(self, ctx: Context) -> None:
        """Publish in ``ctx.own`` what others read, before the forward pass of a training step."""

    def before_selection(self, pre_acts: Tensor, ctx: Context) -> Tensor:
        """Change pre-activations (B, F): normalisation, gates, masks, winner-take-all."""
        return pre_acts

    def transform(self, codes: Codes, ctx: Context) -> Codes:
        """Change latents. Entries that become 0 are dropped afterwards."""
        return codes

    def decoder_codes(self, codes: Codes, ctx: Context) -> Codes:
        """What the decoder is given for these latents: of the decoder, so no latent changes."""
        return codes

    def decoder_rows(self, rows: Tensor, codes: Codes, ctx: Context) -> Tensor:
        """Change the decoder rows (F, D) used for this batch."""
        return rows

    def penalty(self, ctx: Context) -> Tensor | None:
        """One loss term, weighted; it is logged under the ingredient's name."""
        return None

    def on_gradients(self, sae: SparseAutoencoder, ctx: Context) -> None:
        """Change gradients before they are projected (of decoder rows), clipped and used."""

    def after_step(self, sae: SparseAutoencoder, ctx: Context) -> None:
        """Change weights after the step: prune, re-initialise."""

    def row_rates(self, ctx: Context) -> Tensor | None:
        """(F,) factors of the learning rate, one for each latent."""
        return None

    def sampling_weights(self, x: Tensor, sae: SparseAutoencoder) -> Tensor:
        """Weights (P,) for drawing a batch from ``pool`` batches' worth of activations (P, D), with replacement.

        The loss is reweighted, so that its expectation is the pool's mean.
        """
        return torch.ones(len(x), device=x.device)

    def idle(self) -> Tensor | None:
        """(F,) bool: latents that the ingredient keeps from firing; the gate counts them apart from dead ones."""
        return None

    def log(self, ctx: Context) -> dict[str, float]:
        """Values worth a column in the history: by default those of the schedules that move."""
        return {f"value/{self.name}.{key}": schedule(ctx.step, ctx.total_steps)
                for key, schedule in self.schedules().items() if schedule.kind != "constant"}

    def measures(self, sae: SparseAutoencoder, x: Tensor) -> dict[str, Any]:
        """What is worth knowing at the end, measured on held-out activations (N, D): a part of training.json."""
        return {}

    def at(self, field: str, ctx: Context) -> float:
        """The value of a scheduled field at this step."""
        return getattr(self.config, field)(ctx.step, ctx.total_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps."""
        return {name: part.detach() for name, part in self.state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave, into the same tensors (the optimiser holds some of them).

        Raises KeyError or ValueError where it is another ingredient's.
        """
        for name, part in self.state.items():
            if part.shape != state[name].shape:
                raise ValueError(f"{self.name}.{name} has shape {tuple(state[name].shape)}, not {tuple(part.shape)}")
            part.copy_(state[name])

    def schedules(self) -> dict[str, Schedule]:
        """The configuration's schedules by field."""
        fields = {key: getattr(self.config, key) for key in type(self.config).model_fields}
        return {key: value for key, value in fields.items() if isinstance(value, Schedule)}

    def describe(self) -> dict[str, Any]:
        """Name and resolved configuration, as plain values."""
        return {"name": self.name, **self.config.model_dump()}


def ingredient(name: str, config: type[IngredientConfig] = IngredientConfig):
    """Class decorator: make an ingredient known by ``name``, with its typed configuration."""
    def add(kind: type[Ingredient]) -> type[Ingredient]:
        kind.name, kind.Config = name, config
        REGISTRY[name] = kind
        return kind
    return add


def configured(p) -> list[tuple[type[Ingredient], IngredientConfig]]:
    """Check ``ingredients`` with the changes of ``set`` applied.

    Raises ParameterError naming the ingredient, the key and what would be right.
    """
    entries = [dict(entry) for entry in p.ingredients]
    for change in p.set:
        _apply(change, entries)
    found = []
    for entry in entries:
        name = entry.pop("name", None)
        if name not in REGISTRY:
            raise ParameterError(f"ingredients: '{name}' is not known{nearest(str(name), REGISTRY)} "
                                 f"(known: {', '.join(sorted(REGISTRY))})")
        kind = REGISTRY[name]
        try:
            config = kind.Config(**entry)
        except ValidationError as error:
            fault = error.errors()[0]
            path = ".".join(str(part) for part in fault["loc"])
            hint = nearest(path, kind.Config.model_fields) if fault["type"] == "extra_forbidden" else ""
            raise ParameterError(f"ingredients: {name}.{path}: {fault['msg']}{hint}") from None
        if refused := kind.refuses(config, p):
            raise ParameterError(f"ingredients: {name}: {refused}")
        found.append((kind, config))
    listed = {kind.name for kind, _ in found}
    for kind, _ in found:
        if missing := sorted(kind.requires - listed):
            raise ParameterError(f"ingredients: {kind.name} reads what '{missing[0]}' keeps; list that too: "
                                 f"- {{name: {missing[0]}}}")
    return found


def _apply(change: str, entries: list[dict[str, Any]]) -> None:
    """Apply one "name.key=value" (value as YAML) to the entry of that name."""
    path, equals, value = change.partition("=")
    name, *keys = path.strip().split(".")
    entry = next((e for e in entries if e.get("name") == name), None)
    if not equals or not keys or entry is None:
        present = ", ".join(str(e.get("name")) for e in entries) or "none"
        raise ParameterError(f"set: '{change}' is not <ingredient>.<key>=<value> of an ingredient here ({present})")
    for key in keys[:-1]:
        inner = entry.get(key)
        entry[key] = dict(inner) if isinstance(inner, dict) else {} if inner is None else {"start": inner}
        entry = entry[key]
    entry[keys[-1]] = yaml.safe_load(value)


def load_sae(folder: Path) -> SparseAutoencoder:
    """Read a saved SAE together with the ingredients that belong to its forward pass."""
    def make(descriptions, state, d_in, d_sae):
        hooks = []
        for entry in descriptions:
            if entry["name"] == RowNorms.name:  # of an SAE made elsewhere; nothing that training adds
                hooks.append(RowNorms(state["row_norms.norms"]))
                continue
            kind = REGISTRY[entry["name"]]
            hook = kind(kind.Config(**{k: v for k, v in entry.items() if k != "name"}), d_in, d_sae)
            prefix = f"{hook.name}."
            hook.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            hooks.append(hook)
        return hooks
    return SparseAutoencoder.load(folder, make)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
