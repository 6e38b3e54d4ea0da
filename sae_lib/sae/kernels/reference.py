"""Plain dense autograd: the form that the others are tested against, and the one for dense codes."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.codes import CSR, Codes, Dense, FixedK, offsets_of


class Reference:
    """Every pre-activation is there, with a gradient. In bfloat16 the products are, weights and sums stay float32."""

    def __init__(self, precision: torch.dtype = torch.float32):
        self.precision = precision
        self.name = "reference" if precision == torch.float32 else "reference_bfloat16"

    def pre_activations(self, x: Tensor, sae) -> Tensor:
        """(B, D) to (B, F) float32."""
        parts = x - sae.b_dec, sae.W_enc, sae.b_enc
        if self.precision != torch.float32:
            parts = (part.to(self.precision) for part in parts)
        return torch.nn.functional.linear(*parts).to(x.dtype)

    def topk(self, x: Tensor, sae, k: int) -> FixedK:
        """The k largest pre-activations of each row of ``x`` (B, D), through ReLU."""
        return select_topk(self.pre_activations(x, sae), k)

    def topk_among(self, x: Tensor, sae, k: int, latents: Tensor) -> Dense:
        """The k largest pre-activations among ``latents`` (n,), through ReLU; of ties all. Codes of n latents."""
        W_enc = sae.W_enc.index_select(0, latents)
        # 0, with b_dec's gradient: through x - b_dec it would take a product as large as the encoder's.
        shift = W_enc.detach() @ (sae.b_dec - sae.b_dec.detach())
        bias = sae.b_enc.index_select(0, latents) - shift
        pre_acts = torch.addmm(bias, x - sae.b_dec.detach(), W_enc.T)
        if k >= len(latents):
            return Dense(pre_acts.relu())
        least = pre_acts.detach().kthvalue(len(latents) - k + 1, dim=1, keepdim=True).values
        return Dense(torch.where(pre_acts >= least, pre_acts.relu(), 0))

    def batch_topk(self, x: Tensor, sae, k: int) -> CSR:
        """The B k largest positive pre-activations of the whole batch."""
        return select_batch_topk(self.pre_activations(x, sae), k).csr()

    def above(self, x: Tensor, sae, threshold: Tensor) -> CSR:
        """Pre-activations over a ``threshold`` (F,), as they are."""
        pre_acts = self.pre_activations(x, sae)
        taken = pre_acts > threshold
        return CSR(offsets_of(taken), taken.nonzero()[:, 1], pre_acts[taken], sae.d_sae)

    def crowded(self, x: Tensor, sae, threshold: Tensor) -> bool:
        """Whether codes are computed densely: always, here."""
        return True

    def over(self, x: Tensor, sae, threshold: Tensor) -> Dense:
        """Pre-activations over a ``threshold`` (F,) that is 0 or more; 0 elsewhere."""
        return select_over(self.pre_activations(x, sae), threshold)

    def relu(self, x: Tensor, sae) -> Dense:
        """Positive pre-activations."""
        return Dense(self.pre_activations(x, sae).relu())

    def decode(self, codes: Codes, rows: Tensor) -> Tensor:
        """sum_i f_i rows_i: (B, F) codes and (F, D) rows give (B, D)."""
        return (codes.dense().to(self.precision) @ rows.to(self.precision)).to(rows.dtype) \
            if self.precision != torch.float32 else codes.dense() @ rows


def select_topk(pre_acts: Tensor, k: int) -> FixedK:
    """The k largest of each row of (B, F), through ReLU."""
    values, indices = pre_acts.topk(k, dim=1, sorted=False)
    return FixedK(indices, values.relu(), pre_acts.shape[1])


def select_over(pre_acts: Tensor, threshold: Tensor) -> Dense:
    """Entries of (B, F) over a ``threshold`` (F,) that is 0 or more; 0 elsewhere."""
    return Dense(pre_acts.relu() * (pre_acts > threshold))


def select_batch_topk(pre_acts: Tensor, k: int) -> Dense:
    """The B k largest of all entries of (B, F), through ReLU."""
    best = pre_acts.detach().flatten().topk(k * len(pre_acts)).indices
    chosen = torch.zeros_like(pre_acts).flatten().index_fill(0, best, 1).view_as(pre_acts)
    return Dense(pre_acts.relu() * chosen)


reference = Reference()
