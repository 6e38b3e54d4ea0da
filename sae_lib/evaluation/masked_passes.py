"""Masks of one SAE through the whole model: sums by block of text, from which every figure and its interval follow.

The model alone (its loss as it is, and with the activation ablated) runs once for all masks. N blocks of T tokens,
width D, M masks. As in SAEBench core, padding, EOS and BOS keep their activation and count in no mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lib import intervals
from sae_lib.evaluation import rerun
from sae_lib.evaluation.saebench import left_out
from sae_lib.evaluation.saebench.adapter import settings
from sae_lib.metrics import explained_variance_by_part
from sae_lib.progress import progress
from sae_lib.sae.context import Context
from sae_lib.sae.kept import keep

BATCH = 8
"""Blocks that the model reads at once."""


class Sums(NamedTuple):
    """Sums over each block's tokens, float64; NaN for a mask (or an SAE) that was not measured on a block."""

    clean: np.ndarray
    """(N,) cross-entropy of the model as it is, nats."""
    ablated: np.ndarray
    """(N,) cross-entropy with the activation 0 everywhere."""
    rows: np.ndarray
    """(N,) tokens that are no special ones."""
    total: np.ndarray
    """(N, D) sum of their activations."""
    squares: np.ndarray
    """(N,) sum of their squared norms."""
    loss: np.ndarray
    """(M, N) cross-entropy with the masked SAE's reconstruction in place."""
    error: np.ndarray
    """(M, N) sum of |x - x_hat|^2."""
    active: np.ndarray
    """(M, N) sum of active latents."""

    def figures(self, mask: int, chosen: list[bool]) -> dict[str, Any]:
        """Explained variance, loss recovered and L0 of a mask over the chosen blocks (N,), with intervals.

        The interval is a bootstrap over blocks; null where there are fewer than two. No loss is recovered (NaN) on
        blocks of which some ended at the hook.
        """
        own = np.flatnonzero(chosen)
        values = {name: float(found[0]) for name, found in self._of(mask, own, np.ones((1, len(own)))).items()}
        spread = intervals.spread(len(own), lambda weights: self._of(mask, own, weights)) if len(own) > 1 else {}
        interval = {name: intervals.interval(spread[name]) if spread and np.isfinite(values[name]) else None
                    for name in ("explained_variance", "loss_recovered")}
        return values | {"interval": interval}

    def _of(self, mask: int, own: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The figures (W,) of blocks counted as often as ``weights`` (W, n) say."""
        explained = explained_variance_by_part(self.total[own], self.squares[own], self.error[mask, own],
                                               self.rows[own], weights)
        gained = weights @ (self.ablated[own] - self.loss[mask, own])
        return {"explained_variance": explained,
                "loss_recovered": gained / (weights @ (self.ablated[own] - self.clean[own])),
                "l0": (weights @ self.active[mask, own]) / (weights @ self.rows[own])}


def run(sae, lm, blocks: Tensor, corpora: list[str], masks: list[tuple[Tensor, set[str]]], *, threads: int = 0,
        mode: str = "batch") -> Sums:
    """Sums of ``sae`` under each mask (F,) bool, on the blocks (N, T) whose corpus is among the mask's.

    ``lm`` is a whole LanguageModel, read at its hook; what it computes without an SAE is kept for the next SAE.
    """
    masked = [(keep(sae, kept.to(sae.W_dec.device)), wanted) for kept, wanted in masks]
    return run_each(masked, lm, blocks, corpora, "shares of the latents", threads=threads, mode=mode)


@torch.no_grad()
def run_each(saes: list[tuple[Any, set[str]]], lm, blocks: Tensor, corpora: list[str], what: str, *,
             to_hook: frozenset[str] = frozenset(), kept_with: Tensor | None = None, threads: int = 0,
             mode: str = "batch") -> Sums:
    """Sums of each SAE, all of one width, on the blocks (N, T) whose corpus is among its own; M is the SAE's place.

    On blocks of the corpora ``to_hook`` the model ends at the hook: their losses are NaN. ``what`` names the work. What
    the model alone gives is kept under the name of the blocks ``kept_with``: those of an evaluation that read the same.
    """
    batches = [(name, places) for name in dict.fromkeys(corpora)
               for places in torch.tensor([i for i, own in enumerate(corpora) if own == name]).split(BATCH)]
    found = _empty(len(blocks), saes[0][0].d_in, len(saes))
    work = sum(len(wanted & {name}) for name in corpora for _, wanted in saes) * blocks.shape[1]
    with (settings(threads), rerun.opened(lm, blocks if kept_with is None else kept_with) as model,
          progress(work, what, mode) as bar):
        special = left_out(model)
        for name, places in batches:
            tokens, place = blocks[places].to(lm.device), places.numpy()
            text = ~torch.isin(tokens, special)
            x = _without_sae(model, lm.hook, tokens, text, found, place, name not in to_hook)
            for number, (one, wanted) in enumerate(saes):
                if name in wanted:
                    _with_sae(model, lm.hook, tokens, text, one, found, number, place, x)
                    bar.advance(tokens.numel())
    return found


def _empty(blocks: int, width: int, masks: int) -> Sums:
    one, several = np.zeros(blocks), np.full((masks, blocks), np.nan)
    return Sums(one, one.copy(), one.copy(), np.zeros((blocks, width)), one.copy(), several, several.copy(),
                several.copy())


def _summed(values: Tensor, text: Tensor) -> np.ndarray:
    """(B,) sums of ``values`` (B, T or T - 1) over the tokens that count; a loss is that of predicting the next one."""
    return torch.where(text[:, :values.shape[1]], values.double(), 0).sum(1).cpu().numpy()


def _without_sae(model, hook: str, tokens: Tensor, text: Tensor, found: Sums, place: np.ndarray,
                 whole: bool) -> Tensor | None:
    """The activations' moments and, through the ``whole`` model, its own losses, into ``found``.

    Where the model ends at the hook, its activations (B, T, D).
    """
    def moments(x):
        kept = x.double() * text[..., None]
        found.rows[place], found.total[place] = text.sum(1).cpu().numpy(), kept.sum(1).cpu().numpy()
        found.squares[place] = kept.square().sum((1, 2)).cpu().numpy()

    def removed(x, hook):
        moments(x)
        return torch.zeros_like(x)

    if not whole:
        x = model.run_with_cache(tokens, names_filter=[hook])[1][hook]
        moments(x)
        found.clean[place] = found.ablated[place] = np.nan
        return x
    _, loss = model(tokens, return_type="both", loss_per_token=True)
    found.clean[place] = _summed(loss, text)
    _, loss = model.run_with_hooks(tokens, return_type="both", fwd_hooks=[(hook, removed)], loss_per_token=True)
    found.ablated[place] = _summed(loss.expand(len(tokens), -1), text)
    return None


def _with_sae(model, hook: str, tokens: Tensor, text: Tensor, sae, found: Sums, mask: int, place: np.ndarray,
              x: Tensor | None) -> None:
    """Error and active latents with the reconstruction in place, into ``found``; and the loss, unless ``x`` is given:

    the activations (B, T, D) of a model that ends at the hook.
    """
    def replaced(x, hook):
        ctx = sae.run(Context(sae, x.flatten(0, 1).float() * sae.input_scale))
        x_hat = (ctx.reconstruction / sae.input_scale).view_as(x)
        found.error[mask, place] = _summed((x.double() - x_hat.double()).square().sum(-1), text)
        found.active[mask, place] = _summed(ctx.codes.csr().offsets.diff().view(tokens.shape), text)
        return torch.where(text[..., None], x_hat.to(x.dtype), x)

    if x is not None:
        replaced(x, hook)
        return
    _, loss = model.run_with_hooks(tokens, return_type="both", fwd_hooks=[(hook, replaced)], loss_per_token=True)
    found.loss[mask, place] = _summed(loss, text)
