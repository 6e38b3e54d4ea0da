"""TopK on a CPU: one dense product (the encoder's); everything after the selection is sparse.

Backward, with g the gradient at the B x K active latents and R the residual's gradient (B, D):
d W_enc = G^T (x - b_dec) and d W_dec = F^T R as sparse (F x B) times dense (B x D) products; g itself from
gathered decoder rows. No F-wide gradient is ever formed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sae_lib.sae.codes import Codes, FixedK
from sae_lib.sae.kernels import reference

name = "cpu_sparse"
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")


def topk(x: Tensor, sae, k: int) -> FixedK:
    """The k largest pre-activations of each row of ``x`` (B, D), through ReLU; sparse backward."""
    values, indices = _EncodeTopK.apply(x, sae.W_enc, sae.b_enc, sae.b_dec, k)
    return FixedK(indices, values, sae.d_sae)


def decode(codes: Codes, rows: Tensor) -> Tensor:
    """sum_i f_i rows_i: (B, D); sparse backward for fixed-k codes, dense otherwise."""
    if not isinstance(codes, FixedK):
        return reference.decode(codes, rows)
    return _Decode.apply(codes.indices, codes.values, rows)


def _transposed_product(indices: Tensor, values: Tensor, dense: Tensor, n_latents: int) -> Tensor:
    """C^T dense for the sparse codes C (B x F) given as (B, K) slots: (F, D)."""
    flat = indices.flatten()
    order = torch.argsort(flat, stable=True)
    rows = torch.cat([flat.new_zeros(1), torch.bincount(flat, minlength=n_latents).cumsum(0)])
    transposed = torch.sparse_csr_tensor(rows, order // indices.shape[1], values.flatten()[order],
                                         (n_latents, len(indices)))
    return transposed @ dense


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k):
        centred = x - b_dec
        values, indices = torch.addmm(b_enc, centred, W_enc.T).topk(k, dim=1, sorted=False)
        values = values.relu_()
        ctx.save_for_backward(centred, W_enc, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        centred, W_enc, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        d_W = _transposed_product(indices, grad, centred, len(W_enc))
        d_b = torch.zeros_like(W_enc[:, 0]).index_add_(0, indices.flatten(), grad.flatten())
        return None, d_W, d_b, -(d_b @ W_enc), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, values, rows):
        ctx.save_for_backward(indices, values, rows)
        return torch.nn.functional.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        indices, values, rows = ctx.saved_tensors
        grad = grad.contiguous()
        count, k = indices.shape
        offsets = torch.arange(0, count * k, k)
        bags = torch.repeat_interleave(torch.arange(count), k)
        # <grad_b, rows_i> for the active pairs only; the operator behind embedding_bag's own backward, without
        # its dense weight gradient.
        d_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, rows, indices.flatten(), offsets, bags, 0).view(count, k)
        d_rows = _transposed_product(indices, values, grad, len(rows)) if ctx.needs_input_grad[2] else None
        return None, d_values, d_rows
