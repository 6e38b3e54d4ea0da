"""Squared errors of a Matryoshka reconstruction's prefixes: one pass forward and one back where torch's operations take
twenty.

With P_g what group g of the latents adds, S_g = P_0 + ... + P_g, and E_g = S_g + b_dec - x: the loss is the sum over
the prefixes short of the whole of |E_g|^2 / B, and its gradient on P_g is 2 / B (E_g + E_{g+1} + ...).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor


def prefixes(parts: Tensor, x: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all groups (B, D), and the prefixes' squared errors, averaged over tokens and summed.

    ``parts`` (B, groups, D), ``x`` (B, D) data, ``b_dec`` (D,).
    """
    return (_Prefixes if parts.device.type == "cpu" else _PrefixesByTorch).apply(parts, x, b_dec)


class _PrefixesByTorch(torch.autograd.Function):
    """The same by torch's operations, for another device than a CPU."""

    @staticmethod
    def forward(ctx, parts, x, b_dec):
        sums = parts.cumsum(1)
        errors = sums[:, :-1] + (b_dec - x)[:, None]
        ctx.save_for_backward(errors)
        return sums[:, -1].clone(), errors.square().sum() / len(x)

    @staticmethod
    def backward(ctx, grad, grad_loss):
        errors, = ctx.saved_tensors
        pull = errors * (2 * grad_loss / len(errors))
        after = pull.flip(1).cumsum(1).flip(1)
        return torch.cat([after, torch.zeros_like(grad)[:, None]], 1) + grad[:, None], None, pull.sum((0, 1))


class _Prefixes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, x, b_dec):
        count, groups, width = parts.shape
        whole, errors = parts.new_empty(count, width), parts.new_empty(count, groups - 1, width)
        squares = np.empty(count)
        _forward(parts.detach().contiguous().numpy(), x.contiguous().numpy(), b_dec.detach().numpy(), whole.numpy(),
                 errors.numpy(), squares)
        ctx.save_for_backward(errors)
        return whole, parts.new_tensor(squares.sum() / count)

    @staticmethod
    def backward(ctx, grad, grad_loss):
        errors, = ctx.saved_tensors
        scale = 2 * float(grad_loss) / len(errors)
        parts = errors.new_empty(len(errors), errors.shape[1] + 1, errors.shape[2])
        _backward(grad.contiguous().numpy(), errors.numpy(), errors.numpy().dtype.type(scale), parts.numpy())
        return parts, None, scale * errors.sum((0, 1)) if ctx.needs_input_grad[2] else None


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _forward(parts, x, b_dec, whole, errors, squares):
    count, groups, width = parts.shape
    for b in prange(count):
        total = np.float32(0)
        for d in range(width):
            whole[b, d] = parts[b, 0, d]
        for g in range(groups - 1):
            for d in range(width):
                error = whole[b, d] + b_dec[d] - x[b, d]
                errors[b, g, d] = error
                total += error * error
                whole[b, d] += parts[b, g + 1, d]
        squares[b] = total


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _backward(grad, errors, scale, parts):
    count, before, width = errors.shape
    for b in prange(count):
        for d in range(width):
            parts[b, before, d] = grad[b, d]
        for g in range(before - 1, -1, -1):
            for d in range(width):
                parts[b, g, d] = parts[b, g + 1, d] + scale * errors[b, g, d]
