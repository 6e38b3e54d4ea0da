"""Which numbers a processor multiplies fast."""

import torch


def has_bfloat16(device: str) -> bool:
    """Whether a device ("cpu", "cuda") has instructions for bfloat16; without them it is ten times slower than float32.

    A rule, not a timing: a run that goes on after an interruption must go on in the same bits.
    """
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported()
