"""Plain dense autograd: the form that the others are tested against, and the one for dense codes."""

from __future__ import annotations

from torch import Tensor

from sae_lib.sae.codes import Codes, FixedK

name = "reference"


def topk(x: Tensor, sae, k: int) -> FixedK:
    """The k largest pre-activations of each row of ``x`` (B, D), through ReLU."""
    return select_topk(sae.pre_activations(x), k)


def select_topk(pre_acts: Tensor, k: int) -> FixedK:
    """The k largest of each row of (B, F), through ReLU."""
    values, indices = pre_acts.topk(k, dim=1, sorted=False)
    return FixedK(indices, values.relu(), pre_acts.shape[1])


def decode(codes: Codes, rows: Tensor) -> Tensor:
    """sum_i f_i rows_i: (B, F) codes and (F, D) rows give (B, D)."""
    return codes.dense() @ rows
