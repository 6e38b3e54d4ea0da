"""Dead latents begin anew, now and then (study 3), from what is badly reconstructed (Bricken et al. 2023, resampling).

Tokens are drawn by their squared error; a dead latent's decoder row becomes the token's residual, its encoder the same
direction, of the live latents' mean norm or more, and its bias, which is negative, such that it is as strong on that
token as the token's strongest latent. Its moments are forgotten.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """When, as fractions of training, and how many at once."""

    times: int = Field(8, ge=1)
    """How often, evenly between ``begin`` and ``finish``."""
    begin: float = Field(0.2, ge=0, lt=1)
    finish: float = Field(0.7, gt=0, le=1)
    """The last one leaves time to settle."""
    most: int = Field(256, ge=1)
    """Latents at a time at most."""


@ingredient("reinitialisation", Config)
class Reinitialisation(Ingredient):
    """State ``total``: latents that began anew so far."""

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.state = {"total": torch.zeros((), dtype=torch.int64)}

    def due(self, ctx) -> bool:
        """Whether this step is one of ``times``."""
        c, total = self.config, max(1, ctx.total_steps)
        steps = {round(total * (c.begin + (c.finish - c.begin) * n / max(1, c.times - 1))) for n in range(c.times)}
        return ctx.step in steps

    def after_step(self, sae, ctx) -> None:
        """Where due, give dead latents the directions of the largest errors."""
        if ctx.dead is None or not self.due(ctx):
            return
        dead = ctx.dead & ~ctx.own["idle"] if "idle" in ctx.own else ctx.dead
        dead = dead.nonzero()[:, 0][:self.config.most]
        residual = (ctx.x - ctx.reconstruction).detach()
        errors = residual.square().sum(1).double().cpu()
        dead = dead[:int((errors > 0).sum())]
        if not len(dead):
            return
        chosen = torch.multinomial(errors, len(dead), generator=self.generator).to(ctx.x.device)
        rows = torch.nn.functional.normalize(residual[chosen], dim=1)
        alive = torch.ones(self.d_sae, dtype=torch.bool, device=rows.device)
        alive[dead] = False
        sae.W_dec[dead] = rows
        seen, strength = (rows * (ctx.x[chosen] - sae.b_dec)).sum(1), self._strongest(ctx)[chosen]
        norm = sae.W_enc[alive].norm(dim=1).mean() if bool(alive.any()) else torch.ones(())
        # Half as strong again without its bias, so that the bias is negative: it is silent where x is less alike.
        norm = torch.maximum(norm.to(seen), 1.5 * strength / seen.clamp_min(1e-3 * float(seen.abs().max())))
        sae.W_enc[dead] = rows * norm[:, None]
        sae.b_enc[dead] = strength - norm * seen
        self.state["total"] += len(dead)
        ctx.reset = torch.zeros(self.d_sae, dtype=torch.bool, device=rows.device)
        ctx.reset[dead] = True

    @staticmethod
    def _strongest(ctx) -> torch.Tensor:
        """(B,) the strongest latent of each token as it was selected, no less than the mean of them; 1 without any."""
        codes = ctx.selected.csr()
        top = torch.zeros(len(ctx.x), device=ctx.x.device)
        top.scatter_reduce_(0, codes.rows(), codes.values.detach(), "amax")
        return torch.maximum(top, top.mean()) if bool(top.any()) else torch.ones_like(top)

    def log(self, ctx) -> dict[str, float]:
        """How many began anew so far."""
        return {"value/reinitialisation.total": float(self.state["total"])}
