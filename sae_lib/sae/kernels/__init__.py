"""Encode and decode behind one interface; ``pick`` chooses the form once per run.

A kernel has ``topk(x, sae, k) -> FixedK`` (encoder product and selection) and ``decode(codes, rows) -> (B, D)``
(without the bias). Every form gives the same values and gradients as ``reference``.
"""

from sae_lib.sae.kernels import cpu, reference


def pick(device: str, sparse: bool):
    """The fastest kernel for a device: ``sparse`` where nothing needs a gradient through all pre-activations."""
    return cpu if sparse and device == "cpu" else reference
