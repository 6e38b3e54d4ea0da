"""Architectures by name: what selects latents, and the loss terms that belong to the selection.

An architecture is one file here: a subclass of ``Architecture`` under ``@register``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lib.params import ParameterError, nearest
from sae_lib.sae.codes import Codes
from sae_lib.sae.context import Context

REGISTRY: dict[str, type[Architecture]] = {}
TUNED_D = 576
"""Width of the activations that learning rates were tuned on."""


class Architecture:
    """Selection of latents from pre-activations (B, F), and its own loss terms."""

    name: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset()
    """Parameters that change this architecture; others of the training vocabulary's kind have no effect."""
    sparse: ClassVar[bool] = False
    """True where only a few latents are active, so that a sparse kernel can be picked."""
    state: tuple[str, ...] = ()
    """Names of numbers that training changes and a checkpoint keeps."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Names of the vectors (F,) that belong to the SAE beside weights and biases."""
    scales_as_input: ClassVar[frozenset[str]] = frozenset()
    """Which of the vectors are in units of pre-activations."""
    learnt: ClassVar[frozenset[str]] = frozenset()
    """Which of the vectors the optimiser changes."""
    silent_entries: ClassVar[bool] = False
    """True where codes hold entries that are 0 in training, since a gradient flows through them."""
    reconstructions: ClassVar[frozenset[str]] = frozenset()
    """Names of terms that reconstruct too: others are measured beside them and the reconstruction."""
    lens: ClassVar[str | None] = None
    """The SAELens architecture that computes the same after training, where it is called otherwise."""
    lens_names: ClassVar[dict[str, str]] = {}
    """What SAELens calls a part that it calls otherwise."""

    tuned_lr: ClassVar[float] = 3.2e-3
    """The learning rate that was best where D is TUNED_D (benchmarks/tune.py)."""

    def __init__(self, **config: Any):
        self.__dict__.update(config)

    @classmethod
    def from_params(cls, p, d_in: int) -> Architecture:
        """Build from typed training parameters."""
        return cls(**{name: getattr(p, name) for name in cls.uses})

    @classmethod
    def default_lr(cls, d_in: int) -> float:
        """The learning rate where the parameters name none: ``tuned_lr * sqrt(576 / D)`` (docs/learning_rate.md).

        Adam moves every entry of a row by about the rate, a row of unit norm by the angle ``lr * sqrt(D)``.
        """
        return cls.tuned_lr * (TUNED_D / d_in) ** 0.5

    def density(self, d_sae: int) -> float:
        """Share of latents that are active, where it is known before training; else 0."""
        return 0.0

    def further(self, d_sae: int) -> dict[str, Tensor]:
        """``vectors`` by name, as training starts with them."""
        return {}

    def calibrate(self, sae, x: Tensor) -> None:
        """Adapt the untrained SAE to a sample of activations (B, D)."""

    def config(self) -> dict[str, Any]:
        """What the saved SAE must know to select latents."""
        return {}

    def select(self, pre_acts: Tensor, ctx: Context) -> Codes:
        """Latents of pre-activations (B, F), differentiable; ``ctx.training`` where the two differ."""
        raise TypeError(f"architecture '{self.name}' defines no select()")

    def encode(self, ctx: Context, kernel) -> Codes:
        """Latents of ``ctx.x`` (B, D) by a kernel; sparse architectures override it."""
        return self.select(kernel.pre_activations(ctx.x, ctx.sae), ctx)

    def decode(self, ctx: Context, kernel) -> Tensor:
        """(B, D) of ``ctx.decoded`` and ``ctx.rows``, without the bias."""
        return kernel.decode(ctx.decoded, ctx.rows)

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """The architecture's own loss terms, weighted, by name."""
        return {}

    def after_step(self, ctx: Context) -> None:
        """Adapt to what the step showed (a sparsity controller, say)."""

    def log(self) -> dict[str, float]:
        """Values worth a column in the history."""
        return {}


def register(kind: type[Architecture]) -> type[Architecture]:
    """Make an architecture known by its ``name``."""
    REGISTRY[kind.name] = kind
    return kind


def get(name: str) -> type[Architecture]:
    """The architecture of that name. Raises ParameterError naming the known ones."""
    if name not in REGISTRY:
        raise ParameterError(f"architecture: '{name}' is not known{nearest(name, REGISTRY)} "
                             f"(known: {', '.join(sorted(REGISTRY))})")
    return REGISTRY[name]


def squared_error(x: Tensor, x_hat: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error summed over D, averaged over B: the reconstruction term of every architecture.

    ``importance`` (B,) weighs the tokens; it is data, as ``x`` is.
    """
    if importance is not None:
        root = importance.sqrt()[:, None]
        x, x_hat = x * root, x_hat * root
    return _SquaredError.apply(x, x_hat)


class _SquaredError(torch.autograd.Function):
    """One pass forward and one back; ``x`` is data."""

    @staticmethod
    def forward(ctx, x, x_hat):
        error = (x_hat - x).flatten()
        ctx.save_for_backward(error)
        ctx.shape = x.shape
        return torch.dot(error, error) / len(x)

    @staticmethod
    def backward(ctx, grad):
        error, = ctx.saved_tensors
        return None, (error * (2 * grad / ctx.shape[0])).view(ctx.shape)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["REGISTRY", "Architecture", "get", "register", "squared_error"]
