"""Layer normalisation of pre-activations over the latents, before the selection (study 4; Ba et al. 2016).

a'_b = gain (a_b - mean_i a_bi) / sqrt(var_i a_bi + eps) + bias, gain and bias (F,) learnt.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient

COLUMNS = 1024
"""Latents whose sample is sorted at a time."""


class Config(IngredientConfig):
    """The constant under the root alone."""

    eps: float = Field(1e-5, gt=0)


@ingredient("layer_norm", Config)
class LayerNorm(Ingredient):
    """All pre-activations are needed: the dense path."""

    needs = frozenset({"pre_acts"})
    changes_forward = True
    learnt = frozenset({"gain", "bias"})

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state = {"gain": torch.ones(d_sae), "bias": torch.zeros(d_sae)}

    @torch.no_grad()
    def calibrate(self, sae, x: Tensor) -> None:
        """Start where the architecture would have started without it.

        The gain is the mean standard deviation of a token, so that magnitudes stay; a latent's bias makes it pass its
        threshold on as many of the tokens of ``x`` (B, D) as before. With a bias of 0 half of all latents would.
        """
        pre_acts = sae.kernel.pre_activations(x, sae)
        threshold = sae.further["threshold"] if "threshold" in sae.further else pre_acts.new_zeros(self.d_sae)
        passing = (pre_acts > threshold).sum(0)
        self.state["gain"].fill_(float(pre_acts.std(1, correction=0).mean()))
        scaled = self._normal(pre_acts, self.state["gain"], torch.zeros_like(threshold))
        for part in torch.arange(self.d_sae, device=x.device).split(COLUMNS):
            ranked = scaled[:, part].sort(0, descending=True).values
            ranked = torch.cat([ranked[:1] + 1, ranked, ranked[-1:] - 1])
            # Between the last that passes and the first that does not.
            level = ranked.gather(0, torch.stack([passing[part], passing[part] + 1])).mean(0)
            self.state["bias"][part] = threshold[part] - level

    def before_selection(self, pre_acts: Tensor, ctx) -> Tensor:
        """(B, F) normalised over F."""
        return self._normal(pre_acts, self.state["gain"], self.state["bias"])

    def _normal(self, pre_acts, gain, bias):
        gain, bias = gain.to(pre_acts.dtype), bias.to(pre_acts.dtype)
        return torch.nn.functional.layer_norm(pre_acts, (self.d_sae,), gain, bias, self.config.eps)
