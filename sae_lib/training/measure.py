"""What training can know of an SAE: measures on held-out activations and on the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_lib import intervals
from sae_lib.metrics import explained_variance, explained_variance_by_part, mean_cos2
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context


@torch.no_grad()
def heldout(sae: SparseAutoencoder, rows, scale: float, size: int = 2048, within: bool = False) -> dict[str, Any]:
    """Measures of ``sae`` on the held-out ``rows`` of a store (N activations as the model gives them).

    ``mse`` is in training units (activations times ``scale``), per token, summed over D. ``within`` adds
    ``within_this_sae``: how far they rest on this text, drawn by block.
    """
    x, fired = rows.x, torch.zeros(sae.d_sae, dtype=torch.bool)
    active, parts = [], []
    for ctx in passes(sae, x, size):
        parts.append((ctx.reconstruction / sae.input_scale).cpu())
        fired |= ctx.fired.cpu()
        active.append(ctx.codes.active().cpu())
    x_hat = torch.cat(parts)
    norms = x.norm(dim=1).clamp_min(1e-12)
    by_token = {"l0": torch.cat(active).double(), "mse": (scale * (x - x_hat)).square().sum(1).double(),
                "norm_ratio": (x_hat.norm(dim=1) / norms).double()}
    found = {"explained_variance": explained_variance(x, x_hat), **{k: float(v.mean()) for k, v in by_token.items()},
            "unused_share": float((~fired).double().mean()), "heldout_tokens": len(x)}
    return found | ({"within_this_sae": _within(x, x_hat, by_token, rows.block)} if within else {})


def _within(x: Tensor, x_hat: Tensor, by_token: dict[str, Tensor], block: Tensor) -> dict[str, object]:
    """Intervals of explained variance and of means over tokens; empty where there are fewer than two blocks."""
    which = block.long().unique(return_inverse=True)[1]
    n = int(which.max()) + 1 if len(which) else 0
    if n < 2:
        return {}
    x, x_hat = x.double(), x_hat.double()
    columns = {"rows": torch.ones(len(x), dtype=torch.float64), "squares": x.square().sum(1),
               "error": (x - x_hat).square().sum(1), **by_token}
    sums = {name: torch.zeros(n, dtype=torch.float64).index_add_(0, which, column).numpy()
            for name, column in columns.items()}
    total = torch.zeros(n, x.shape[1], dtype=torch.float64).index_add_(0, which, x).numpy()

    def figures(weights):
        means = {name: (weights @ sums[name]) / (weights @ sums["rows"]) for name in by_token}
        return means | {"explained_variance": explained_variance_by_part(total, sums["squares"], sums["error"],
                                                                         sums["rows"], weights)}
    return intervals.within(intervals.BLOCKS, intervals.spread(n, figures))


def batch_variance(ctx: Context) -> float:
    """Per token, summed over D: what predicting the batch's mean leaves (weighted where tokens are)."""
    weight = torch.ones(len(ctx.x), device=ctx.x.device) if ctx.importance is None else ctx.importance
    mean = (weight[:, None] * ctx.x).sum(0) / weight.sum()
    return float((weight * (ctx.x - mean).square().sum(1)).sum() / len(ctx.x))


def passes(sae: SparseAutoencoder, x: Tensor, block: int = 2048) -> Iterator[Context]:
    """Forward passes of ``sae`` on ``x`` (N, D), activations as the model gives them, ``block`` rows at a time."""
    for part in x.split(block):
        yield sae.run(Context(sae, part.to(sae.W_dec.device) * sae.input_scale))


@torch.no_grad()
def weights(sae: SparseAutoencoder, x: Tensor) -> dict[str, Any]:
    """Measures of the weights: decoder cosines, unit rows, finiteness."""
    finite = all(bool(part.isfinite().all()) for part in sae.parameters())
    return {"mean_cos2": mean_cos2(sae.W_dec.cpu()), "fold_error": fold_error(sae, x[:1024]),
            "nonfinite": None if finite else "weights are not finite"}


@torch.no_grad()
def fold_error(sae: SparseAutoencoder, x: Tensor) -> float:
    """Relative change of the reconstruction when decoder norms are folded into the code.

    0 for unit rows. Where rows differ in norm, TopK then selects other latents, and every evaluation that
    normalises the decoder sees another SAE than the one that was trained.
    """
    norms = sae.W_dec.norm(dim=1).clamp_min(1e-12)
    further = {name: part * norms if name in sae.architecture.scales_as_input else part
               for name, part in sae.further.items()}
    other = SparseAutoencoder(sae.W_enc * norms[:, None], sae.b_enc * norms, sae.W_dec / norms[:, None], sae.b_dec,
                              sae.architecture, sae.input_scale, further)
    other.hooks, other.kernel = sae.hooks, sae.kernel
    x = x.to(sae.W_dec.device)
    before = sae(x)
    return float((before - other(x)).norm() / before.norm().clamp_min(1e-12))


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point (D,) with the least summed distance to the rows of ``x`` (N, D), by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-8)
        moved = (weight[:, None] * x).sum(0) / weight.sum()
        done = (moved - point).norm() <= tolerance * point.norm().clamp_min(1e-12)
        point = moved
        if done:
            break
    return point
