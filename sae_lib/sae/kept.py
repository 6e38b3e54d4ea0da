"""An SAE with some of its latents alone: the others are 0 after the selection, and the decoder stays as it is."""

from __future__ import annotations

import copy

from torch import Tensor

from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.codes import Codes, Dense


class KeptLatents:
    """A part of the forward pass, as an ingredient is one: f_i becomes m_i f_i, m the mask.

    The selection is the whole SAE's: a latent that is masked gives its place to no other. For evaluation; not saved.
    """

    name = "kept_latents"

    def __init__(self, kept: Tensor):
        self.kept = kept
        """(F,) bool"""

    def before_selection(self, pre_acts: Tensor, ctx) -> Tensor:
        """Pre-activations (B, F) as they are."""
        return pre_acts

    def transform(self, codes: Codes, ctx) -> Codes:
        """Latents that are kept, the others 0."""
        kept = self.kept.to(codes.values)
        return codes.with_values(codes.values * (kept if isinstance(codes, Dense) else kept[codes.indices]))

    def decoder_codes(self, codes: Codes, ctx) -> Codes:
        """Latents as they are."""
        return codes

    def decoder_rows(self, rows: Tensor, codes: Codes, ctx) -> Tensor:
        """Rows as they are."""
        return rows


def keep(sae: SparseAutoencoder, kept: Tensor) -> SparseAutoencoder:
    """``sae`` with the latents of a mask (F,) bool alone; it shares the weights of the whole one.

    Raises ValueError for a mask of another width.
    """
    if kept.shape != (sae.d_sae,):
        raise ValueError(f"a mask of {tuple(kept.shape)} for {sae.d_sae} latents")
    other = copy.copy(sae)
    other.hooks = [*sae.hooks, KeptLatents(kept)]
    return other
