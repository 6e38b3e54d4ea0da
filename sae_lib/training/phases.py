"""What the weights and the codes look like at the end of each third of training: early, middle, late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lib import runs
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training.coactivation.counting import EDGES, codes_of, count

NAMES = ("early", "middle", "late")
SAMPLED, BINS = 4096, 100
"""Latents among which cosines are counted, and bins of |cos| from 0 to 1."""


def ends(total_steps: int) -> dict[int, str]:
    """The step after which each third is over."""
    return {total_steps * (number + 1) // 3: name for number, name in enumerate(NAMES) if total_steps >= 3}


@torch.no_grad()
def measure(sae: SparseAutoencoder, x: Tensor, name: str, step: int, folder: Path | None) -> dict[str, Any]:
    """Histograms of |cos| between decoder rows, and of co-activation on tokens ``x`` (T, D) as the model gives them.

    Where there is a ``folder`` the pairs are kept there too, as ``<name>.npz``, and decoder rows in bfloat16.
    """
    counts = count(codes_of(sae, x))
    if folder is not None:
        counts.save(folder, name)
        if name != NAMES[-1]:  # the last is the SAE's own
            with runs.whole(folder / f"{name}.safetensors") as temporary:
                save_file({"W_dec": sae.W_dec.detach().bfloat16().cpu().contiguous()}, temporary)
    cosines = cosine_histogram(sae.W_dec)
    return {"phase": name, "step": step, "tokens": counts.tokens, "pairs_seen": counts.seen,
            "cosines": {"edges": np.linspace(0, 1, BINS + 1).tolist(), "pairs": cosines.tolist()},
            "overlap": {"edges": EDGES.tolist(), "pairs": counts.overlap.tolist()}}


def cosine_histogram(rows: Tensor) -> Tensor:
    """(BINS,) pairs i < j by |cos|, among the first SAMPLED rows of (F, D): a latent's number says nothing of it."""
    unit = torch.nn.functional.normalize(rows[:SAMPLED].detach().float(), dim=1)
    total = torch.zeros(BINS)
    for start in range(0, len(unit), 1024):
        cosines = (unit[start:start + 1024] @ unit[start:].T).abs().triu(1)
        kept = torch.ones_like(cosines, dtype=torch.bool).triu(1)
        total += torch.histc(cosines[kept].clamp_max(1).cpu(), BINS, 0, 1)
    return total
