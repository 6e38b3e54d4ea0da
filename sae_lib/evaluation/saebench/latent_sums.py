"""What SCR and TPP need of an SAE, from one encoding of each text: sums of its latents over the tokens.

SAEBench encodes and decodes every test text anew for each class and each number of latents that it ablates, dense and
padded. Decoding is linear in the latents, so that ablating the set A changes a text's mean activation by
- sum_(i in A) S_i W_dec[i] / n, with S_i the latent's sum over the text. B texts of L places, D wide, F latents.

As in SAEBench, padding (all zero) is decoded too: what an SAE gives for a zero activation counts in S, and not in n.
Equal to SAEBench's functions up to rounding. Not for SAEs whose ingredients change how they decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8192
"""Tokens that are encoded at once."""


class LatentSums:
    """Sums of an SAE's latents by text of the activations (B, L, D) that SAEBench passes; each is encoded once."""

    def __init__(self, sae):
        self.sae = sae
        self._held: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    @staticmethod
    def applies(sae) -> bool:
        """Whether latents decode by W_dec alone."""
        return not sae.hooks

    @torch.no_grad()
    def of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of ``x`` (B, L, D): sums over text (B, F), those of one place of padding (F,), places of text (B,), and of
        padding (B,)."""
        key = (x.data_ptr(), len(x))
        if key not in self._held:
            text = x.sum(-1) != 0
            rows, owner = x[text].float(), text.nonzero()[:, 0]
            sums = torch.zeros(len(x), self.sae.d_sae, device=x.device)
            for part, own in zip(rows.split(ROWS), owner.split(ROWS)):
                sums.index_add_(0, own, self.sae.encode(part))
            padding = self.sae.encode(torch.zeros(1, x.shape[-1], device=x.device))[0]
            count = text.sum(1)
            # The activations are held too: another tensor must not come to stand where this one did.
            self._held[key] = (sums, padding, count, x.shape[1] - count, x)
        return self._held[key][:4]

    def ablated(self, ablation_acts_BLD: Tensor, sae, to_ablate: Tensor, sae_batch_size: int) -> Tensor:
        """SAEBench's ``ablated_precomputed_activations``: mean activations (B, D), the latents (F,) bool ablated."""
        x = ablation_acts_BLD
        sums, padding, count, padded = self.of(x)
        gone = sums[:, to_ablate] + padded[:, None] * padding[to_ablate]
        return (x.sum(1) - (gone @ self.sae.W_dec[to_ablate]).to(x.dtype)) / count[:, None].to(x.dtype)

    @torch.no_grad()
    def effects(self, sae, probe, class_idx: str, precomputed_acts: dict[str, Tensor], perform_scr: bool,
                sae_batch_size: int) -> Tensor:
        """SAEBench's ``get_effects_per_class_precomputed_acts``: (F,) effects of the latents on a probe.

        The difference of mean latents between the class and others, times the probe's weight along the latent's row;
        absolute for SCR, and of positive differences alone for TPP.
        """
        from sae_bench.evals.scr_and_tpp import main
        from sae_bench.sae_bench_utils.dataset_info import POSITIVE_CLASS_LABEL

        means = {}
        for label, x in precomputed_acts.items():
            sums, _, count, _ = self.of(x)
            means[label] = sums / count[:, None]
        rows, labels = main.probe_training.prepare_probe_data(means, class_idx, perform_scr)
        inside = labels == POSITIVE_CLASS_LABEL
        dtype = next(iter(precomputed_acts.values())).dtype
        average = (rows[inside].mean(0) - rows[~inside].mean(0)).to(dtype)
        average = average if perform_scr else average.clamp(min=0)
        weight = probe.net.weight.to(dtype=dtype, device=average.device)
        found = (average * (weight @ self.sae.W_dec.T.to(dtype=dtype, device=average.device)).squeeze()).float()
        return found.abs() if perform_scr else found
