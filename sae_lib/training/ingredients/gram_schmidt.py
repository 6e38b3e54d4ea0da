"""Gram-Schmidt in the forward pass (study 3, run 5): a token's latents write in directions orthogonal to each other.

The decoder rows of a token's strongest latents are orthonormalised in descending order of activation, and the latents
keep their magnitudes: x_hat = f Q + b_dec (``sae.kernels.gram_schmidt`` has the mathematics). What is weaker than
those writes by its plain row. The decoder then differs by token, so the saved SAE carries the ingredient.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sae_lib.sae.codes import Codes
from sae_lib.sae.context import Context
from sae_lib.sae.kernels.gram_schmidt import orthonormal_codes
from sae_lib.training.ingredients import Ingredient, IngredientConfig, ingredient


class Config(IngredientConfig):
    """Which latents, and how nearly parallel rows are held."""

    latents: int = Field(32, ge=1, le=64)
    """m: how many of a token's latents are orthonormalised, the strongest first."""
    eps: float = Field(1e-3, ge=1e-5, le=1)
    """Added to the Gram matrix's diagonal: rows nearer to others' span than its root are shortened, not stretched."""
    over: Literal["token", "batch"] = "token"
    """batch: the study's own form, which is refused."""


@ingredient("gram_schmidt", Config)
class GramSchmidt(Ingredient):
    """Gives the decoder other codes; no latent changes."""

    changes_forward = True

    @classmethod
    def refuses(cls, config, p) -> str | None:
        """What is no autoencoder of single tokens, and an architecture whose prefixes decode by themselves."""
        if config.over == "batch":
            return ("over: batch makes a token's code depend on the other tokens of its batch, and leaves at most as "
                    "many independent latents as a batch has tokens; set over: token")
        if p.architecture == "matryoshka_batch_topk":
            return "the prefixes of matryoshka_batch_topk decode by themselves; set architecture: batch_topk"
        return None

    def decoder_codes(self, codes: Codes, ctx: Context) -> Codes:
        """c = L^-T f for each token's strongest latents."""
        return orthonormal_codes(codes, ctx.rows, self.config.latents, self.config.eps)
