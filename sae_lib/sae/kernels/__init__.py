"""Encode and decode behind one interface; ``pick`` chooses the form once per run.

A kernel has ``topk``, ``batch_topk``, ``above``, ``over``, ``relu`` (product and selection: codes of ``x`` (B, D)) and
``decode(codes, rows) -> (B, D)`` (without the bias). Every form gives the values and gradients of ``reference``.
"""

import torch

from sae_lib.precision import has_bfloat16
from sae_lib.sae.kernels.reference import Reference, reference
from sae_lib.sae.kernels.sparse import DENSE_FROM, Sparse

__all__ = ["Reference", "Sparse", "pick", "precision_of", "reference"]


def precision_of(asked: str, device: str) -> torch.dtype:
    """The encoder product's precision: ``auto`` takes bfloat16 where the processor multiplies it, else float32."""
    if asked != "auto":
        return getattr(torch, asked)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def pick(device: str, sparse: bool, precision: torch.dtype = torch.float32, density: float = 0.0):
    """The kernel for a device: ``sparse`` where nothing needs a gradient through all pre-activations.

    ``density`` is the share of latents that will be active, where it is known beforehand: many are dense work.
    """
    short = str(precision).removeprefix("torch.")
    if not sparse or density > DENSE_FROM:
        return Reference(precision)
    if device == "cpu":
        from sae_lib.sae.kernels import cpu as ops
    else:
        from sae_lib.sae.kernels import cuda as ops
    ops.same_threads()
    return Sparse(ops, precision, f"{device}_sparse_{short}")
