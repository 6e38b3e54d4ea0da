"""The sparse primitives on a GPU, in Triton: gathered dot products and the transposed sparse product.

Selection is torch's own. With ``TRITON_INTERPRET=1`` the same kernels run on a CPU, which is how they are tested where
there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lib.sae.codes import offsets_of

WIDTH = 256
"""Entries of D that a program works on at once."""


def same_threads() -> None:
    """A GPU has its own."""


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (B, k) float32 and distinct indices (B, k) int64 of the k largest of each row of (B, F), through ReLU."""
    values, indices = pre_acts.topk(k, dim=1, sorted=False)
    return values.float().relu(), indices


def above(pre_acts: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (B + 1,), indices (N,) and float32 values (N,) of the entries of (B, F) over ``threshold`` (F,)."""
    taken = pre_acts > threshold.to(pre_acts.dtype)
    rows, columns = taken.nonzero(as_tuple=True)
    return offsets_of(taken), columns, pre_acts[rows, columns].float()


def gathered_dots(rows_of: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(N,) dot products <left[rows_of[n]], right[columns[n]]> for ``left`` (B, D) and ``right`` (F, D)."""
    out = torch.empty(len(columns), dtype=torch.float32, device=left.device)
    if len(columns):
        _gathered_dots[(len(columns),)](rows_of, columns, left.contiguous(), right.contiguous(), out, left.shape[1],
                                        BLOCK=WIDTH)
    return out


def transposed_product(rows_of: Tensor, columns: Tensor, values: Tensor, dense: Tensor,
                       n_latents: int) -> tuple[Tensor, Tensor]:
    """C^T dense (F, D) and the sums of C's columns (F,), C (B, F) given by its N entries in row order."""
    order = torch.argsort(columns, stable=True)
    counts = torch.bincount(columns, minlength=n_latents)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    out = torch.empty(n_latents, dense.shape[1], dtype=torch.float32, device=dense.device)
    sums = torch.empty(n_latents, dtype=torch.float32, device=dense.device)
    grid = (n_latents, triton.cdiv(dense.shape[1], WIDTH))
    _transposed[grid](start, rows_of[order], values.contiguous()[order], dense.contiguous(), out, sums, dense.shape[1],
                      BLOCK=WIDTH)
    return out, sums


@triton.jit
def _gathered_dots(rows_of, columns, left, right, out, width, BLOCK: tl.constexpr):
    """One program an entry."""
    entry = tl.program_id(0)
    row, column = tl.load(rows_of + entry), tl.load(columns + entry)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < width
        total += (tl.load(left + row * width + place, mask=inside, other=0.0)
                  * tl.load(right + column * width + place, mask=inside, other=0.0))
    tl.store(out + entry, tl.sum(total, 0))


@triton.jit
def _transposed(start, rows, values, dense, out, sums, width, BLOCK: tl.constexpr):
    """One program a column and a part of D: its entries are summed in order, so the result is always the same."""
    column, part = tl.program_id(0), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    total, weight = tl.zeros([BLOCK], tl.float32), 0.0
    for entry in range(tl.load(start + column), tl.load(start + column + 1)):
        value, row = tl.load(values + entry), tl.load(rows + entry)
        total += value * tl.load(dense + row * width + place, mask=inside, other=0.0)
        weight += value
    tl.store(out + column.to(tl.int64) * width + place, total, mask=inside)
    if part == 0:
        tl.store(sums + column, weight)
