"""JumpReLU's selection and its two pseudo-derivatives (Rajamanoharan et al. 2024, "Jumping Ahead", eq. 11 and 12).

f = a H(a - theta). With K(u) = 1 for |u| < 1/2, else 0, and bandwidth e: df/dtheta = -(theta / e) K((a - theta) / e),
dH/dtheta = -(1 / e) K((a - theta) / e). Only entries over theta - e/2 are ever touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.codes import Codes, Dense


def jumprelu(x: Tensor, sae, kernel, threshold: Tensor, bandwidth: float) -> tuple[Codes, Tensor]:
    """Codes of ``x`` (B, D) for a threshold (F,); and 1 for each active entry, differentiable in the threshold.

    Entries within half a bandwidth under the threshold are kept with value 0: the threshold's gradient needs them.
    """
    bound = (threshold - bandwidth / 2).detach()
    if kernel.crowded(x, sae, bound):
        pre_acts = kernel.pre_activations(x, sae)
        values, active = jump(pre_acts, threshold.expand_as(pre_acts), bandwidth)
        return Dense(values), active
    near = kernel.above(x, sae, bound)
    values, active = jump(near.values, threshold[near.indices], bandwidth)
    return near.with_values(values), active


def jump(values: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """f = a H(a - theta) and H(a - theta), entry by entry."""
    return _Jump.apply(values, threshold, bandwidth), _Step.apply(values.detach(), threshold, bandwidth)


def _near(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((values - threshold).abs() < bandwidth / 2) / bandwidth


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, threshold, bandwidth):
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values, threshold)
        return values * (values > threshold)

    @staticmethod
    def backward(ctx, grad):
        values, threshold = ctx.saved_tensors
        return grad * (values > threshold), -grad * threshold * _near(values, threshold, ctx.bandwidth), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, threshold, bandwidth):
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values, threshold)
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx, grad):
        values, threshold = ctx.saved_tensors
        return None, -grad * _near(values, threshold, ctx.bandwidth), None
