"""Decoder norms kept apart: an SAE whose TopK was trained with rows that are not of unit norm, computed exactly.

Dividing the rows by their norms and multiplying the encoder by them would change which latents are the k largest.
So the encoder stays as it is, the selection is made, and only then each latent is multiplied by its row's norm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_lib.sae.codes import Codes, Dense


class RowNorms:
    """A part of the forward pass, as an ingredient is one: f_i becomes f_i |W_dec_i|, the rows have unit norm."""

    name = "row_norms"

    def __init__(self, norms: Tensor):
        self.norms = norms
        """(F,) norms that the rows had."""

    def before_selection(self, pre_acts: Tensor, ctx) -> Tensor:
        """Pre-activations (B, F) as they are: the selection is the trained one."""
        return pre_acts

    def transform(self, codes: Codes, ctx) -> Codes:
        """Latents times their row's norm."""
        norms = self.norms.to(codes.values)
        return codes.with_values(codes.values * (norms if isinstance(codes, Dense) else norms[codes.indices]))

    def decoder_codes(self, codes: Codes, ctx) -> Codes:
        """Latents as they are."""
        return codes

    def decoder_rows(self, rows: Tensor, codes: Codes, ctx) -> Tensor:
        """The unit rows as they are."""
        return rows

    def state_dict(self) -> dict[str, Tensor]:
        """The norms, saved beside the weights."""
        return {"norms": self.norms}

    def describe(self) -> dict[str, Any]:
        """The name that reading finds it by."""
        return {"name": self.name}
