"""What an ingredient sees of one step (and, with progress 1, of evaluation)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sae_lib.sae.codes import Codes


@dataclass
class Context:
    """One step. Fields fill in order: x, pre-activations, codes, reconstruction."""

    sae: torch.nn.Module
    """The autoencoder (its weights in training units)."""
    x: Tensor
    """(B, D) activations, scaled so that E|x|^2 = D in training."""
    step: int = 0
    total_steps: int = 0
    dead: Tensor | None = None
    """(F,) bool: latents that have not fired for long."""
    document: Tensor | None = None
    """(B,) document of each token."""
    position: Tensor | None = None
    """(B,) position of each token in its block; BOS is 0."""
    generator: torch.Generator | None = None
    """The stream of random numbers of the ingredient being called."""
    pre_acts: Tensor | None = None
    """(B, F) pre-activations; None on the sparse path, for whoever does not name them in ``needs``."""
    selected: Codes | None = None
    """Latents as the architecture selects them, before any ingredient changes them."""
    codes: Codes | None = None
    """Latents."""
    decoded: Codes | None = None
    """What the decoder is given: the codes, unless an ingredient decodes them otherwise."""
    importance: Tensor | None = None
    """(B,) weights of the tokens in the loss, 1 on average; None where batches are drawn evenly."""
    reset: Tensor | None = None
    """(F,) bool, set by an ingredient after the step: latents whose moments the optimiser forgets."""
    rows: Tensor | None = None
    """(F, D) decoder rows used for this batch."""
    reconstruction: Tensor | None = None
    """(B, D)"""
    own: dict[str, Any] = field(default_factory=dict)
    """What the architecture keeps of its forward pass for its losses, and ingredients publish for each other."""

    @property
    def training(self) -> bool:
        """Whether this is a step of training, not an evaluation."""
        return self.total_steps > 0

    @property
    def progress(self) -> float:
        """p = step / total steps; 1 outside training."""
        return self.step / self.total_steps if self.total_steps else 1.0

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Sum of ``values`` (N,) of the codes' entries, a token; tokens weighed where batches are not drawn evenly."""
        if self.importance is not None:
            values = values * self.importance[self.codes.csr().rows()]
        return values.sum() / len(self.x)

    @cached_property
    def fired(self) -> Tensor:
        """(F,) bool: latents active on any token of the batch."""
        return self.codes.fired()
