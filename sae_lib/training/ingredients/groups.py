"""Groups of latents (study 3): a group lasso, the strongest groups of each token, groups kept apart.

Latents are cut into equal runs. Of each token only the latents of its ``keep`` strongest groups stay (norm of the
group's latents, beside that group's running mean where ``normalise``, so that no group wins by its scale alone).
L += weight * mean_b sum_g |f_bg| + apart * mean_g sum_{h != g} cos(centre_g, centre_h)^2, centres of decoder rows.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.sae.codes import CSR, Codes
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """Sixteen groups in the study."""

    groups: int = Field(16, ge=2)
    keep: int = Field(12, ge=1)
    """Groups of a token that stay."""
    weight: float = Field(0.1, ge=0)
    """Of the group lasso."""
    apart: float = Field(1.0, ge=0)
    """Of the cosines between groups' mean decoder rows."""
    normalise: bool = True
    beta: float = Field(0.99, ge=0, lt=1)
    """Of each group's running mean norm."""


@ingredient("groups", Config)
class Groups(Ingredient):
    """State ``norm`` (groups,): running mean norms, which the saved SAE selects with."""

    changes_forward = True

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        self.group = torch.arange(d_sae) * config.groups // d_sae
        self.state = {"norm": torch.zeros(config.groups)}

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """More groups than latents, or than groups to keep."""
        if config.groups > p.d_sae or config.keep > config.groups:
            return f"expected keep <= groups <= d_sae, got {config.keep} of {config.groups} groups of {p.d_sae} latents"
        return None

    def transform(self, codes: Codes, ctx) -> Codes:
        """Latents of the token's strongest groups; the others become 0."""
        csr = codes.csr()
        norms = self.norms(csr)
        ctx.own["group_norms"] = norms
        score, mean = norms.detach(), self.state["norm"]
        if self.config.normalise and bool((mean > 0).any()):
            score = score / mean.clamp_min(1e-3 * float(mean.max()))
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(self.config.keep, dim=1).indices, True)
        return csr.with_values(csr.values * kept[csr.rows(), self.of(csr)])

    def of(self, codes: CSR) -> Tensor:
        """(N,) group of each entry."""
        return self.group.to(codes.indices.device)[codes.indices]

    def norms(self, codes: CSR) -> Tensor:
        """(B, groups): norm of each token's latents, by group."""
        cells = codes.rows() * self.config.groups + self.of(codes)
        squares = codes.values.new_zeros((len(codes.offsets) - 1) * self.config.groups)
        squares = squares.index_add(0, cells, codes.values.square())
        return (squares + 1e-8).sqrt().view(-1, self.config.groups)

    def penalty(self, ctx) -> Tensor:
        """Both terms, of what is left after the selection."""
        lasso = self.norms(ctx.codes.csr())
        if ctx.importance is not None:
            lasso = lasso * ctx.importance[:, None]
        centres = ctx.rows.new_zeros(self.config.groups, self.d_in).index_add(0, self.group.to(ctx.x.device), ctx.rows)
        cos = (unit := torch.nn.functional.normalize(centres, dim=1)) @ unit.T
        between = (cos.square().sum() - cos.diagonal().square().sum()) / self.config.groups
        return self.config.weight * lasso.sum() / len(ctx.x) + self.config.apart * between

    def after_step(self, sae, ctx) -> None:
        """Follow the groups' norms."""
        now, mean = ctx.own["group_norms"].detach().mean(0), self.state["norm"]
        mean.copy_(now) if not bool((mean > 0).any()) else mean.lerp_(now, 1 - self.config.beta)

    def log(self, ctx) -> dict[str, float]:
        """Groups that hold under a hundredth of the mean norm: empty ones."""
        mean = self.state["norm"]
        return {"value/groups.empty": float((mean < 0.01 * mean.mean()).sum())}
