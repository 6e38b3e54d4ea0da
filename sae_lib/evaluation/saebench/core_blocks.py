"""SAEBench core's means taken apart by block of text, as they pass by: what its intervals are drawn from.

Nothing is run for it. Cross-entropy and KL per token are what SAEBench's own ``get_recons_loss`` returns; L0, norms
and cosines per token are computed beside its own, in its words. N blocks, D wide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sae_lib import intervals
from sae_lib.metrics import explained_variance_by_part


class Blocks:
    """Sums and counts by block: of the model's outputs, of the hook's tokens, and of explained variance's rows."""

    def __init__(self):
        self.through_model = False
        """Whether SAEBench is at its passes through the whole model; else it reads the hook alone."""
        self._sums: dict[str, list[np.ndarray]] = {}
        self._counts: dict[str, list[np.ndarray]] = {}
        self._rows: list[tuple[Tensor, ...]] = []

    def recording(self, own: Callable) -> Callable:
        """SAEBench's ``get_recons_loss``, whose values per token (B, T or T - 1) are summed by block."""
        def get_recons_loss(sae, model, batch_tokens, *args, ignore_tokens=frozenset(), **options):
            """SAEBench's own, its values noted."""
            self.through_model = True
            try:
                found = own(sae, model, batch_tokens, *args, ignore_tokens=ignore_tokens, **options)
            finally:
                self.through_model = False
            special = torch.tensor([t for t in ignore_tokens if t is not None], device=batch_tokens.device)
            for name, values in found.items():
                self._add(name, values, ~torch.isin(batch_tokens, special)[:, :values.shape[1]])
            return found
        return get_recons_loss

    def hook(self, x: Tensor, latents: Tensor, x_hat: Tensor, text: Tensor) -> None:
        """What SAEBench computes at the hook of x (B, T, D) and its reconstruction, at the tokens ``text`` (B, T)."""
        if self.through_model:
            return
        norm, norm_out = x.norm(dim=-1), x_hat.norm(dim=-1)
        self._add("l0", (latents != 0).sum(-1), text)
        self._add("l1", latents.sum(-1), text)
        self._add("l2_norm_out", norm_out, text)
        self._add("l2_ratio", norm_out / torch.where(norm < 1e-4, 1, norm), text)
        self._add("cossim", ((x / norm[..., None]) * (x_hat / norm_out[..., None])).sum(-1), text)

    def rows(self, x: Tensor, x_hat: Tensor, text: Tensor, room: int) -> None:
        """Moments by block of the first ``room`` rows of (B, T, D) at ``text``: those of explained variance."""
        kept = text & (text.flatten().cumsum(0).view(text.shape) <= room)
        x, x_hat = (part.double() * kept[..., None] for part in (x, x_hat))
        self._rows.append((kept.sum(1), x.sum(1), x.square().sum((1, 2)), (x - x_hat).square().sum((1, 2))))

    def _add(self, name: str, values: Tensor, text: Tensor) -> None:
        kept = torch.where(text, values.double(), 0)
        self._sums.setdefault(name, []).append(kept.sum(1).cpu().numpy())
        self._counts.setdefault(name, []).append(text.sum(1).cpu().numpy())

    def figures(self) -> dict[str, float]:
        """The figures that all blocks give together: SAEBench's own, and our explained variance."""
        return {name: float(values[0]) for part in self._parts()
                for name, values in part[1](np.ones((1, part[0]))).items()}

    def within(self) -> dict[str, object]:
        """The report's ``within_this_sae``; empty where there are fewer than two blocks of a part."""
        drawn = {}
        for n, figures in self._parts():
            drawn |= intervals.spread(n, figures) if n > 1 else {}
        return intervals.within(intervals.BLOCKS, drawn)

    def _parts(self) -> list[tuple[int, Callable]]:
        """Number of blocks, and figures over weights (W, n), of each part: other blocks each, but the last's."""
        sums, counts = ({name: np.concatenate(parts) for name, parts in held.items()}
                        for held in (self._sums, self._counts))
        hook = [name for name in sums if "_with" not in name]
        model = [name for name in sums if "_with" in name]
        rows = [torch.cat(parts).cpu().numpy().astype(float) for parts in zip(*self._rows)]

        def means(names, weights):
            return {name: (weights @ sums[name]) / (weights @ counts[name]) for name in names}

        def passes(weights):
            m = means(model, weights)
            gained = m["ce_loss_with_ablation"] - m["ce_loss_with_sae"]
            score = gained / (m["ce_loss_with_ablation"] - m["ce_loss_without_sae"])
            kl = (m["kl_div_with_ablation"] - m["kl_div_with_sae"]) / m["kl_div_with_ablation"]
            return {"ce_loss_score": score, "kl_div_score": kl, "ce_loss_with_sae": m["ce_loss_with_sae"],
                    "kl_div_with_sae": m["kl_div_with_sae"]}

        def variance(weights):
            n, total, squares, error = rows
            return {"explained_variance": explained_variance_by_part(total, squares, error, n, weights)}

        return [(len(sums[model[0]]), passes), (len(sums["l0"]), lambda weights: means(hook, weights)),
                (len(rows[0]), variance)]
