"""JumpReLU's selection and its two pseudo-derivatives (Rajamanoharan et al. 2024, "Jumping Ahead", eq. 11 and 12).

f = a H(a - theta). With K(u) = 1 for |u| < 1/2, else 0, and bandwidth e: df/dtheta = -(theta / e) K((a - theta) / e),
dH/dtheta = -(1 / e) K((a - theta) / e). Only entries over theta - e/2 are ever touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.codes import CSR


def jumprelu(x: Tensor, sae, kernel, threshold: Tensor, bandwidth: float) -> tuple[CSR, Tensor]:
    """Codes of ``x`` (B, D) for a threshold (F,), and their mean L0, differentiable in the threshold.

    Entries within half a bandwidth under the threshold are kept with value 0: the threshold's gradient needs them.
    """
    near = kernel.above(x, sae, (threshold - bandwidth / 2).detach())
    own = threshold[near.indices]
    return (near.with_values(_Jump.apply(near.values, own, bandwidth)),
            _Step.apply(near.values.detach(), own, bandwidth).sum() / len(x))


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
