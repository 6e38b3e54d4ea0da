"""Temporal co-activation (study 2): latents that fire together again and again are kept from overlapping.

L += lambda * sum_{i != j} w_ij |G_ij|^power, G = f^T f / B over the batch; with ``power: 1`` this is the study's
formula lambda / B * sum w_ij |f_i . f_j|, with ``power: 2`` its code's, but for the mean over F^2 pairs
(``mean_pairs``).
The weights w come from windows of tokens (``coactivation.dense`` says how), or for run 0 from the batch alone.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field
from torch import Tensor

from sae_lib.sae.codes import CSR, Dense
from sae_lib.sae.kernels import DENSE_FROM
from sae_lib.training.coactivation.decoder import decoder_term
from sae_lib.training.coactivation.packed import LARGEST_WINDOW, PackedPairs, consecutive_term, follows
from sae_lib.training.coactivation.rule import Rule
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """The study's formula by default; its code's departures by option."""

    weight: Scheduled = Schedule(start=0.1)
    """lambda; 0 only tracks."""
    power: Literal[1, 2] = 1
    weights: Literal["windows", "consecutive"] = "windows"
    """consecutive: run 0's, intersections of the batch's masks times (1 + beta * consecutive score)."""
    window_size: int = Field(1000, ge=1, le=LARGEST_WINDOW)
    """Tokens of a window."""
    gamma: float = Field(1.0, ge=0)
    """Weight of a pair's deviation from its running average."""
    beta: float = -0.05
    """Weight of the consecutive score (run 0)."""
    space: Literal["latents", "decoder"] = "latents"
    """decoder: G_ij is the cosine of decoder rows, over random chunks of the latents."""
    chunk: int = Field(512, ge=2)
    """Latents of a chunk (decoder)."""
    diagonal: Literal["exclude", "include"] = "exclude"
    reduction: Literal["sum", "mean_pairs"] = "sum"
    read: Literal["before_reset", "after_reset"] = "before_reset"
    alpha: Literal["pair_count", "latent_rate"] = "pair_count"
    absent: Literal["keep", "decay"] = "keep"
    storage: Literal["16bit", "float32"] = "16bit"
    """Of the running averages."""


@ingredient("temporal_coactivation", Config)
class TemporalCoactivation(Ingredient):
    """Tracks pairs in packed triangles; see ``sae_lib.training.coactivation``."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        rule = Rule(config.window_size, config.gamma, config.read == "after_reset", config.alpha == "latent_rate",
                    config.absent == "decay")
        windows = config.weights == "windows"
        self.pairs = PackedPairs(d_sae, rule, config.storage == "float32") if windows else None
        self.seconds, self.steps = 0.0, 0

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """Run 0 needs the token before each token."""
        if config.weights == "consecutive" and p.order != "sequence_blocks":
            return "weights: consecutive needs tokens in their order; set order: sequence_blocks"
        if config.weights == "consecutive" and config.space == "decoder":
            return "weights: consecutive is of the latents; set space: latents"
        return None

    def penalty(self, ctx) -> Tensor | None:
        """The weighted term. While codes are dense nothing is counted: then all latents fire with all others."""
        codes = ctx.codes
        if isinstance(codes, Dense) and codes.l0() > DENSE_FROM * self.d_sae:
            return None
        began, weight = time.perf_counter(), self.config.weight(ctx.step, ctx.total_steps)
        codes = codes.csr()
        codes = CSR(codes.offsets.cpu(), codes.indices.cpu(), codes.values.cpu(), codes.n_latents)
        power, diagonal = self.config.power, self.config.diagonal == "include"
        if self.pairs is None:
            after = follows(ctx.document, ctx.position)
            term = consecutive_term(codes, after, self.config.beta, power, diagonal)
        elif self.config.space == "latents":
            term = self.pairs.term(codes, power, diagonal)
        else:
            term = decoder_term(self.pairs, codes, ctx.rows, self.config, self.generator)
        self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + 1
        if not weight:
            return None
        return (weight / self.d_sae**2 if self.config.reduction == "mean_pairs" else weight) * term.to(ctx.x.device)

    def log(self, ctx) -> dict[str, float]:
        """Stability of pairs and latents at the last window's end, and what tracking costs."""
        row = {"value/temporal_coactivation.weight": self.config.weight(ctx.step, ctx.total_steps)}
        if self.steps:
            row["tracking/milliseconds"] = 1000 * self.seconds / self.steps
            row["tracking/megabytes"] = self.pairs.bytes / 2**20 if self.pairs else 0.0
        return row | (self.pairs.log() if self.pairs else {})

    def state_dict(self) -> dict[str, Tensor]:
        """The windows."""
        return self.pairs.state_dict() if self.pairs else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        if self.pairs:
            self.pairs.load_state_dict(state)
