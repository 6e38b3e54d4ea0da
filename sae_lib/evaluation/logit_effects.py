"""What a latent writes towards: the tokens whose logits its decoder row raises and lowers most.

Direct effects: W_U diag(g) d, with d the decoder row, g the gain of the final norm and W_U the unembedding; the norm's
scale is left out, as it depends on the token (nostalgebraist 2020, "logit lens"; Elhage et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lib.data.language_model import LanguageModel, final_norm
from sae_lib.sae.kernels import cpu

CELLS = 2**26
"""Logits that are held at once."""


class Effects(NamedTuple):
    """The strongest effects of each latent on the logits, per unit of activation."""

    raised: Tensor
    """(F, n) token ids, the most raised first."""
    raised_by: Tensor
    """(F, n)"""
    lowered: Tensor
    """(F, n) token ids, the most lowered first."""
    lowered_by: Tensor
    """(F, n), negative."""


@torch.no_grad()
def logit_effects(rows: Tensor, model: LanguageModel, n: int = 10) -> Effects:
    """Effects of decoder ``rows`` (F, D) on the logits of a whole ``model``."""
    unembedding, norm = model.hf.get_output_embeddings().weight, final_norm(model.hf.base_model)
    rows = rows.float().to(unembedding.device)
    if isinstance(norm, nn.LayerNorm):  # it takes the mean away; an RMS norm does not
        rows = rows - rows.mean(1, keepdim=True)
    rows = (rows * gain(norm, unembedding)).to(unembedding.dtype)
    parts = []
    for part in rows.split(max(1, CELLS // len(unembedding))):
        logits = part @ unembedding.T
        raised_by, raised = _largest(logits, min(n, len(unembedding)))
        lowered_by, lowered = _largest(logits.neg_(), min(n, len(unembedding)))
        parts.append([tensor.cpu() for tensor in (raised, raised_by, lowered, -lowered_by)])
    return Effects(*(torch.cat(column) for column in zip(*parts)))


def _largest(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Values (B, n) float32, the largest first, and their indices."""
    if logits.device.type == "cpu":
        values, indices = cpu.topk(logits, n)  # of positive ones, in a tenth of the time
        if bool((values > 0).all()):
            values, order = values.sort(dim=1, descending=True, stable=True)
            return values, indices.gather(1, order)
    return logits.float().topk(n)


def gain(norm: nn.Module, like: Tensor) -> Tensor:
    """(D,) what the norm multiplies each dimension by, read off its values: Gemma's stores the gain less one."""
    d_model = like.shape[1]
    # Root mean square 1 and, for an even width, mean 0: neither kind of norm rescales it.
    signs = torch.ones(1, d_model, device=like.device, dtype=like.dtype)
    signs[:, 1::2] = -1
    return ((norm(signs) - norm(-signs)) * signs / 2)[0].float()
