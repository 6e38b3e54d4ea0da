"""Parallel paths (study 4, run 7): interleaved parts of the latents, each masked within itself by one importance.

Latent i is of path i mod P. Each path p has a learned scale s_p > 0 of the gradient into its latents: the forward value
is unchanged, and s_p is learnt as if it multiplied the path.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.sae.codes import Codes
from sae_lib.training.compression import masks
from sae_lib.training.ingredients import ingredient
from sae_lib.training.ingredients.masked import MaskConfig, Masked


class Config(MaskConfig):
    """One ratio and one skip for all paths."""

    paths: int = Field(4, ge=1)
    """P"""


@ingredient("parallel_paths", Config)
class ParallelPaths(Masked):
    """``state`` has the logarithms of the scales (P,), 0 at first."""

    learnt = frozenset({"log_scales"})

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state["log_scales"] = torch.zeros(config.paths)
        self.path = torch.arange(d_sae) % config.paths

    def masks(self, ratio: float) -> Tensor:
        """(1, F)"""
        score = masks.log_importance(self.state["importance"])
        found = torch.empty_like(score)
        for part in (slice(path, None, self.config.paths) for path in range(min(self.config.paths, self.d_sae))):
            chosen, least = masks.choose(score[part], ratio)
            found[part] = masks.mask(score[part], chosen, least, self.config.kind, self.config.temperature)
        return found[None]

    def transform(self, codes: Codes, ctx) -> Codes:
        """The masked codes, their gradient scaled."""
        codes = super().transform(codes, ctx)
        if not ctx.training:
            return codes
        scales = self.state["log_scales"].exp()
        scales = masks.of_entries(codes, scales.index_select(0, self.path.to(scales.device)))
        plain = codes.values.detach()
        values = plain + scales.detach() * (codes.values - plain) + plain * (scales - scales.detach())
        return codes.with_values(values)

    def log(self, ctx) -> dict[str, float]:
        """The scales too."""
        scales = self.state["log_scales"].detach().exp().tolist()
        return super().log(ctx) | {f"value/{self.name}.scale_{path}": scale for path, scale in enumerate(scales)}
