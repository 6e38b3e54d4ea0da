"""Mixing (study 4, run 9): active latents are changed by a learned low-rank sum of each other.

f''_bi = relu(f'_bi + <h_b, V_i>), h_b = sum_j f'_bj U_j, for the active i alone: what is 0 stays 0. U (F, q) is random
and small, V (F, q) is 0 at first, so that training starts without it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sae_lib.sae import kernels
from sae_lib.sae.codes import CSR, Codes, Dense
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient

SMALL = 0.01
"""Standard deviation of U's entries at first."""


class Config(IngredientConfig):
    """The rank alone."""

    rank: int = Field(8, ge=1)
    """q"""


@ingredient("mixing", Config)
class Mixing(Ingredient):
    """Gathered entries alone, N q numbers for N entries, unless many are active."""

    changes_forward = True
    learnt = frozenset({"U", "V"})

    def __init__(self, config, d_in, d_sae, generator=None):
        super().__init__(config, d_in, d_sae, generator)
        shape = d_sae, config.rank
        small = torch.zeros(shape) if generator is None else SMALL * torch.randn(shape, generator=generator)
        self.state = {"U": small, "V": torch.zeros(shape)}

    def transform(self, codes: Codes, ctx) -> Codes:
        """Active latents mixed."""
        U, V = self.state["U"].to(codes.values.dtype), self.state["V"].to(codes.values.dtype)
        if isinstance(codes, Dense) and codes.l0() <= kernels.DENSE_FROM * self.d_sae:
            codes = codes.csr()
        values = codes.values
        if isinstance(codes, Dense):
            mixed = values + (values @ U) @ V.T
        else:
            # Its backward sorts nothing, unlike embedding_bag's own.
            hidden = kernels.pick(values.device.type, sparse=True).decode(codes, U)
            hidden = hidden.index_select(0, codes.rows()) if isinstance(codes, CSR) else hidden[:, None]
            of_latent = V.index_select(0, codes.indices.flatten()).view(*codes.indices.shape, -1)
            mixed = values + (hidden * of_latent).sum(-1)
        return codes.with_values(mixed.relu() * (values > 0))

    def measures(self, sae, x: Tensor) -> dict[str, float]:
        """How much is mixed in: the norms of U and V."""
        return {f"{name}_norm": float(part.norm()) for name, part in self.state_dict().items()}
