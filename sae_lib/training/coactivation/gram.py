"""Sum of squared dot products of latents' activation vectors, over the pairs that fire together: exact and sparse."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sae_lib.sae.codes import CSR
from sae_lib.training.coactivation import loops
from sae_lib.training.coactivation.packed import Rows


def gram_squares(codes: CSR) -> Tensor:
    """sum over i != j of (f_i . f_j)^2, f_i the column of latent i over the batch; gradients flow to ``codes.values``.

    Pairs that never fire together add nothing: the work is the number of co-activations.
    """
    return _GramSquares.apply(codes.values, codes)


class _GramSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, codes):
        rows = Rows(CSR(codes.offsets.cpu(), codes.indices.cpu(), codes.values.detach().cpu(), codes.n_latents))
        total, grads = _squares(*rows.arrays)
        ctx.save_for_backward(rows.back(grads).to(values))
        return values.new_tensor(total)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


@njit(**loops.COMPILED, parallel=True)
def _squares(offsets, start, entries, token, columns, values):
    n_latents, chunks = start.size - 1, loops.CHUNKS
    grads, totals = np.zeros((chunks, values.size), np.float32), np.zeros(chunks)
    for chunk in prange(chunks):
        gram, hits = np.zeros(n_latents, np.float32), np.zeros(n_latents, np.int32)
        touched, slope = np.empty(n_latents, np.uint32), np.zeros(n_latents, np.float32)
        for i in range(chunk, n_latents, chunks):
            count = loops.gather(i, start, entries, token, offsets, columns, values, gram, hits, touched)
            for t in range(count):
                j = touched[t]
                if j != i:
                    totals[chunk] += 2 * gram[j] * gram[j]
                    slope[j] = 4 * gram[j]
            loops.scatter(i, start, entries, token, offsets, columns, values, slope, grads[chunk])
            for t in range(count):
                gram[touched[t]], hits[touched[t]], slope[touched[t]] = 0, 0, 0
    return totals.sum(), grads.sum(0)
