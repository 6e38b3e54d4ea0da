"""The pair term over decoder rows: which pairs weigh what is learnt from the codes, what overlaps are their cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.codes import CSR
from sae_lib.training.coactivation.packed import PackedPairs


def decoder_term(pairs: PackedPairs, codes: CSR, rows: Tensor, config, generator: torch.Generator) -> Tensor:
    """Count a batch's tokens, and estimate sum over i != j of w_ij |cos_ij|^power for decoder ``rows`` (F, D).

    Over random chunks of the latents, a fresh partition each time, scaled to be unbiased for all pairs. With the
    diagonal included its weights are added: the cosine of a row with itself has no slope.
    """
    n_latents = len(rows)
    size = min(config.chunk, n_latents)
    order = torch.randperm(n_latents, generator=generator)
    members = torch.nn.functional.pad(order, (0, -n_latents % size), value=-1).view(-1, size)
    weights = pairs.block_weights(codes, members).to(rows.device)
    own = weights.diagonal(dim1=1, dim2=2)
    of_diagonal = own.sum() if config.diagonal == "include" else 0
    own.zero_()
    unit = torch.nn.functional.normalize(rows, dim=1)[members.clamp_min(0).to(rows.device)]
    total = (weights * (unit @ unit.transpose(1, 2)).abs().pow(config.power)).sum()
    met = sum(int(n) * (int(n) - 1) for n in (members >= 0).sum(1))
    return total * (n_latents * (n_latents - 1) / met) + of_diagonal
