"""Competition in neighbourhoods (study 3): where neighbouring latents fire together, the strongest inhibits the others.

Latents are cut into equal runs. With M the strongest latent of the token's neighbourhood: f' = g_i f sigmoid((f / M -
theta) / T), g_i = 2 sigmoid(gate_i) a learnt gate. T is annealed, theta moves until ``winners`` of the active latents
win (f / M >= theta). L += weight * mean_b sum of the losers' latents; gradients of losers are scaled.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.sae.codes import Codes
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient
from sae_lib.training.schedules import Schedule, Scheduled


class Config(IngredientConfig):
    """Neighbourhoods, annealing and who wins."""

    size: int = Field(64, ge=2)
    """Latents of a neighbourhood."""
    temperature: Scheduled = Schedule(kind="exponential", start=0.5, rate=2.3, finish=0.7)
    """T(p)"""
    winners: float = Field(0.8, gt=0, le=1)
    """Share of the active latents that shall win."""
    weight: float = Field(0.1, ge=0)
    """Of the competitive loss."""
    loser_gradient: float = Field(0.5, ge=0, le=1)
    """Gradients of losing latents are multiplied by it."""


@ingredient("winner_take_all", Config)
class WinnerTakeAll(Ingredient):
    """State ``gate`` (F,), learnt; ``theta`` and ``temperature`` as the last step used them."""

    changes_forward = True
    learnt = frozenset({"gate"})

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state = {"gate": torch.zeros(d_sae), "theta": torch.tensor(0.5),
                      "temperature": torch.tensor(config.temperature.start)}

    def before_step(self, ctx) -> None:
        """This step's temperature."""
        self.state["temperature"].fill_(self.at("temperature", ctx))

    def transform(self, codes: Codes, ctx) -> Codes:
        """Gated and inhibited latents."""
        csr = codes.csr()
        values, latents = csr.values, csr.indices
        share = values / self._strongest(csr).clamp_min(1e-12)
        wins = (share >= self.state["theta"]).detach()
        kept = torch.sigmoid((share - self.state["theta"]) / self.state["temperature"])
        inhibited = 2 * torch.sigmoid(self.state["gate"])[latents] * values * kept
        if ctx.training:
            ctx.own["wins"] = wins
            scale = torch.where(wins, 1.0, self.config.loser_gradient)
            inhibited = inhibited * scale + (inhibited * (1 - scale)).detach()
            ctx.own["losers"] = (inhibited * ~wins).sum() if ctx.importance is None else \
                (inhibited * ~wins * ctx.importance[csr.rows()]).sum()
        return csr.with_values(inhibited)

    def _strongest(self, csr) -> Tensor:
        """(N,) the strongest latent of each entry's token and neighbourhood, a constant to gradients."""
        count = -(-self.d_sae // self.config.size)
        cells = csr.rows() * count + csr.indices // self.config.size
        # Few cells hold an entry: numbered anew, they take memory by entries, not by (B, F / size).
        found, place = torch.unique(cells, return_inverse=True)
        top = csr.values.new_zeros(len(found)).scatter_reduce(0, place, csr.values.detach(), "amax")
        return top[place]

    def penalty(self, ctx) -> Tensor | None:
        """The competitive loss."""
        return self.config.weight * ctx.own["losers"] / len(ctx.x) if self.config.weight else None

    def after_step(self, sae, ctx) -> None:
        """Move theta towards the wanted share of winners."""
        wins = ctx.own["wins"]
        if len(wins):
            self.state["theta"] += 0.05 * (wins.float().mean() - self.config.winners)
            self.state["theta"].clamp_(0.0, 1.0)

    def log(self, ctx) -> dict[str, float]:
        """Threshold and winners."""
        wins = ctx.own["wins"]
        return super().log(ctx) | {"value/winner_take_all.theta": float(self.state["theta"]),
                                   "value/winner_take_all.winners": float(wins.float().mean()) if len(wins) else 0.0}
