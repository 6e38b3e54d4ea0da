"""One dense product (the encoder's); everything after the selection is sparse, forward and backward.

With G the gradient at the N active entries (a sparse B x F matrix), C the codes and R the reconstruction's gradient
(B, D): d W_enc = G^T (x - b_dec), d b_enc = the column sums of G, d W_dec = C^T R, and G's entries are <R_b, W_dec_i>.
No F-wide gradient is ever formed. The product may be in bfloat16 (weights stay float32); all else is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.codes import CSR, Codes, Dense, FixedK
from sae_lib.sae.kernels.reference import Reference

DENSE_FROM = 0.08
"""Share of active latents from which dense products win (measured at D 576, F 4096, two cores)."""


class Sparse:
    """Encode and decode by a device's primitives ``ops`` (topk, above, gathered_dots, transposed_product)."""

    def __init__(self, ops, precision: torch.dtype, name: str):
        self.ops, self.precision, self.name = ops, precision, name
        self.dense = Reference(precision)
        """For codes so dense that sparse forms lose."""

    def topk(self, x: Tensor, sae, k: int) -> FixedK:
        """The k largest pre-activations of each row of ``x`` (B, D), through ReLU."""
        values, indices = _TopK.apply(x, sae.W_enc, sae.b_enc, sae.b_dec, k, self)
        return FixedK(indices, values, sae.d_sae)

    def topk_among(self, x: Tensor, sae, k: int, latents: Tensor) -> Codes:
        """The k largest pre-activations among ``latents`` (n,), through ReLU; codes of n latents, dense where few."""
        if k > DENSE_FROM * len(latents):
            return self.dense.topk_among(x, sae, k, latents)
        W_enc, b_enc = sae.W_enc.index_select(0, latents), sae.b_enc.index_select(0, latents)
        values, indices = _TopK.apply(x, W_enc, b_enc, sae.b_dec, k, self)
        return FixedK(indices, values, len(latents))

    def batch_topk(self, x: Tensor, sae, k: int) -> CSR:
        """The B k largest positive pre-activations of the whole batch (Bussmann et al. 2024, BatchTopK)."""
        return CSR(*_Above.apply(x, sae.W_enc, sae.b_enc, sae.b_dec, k * len(x), self), sae.d_sae)

    def above(self, x: Tensor, sae, threshold: Tensor) -> CSR:
        """Pre-activations over a ``threshold`` (F,), as they are: what ReLU and JumpReLU are made of."""
        return CSR(*_Above.apply(x, sae.W_enc, sae.b_enc, sae.b_dec, threshold, self), sae.d_sae)

    def pre_activations(self, x: Tensor, sae) -> Tensor:
        """(B, D) to (B, F) float32, all of them."""
        return self.dense.pre_activations(x, sae)

    def crowded(self, x: Tensor, sae, threshold: Tensor) -> bool:
        """Whether so many pre-activations pass a ``threshold`` (F,) that dense codes win, by a sample of the batch."""
        with torch.no_grad():
            sample = x[:: max(1, len(x) // 64)]
            passed = self.product(sample - sae.b_dec, sae.W_enc, sae.b_enc) > threshold
        return float(passed.float().mean()) > DENSE_FROM

    def over(self, x: Tensor, sae, threshold: Tensor) -> Codes:
        """Pre-activations over a ``threshold`` (F,) that is 0 or more; dense where a sample of the batch has many."""
        return (self.dense.over if self.crowded(x, sae, threshold) else self.above)(x, sae, threshold)

    def relu(self, x: Tensor, sae) -> Codes:
        """Positive pre-activations; dense where a sample of the batch has many."""
        return self.over(x, sae, torch.zeros_like(sae.b_enc))

    def decode(self, codes: Codes, rows: Tensor) -> Tensor:
        """sum_i f_i rows_i: (B, D), for rows (F, D)."""
        if isinstance(codes, Dense):
            return self.dense.decode(codes, rows)
        offsets = None if isinstance(codes, FixedK) else codes.offsets
        return _Decode.apply(codes.indices, codes.values, offsets, rows, self.ops)

    def product(self, centred: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Pre-activations (B, F) in the kernel's precision."""
        if self.precision == torch.float32:
            return torch.addmm(b_enc, centred, W_enc.T)
        # The bias as two more columns, itself and what rounding leaves of it: nearly exact, without another pass.
        width, high = centred.shape[1], b_enc.to(self.precision)
        left = centred.new_empty(len(centred), width + 2, dtype=self.precision)
        right = W_enc.new_empty(len(W_enc), width + 2, dtype=self.precision)
        left[:, :width], left[:, width:] = centred, 1
        right[:, :width], right[:, width], right[:, width + 1] = W_enc, high, b_enc - high
        return left @ right.T


def rows_of(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """(N,) token of each entry, in row order, for slots (B, K) or ragged entries."""
    if offsets is None:
        return torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
    return torch.arange(len(offsets) - 1, device=indices.device).repeat_interleave(offsets.diff())


def largest_of_batch(ops, pre_acts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, indices and values of the ``count`` largest positive entries of (B, F); of ties the first in memory.

    A sample of rows gives a bound that about twice as many pass: one pass over the batch, then an exact choice.
    """
    sample = pre_acts[:: max(1, len(pre_acts) // 64)].flatten().float()
    rank = min(len(sample), -(-2 * count * len(sample) // pre_acts.numel()))
    bound = sample.kthvalue(len(sample) - rank + 1).values.clamp_min(0)
    offsets, indices, values = ops.above(pre_acts, bound.expand(pre_acts.shape[1]))
    if len(values) < count and bound > 0:
        offsets, indices, values = ops.above(pre_acts, torch.zeros_like(bound).expand(pre_acts.shape[1]))
    if len(values) <= count:
        return offsets, indices, values
    least = values.kthvalue(len(values) - count + 1).values
    kept, ties = values > least, (values == least).nonzero()[:, 0]
    kept[ties[: count - int(kept.sum())]] = True
    counts = torch.zeros(len(offsets) - 1, dtype=torch.int64, device=values.device)
    counts.index_add_(0, rows_of(indices, offsets), kept.long())
    return torch.cat([offsets[:1], counts.cumsum(0)]), indices[kept], values[kept]


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k, kernel):
        centred = x - b_dec
        values, indices = kernel.ops.topk(kernel.product(centred, W_enc, b_enc), k)
        ctx.kernel = kernel
        ctx.save_for_backward(centred, W_enc, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        centred, W_enc, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        return _encoder_gradients(ctx.kernel.ops, rows_of(indices, None), indices.flatten(), grad.flatten(), centred,
                                  W_enc)


class _Above(torch.autograd.Function):
    """Entries over a threshold (F,), or (for a number) the largest so many of the batch."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, bound, kernel):
        centred = x - b_dec
        pre_acts = kernel.product(centred, W_enc, b_enc)
        chosen = kernel.ops.above(pre_acts, bound) if isinstance(bound, Tensor) else \
            largest_of_batch(kernel.ops, pre_acts, bound)
        offsets, indices, values = chosen
        ctx.kernel = kernel
        ctx.save_for_backward(centred, W_enc, indices, offsets)
        ctx.mark_non_differentiable(offsets, indices)
        return offsets, indices, values

    @staticmethod
    def backward(ctx, _offsets, _indices, grad):
        centred, W_enc, indices, offsets = ctx.saved_tensors
        return _encoder_gradients(ctx.kernel.ops, rows_of(indices, offsets), indices, grad, centred, W_enc)


def _encoder_gradients(ops, rows, columns, grad, centred, W_enc):
    d_W, d_b = ops.transposed_product(rows, columns, grad, centred, len(W_enc))
    return None, d_W, d_b, -(d_b @ W_enc), None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, values, offsets, rows, ops):
        ctx.ops, ctx.ragged = ops, offsets is not None
        ctx.save_for_backward(indices, values, rows, *([offsets] if ctx.ragged else []))
        return torch.nn.functional.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=values,
                                                 include_last_offset=ctx.ragged)

    @staticmethod
    def backward(ctx, grad):
        indices, values, rows, *offsets = ctx.saved_tensors
        grad, places = grad.contiguous(), rows_of(indices, offsets[0] if ctx.ragged else None)
        columns, d_values, d_rows = indices.flatten(), None, None
        if ctx.needs_input_grad[1]:
            d_values = ctx.ops.gathered_dots(places, columns, grad, rows).view_as(values)
        if ctx.needs_input_grad[3]:
            d_rows, _ = ctx.ops.transposed_product(places, columns, values.flatten(), grad, len(rows))
        return None, d_values, None, d_rows, None
