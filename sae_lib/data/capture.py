"""Blocks through the model: which rows are kept, and what is measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lib.data.language_model import LanguageModel, import_transformers
from sae_lib.data.store import Batch
from sae_lib.params import ParameterError

BINS = torch.logspace(-2, 3, 201, dtype=torch.float64)
"""Edges of the norm histogram, in medians, evenly spaced on a log axis; what lies outside is counted in the first or
last bin."""
MOST_ROWS = 512
"""Rows read at once after what they have in common, about: its keys and values are in memory for each."""
MEDIAN_TOKENS = 4096
"""Tokens at the beginning of the text, whose median norm is the measure for outliers; so many give it within 1 %."""


class Measured(NamedTuple):
    """Sums over the text tokens of some blocks; they add up over shards."""

    rows: int
    """Rows kept."""
    bos_dropped: int
    special_dropped: int
    outliers_dropped: int
    total: list[float]
    """(D,) sum of the kept rows."""
    squares: float
    """Sum of the kept rows' squared norms."""
    histogram: list[int]
    """Norms of all text tokens, outliers included, in BINS."""


def blocks_per_batch(model: LanguageModel, context: int) -> int:
    """Blocks of ``context`` tokens that the model reads at once: 1,024 tokens on a CPU, 32,768 on a GPU.

    On a CPU few enough that a layer's values stay in its cache. SmolLM2's first nine blocks on two cores, tokens/s in
    bfloat16 and float32: 1,024 tokens 4,750 and 2,630; 4,096 tokens 4,310 and 2,350.
    """
    return max((32_768 if model.device.type == "cuda" else 1024) // context, 1)


@torch.no_grad()
def last_residuals(model: LanguageModel, tokens: torch.Tensor,
                   advance: Callable[[int], None] | None = None) -> torch.Tensor:
    """Residual stream (B, D), float32 on the CPU, at the last token of each row of ids (B, T).

    What rows have in common before it is read once: rows that differ in their last token alone cost a token each.
    ``advance`` is told how many rows were read each time.
    """
    before, owner = tokens[:, :-1].unique(dim=0, return_inverse=True)
    in_common = 2 * len(before) <= len(tokens)
    together = min(blocks_per_batch(model, tokens.shape[1]), MOST_ROWS * len(before) // len(tokens)) or 1
    found = torch.empty(len(tokens), model.d_model)
    for first in range(0, len(before), together):
        rows = ((owner >= first) & (owner < first + together)).nonzero()[:, 0]
        if in_common:
            cache = import_transformers().DynamicCache()
            model.residual(before[first:first + together], cache)
            cache.batch_select_indices((owner[rows] - first).to(model.device))
            x = model.residual(tokens[rows, -1:], cache)
        else:
            x = model.residual(tokens[rows])
        found[rows] = x[:, -1].float().cpu()
        if advance is not None:
            advance(len(rows))
    return found


def is_text(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """(N, T) bool: neither position 0 nor a special token."""
    text = ~torch.isin(tokens, torch.tensor(sorted(model.special_ids), dtype=tokens.dtype))
    text[:, 0] = False
    return text


def median_norm(model: LanguageModel, blocks: np.ndarray) -> float:
    """Median norm of text tokens in the first MEDIAN_TOKENS of blocks (N, T): the measure for outliers.

    Raises ParameterError when there is no text among them or norms are not finite.
    """
    size, norms = blocks_per_batch(model, blocks.shape[1]), []
    blocks = blocks[:-(-MEDIAN_TOKENS // blocks.shape[1])]
    for start in range(0, len(blocks), size):
        tokens = torch.from_numpy(blocks[start:start + size]).long()
        norms.append(model.residual(tokens).float().norm(dim=-1).cpu()[is_text(model, tokens)])
    every = torch.cat(norms)
    if not len(every) or not math.isfinite(median := every.median().item()) or median <= 0:
        raise ParameterError(f"corpus: no text tokens with a finite activation in the first {len(blocks):,} blocks at "
                             f"{model.hook} of '{model.name}' in {model.dtype}; try dtype: float32 or another corpus")
    return median


def capture(model: LanguageModel, blocks: np.ndarray, documents: np.ndarray, first_block: int, median: float,
            max_norm_ratio: float) -> tuple[Batch, Measured]:
    """Rows of a few blocks (N, T) that are kept, x in the model's dtype, and their sums."""
    tokens = torch.from_numpy(blocks).long()
    residual = model.residual(tokens)
    text = is_text(model, tokens)
    norm = residual.float().norm(dim=-1).cpu()
    keep = text & (norm <= max_norm_ratio * median)  # a norm that is not a number is dropped, too
    block, position = keep.nonzero(as_tuple=True)
    x = residual[keep.to(residual.device)]  # summed where it is: a GPU is quicker at it
    batch = Batch(x.cpu(), tokens[keep].int(), torch.from_numpy(documents)[keep].int(), (block + first_block).int(),
                  position.int())
    wide = x.double()
    bins = torch.bucketize((norm[text] / median).double(), BINS[1:-1], right=True)
    counts = torch.bincount(bins, minlength=len(BINS) - 1)
    bos, rows, of_text = len(tokens), len(x), int(text.sum())
    return batch, Measured(rows, bos, tokens.numel() - bos - of_text, of_text - rows, wide.sum(0).tolist(),
                           wide.square().sum().item(), counts.tolist())


def add(parts: list[Measured]) -> Measured:
    """Sums of several parts, in their order."""
    columns = list(zip(*parts))
    counts = [sum(column) for column in columns[:4]]
    return Measured(*counts, np.sum(columns[4], axis=0).tolist(), float(sum(columns[5])),
                    np.sum(columns[6], axis=0).tolist())


def statistics(measured: Measured, median: float, max_norm_ratio: float) -> dict[str, Any]:
    """What a manifest says of the training rows: mean, scale, norms, counts.

    ``scale`` makes the mean squared norm equal d_in. Raises ParameterError when no row was kept.
    """
    if not measured.rows:
        raise ParameterError("max_norm_ratio: every text token was dropped; raise it, or choose another corpus")
    d_in, rows = len(measured.total), measured.rows
    return {"mean": [value / rows for value in measured.total], "scale": math.sqrt(d_in * rows / measured.squares),
            "rms_norm": math.sqrt(measured.squares / rows), "median_norm": median,
            "norm_histogram": _trimmed(measured.histogram, median, max_norm_ratio),
            "counts": {"rows": rows, "bos_dropped": measured.bos_dropped, "special_dropped": measured.special_dropped,
                       "outliers_dropped": measured.outliers_dropped}}


def _trimmed(counts: list[int], median: float, max_norm_ratio: float) -> dict[str, Any]:
    """The histogram without its empty ends, the limit still in sight; edges are for a log axis."""
    used = np.flatnonzero(counts)
    first, last = used[0], max(used[-1], int(np.searchsorted(BINS.numpy(), max_norm_ratio)))
    first, last = max(int(first) - 2, 0), min(int(last) + 2, len(counts))
    return {"edges": (BINS[first:last + 1] * median).tolist(), "counts": counts[first:last], "median": median,
            "limit": max_norm_ratio * median}
