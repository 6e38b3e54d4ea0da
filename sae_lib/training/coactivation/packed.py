"""Pair statistics that scale: packed triangles of 16-bit numbers, worked on a row at a time (``loops``).

The pairs of latent i with j >= i stand together. The Gram matrix of a batch exists one row at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_lib.sae.codes import CSR
from sae_lib.training.coactivation import loops
from sae_lib.training.coactivation.rule import Rule

LARGEST_WINDOW = 65535
"""Counts have 16 bits."""
NO_MEMBERS, NO_BLOCKS = np.zeros((0, 1), np.int64), np.zeros((0, 1, 1), np.float32)
"""No groups of latents whose weights are asked for."""


class PackedPairs:
    """The state of the windows: 4 bytes a pair (counts and averages of 16 bits), or 6 with float32 averages."""

    def __init__(self, n_latents: int, rule: Rule, precise: bool = False):
        self.n_latents, self.rule, self.tokens, self.windows = n_latents, rule, 0, 0
        size = -(-n_latents * (n_latents + 1) // 8) * 4  # a whole number of four counts
        self.counts = torch.zeros(size, dtype=torch.uint16)
        self.average = torch.zeros(size, dtype=torch.float32 if precise else torch.uint16)
        self.fired = np.zeros(n_latents, np.int64)
        """Firings of each latent in the open window."""
        self.stability: Tensor | None = None
        """(F,) at the last closing: mean over partners of 1 - |c - c_avg| / max, weighted by their count."""
        self.pair_stability = 0.0
        """The same over all pairs."""

    def log(self) -> dict[str, float]:
        """Stability at the last window's end, of its pairs and of its latents."""
        if self.stability is None or not bool((self.stability > 0).any()):
            return {}
        low, median, high = self.stability[self.stability > 0].quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        return {"stability/pairs": self.pair_stability, "stability/latents, lowest tenth": low,
                "stability/latents, median": median, "stability/latents, highest tenth": high}

    @property
    def bytes(self) -> int:
        """Memory of the state."""
        return sum(part.numel() * part.element_size() for part in (self.counts, self.average))

    def term(self, codes: CSR, power: int, diagonal: bool) -> Tensor:
        """Count a batch's tokens, and sum over pairs i != j of w_ij |G_ij|^power, G = f^T f / B; see ``DensePairs``.

        Differentiable in the codes' values.
        """
        return _Term.apply(codes.values, self._step, codes, power, diagonal)

    def block_weights(self, codes: CSR, members: Tensor) -> Tensor:
        """Count a batch's tokens, and give the step's weights (n, size, size) of the pairs within each of some
        groups of latents (n, size); entries of -1 are empty."""
        blocks = np.zeros((*members.shape, members.shape[1]), np.float32)
        self._step(codes, 1, False, members.numpy(), blocks)
        return torch.from_numpy(blocks)

    def _step(self, codes, power, diagonal, members=NO_MEMBERS, blocks=NO_BLOCKS):
        """Value and gradient of the term; with groups of latents their weights, into ``blocks``, instead."""
        rule, batch = self.rule, len(codes.offsets) - 1
        ends, lengths, left = rule.closings(self.tokens, batch)
        rows = Rows(codes)
        fired = rows.fired_between(ends, self.n_latents)
        fired[0] += self.fired
        self.fired = fired[-1]
        group, place = np.full(self.n_latents, -1, np.int64), np.zeros(self.n_latents, np.int64)
        there = members >= 0
        group[members[there]], place[members[there]] = np.nonzero(there)
        steady = np.zeros((2, loops.CHUNKS, self.n_latents), np.float32)
        value, grads = loops.windows(
            *rows.arrays, self.counts.view(torch.int64).numpy(), self.counts.numpy(), self.average.numpy(),
            np.array(ends, np.int64), np.array(lengths, np.int64), fired[:-1],
            lengths[-1] if ends else left, batch, self.windows,
            np.float32(rule.gamma), power, diagonal, rule.after_reset, rule.latent_rate, rule.decay_absent, group,
            place, members, blocks, steady)
        if ends:
            total = steady.sum(1)
            self.stability = torch.from_numpy(total[0] / np.maximum(total[1], 1e-30))
            self.pair_stability = float(total[0].sum() / max(total[1].sum(), 1e-30))
        self.tokens, self.windows = left, self.windows + len(ends)
        return value, rows.back(grads)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"counts": self.counts.view(torch.int16), "average": self.average.view(torch.int16),
                "fired": torch.from_numpy(self.fired), "open": torch.tensor([self.tokens, self.windows]),
                "stability": torch.zeros(0) if self.stability is None else self.stability,
                "pair_stability": torch.tensor(self.pair_stability, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""
        self.counts.copy_(state["counts"].view(torch.uint16))
        self.average.copy_(state["average"].view(self.average.dtype))
        self.fired = state["fired"].numpy()
        self.tokens, self.windows = state["open"].tolist()
        self.stability = state["stability"] if len(state["stability"]) else None
        self.pair_stability = float(state["pair_stability"])


class Rows:
    """A batch's entries in the order of their latents within each token, and each latent's entries in token order."""

    def __init__(self, codes: CSR):
        offsets, columns = codes.offsets.numpy(), codes.indices.numpy()
        start, entries, token, place = loops.ordered(offsets, columns, codes.n_latents)
        self.place, self.offsets = place, offsets
        in_order, values = np.empty(len(columns), np.uint32), np.empty(len(columns), np.float32)
        in_order[place], values[place] = columns, codes.values.detach().numpy()
        self.columns, self.values = in_order, values
        self.arrays = offsets, start, entries, token, in_order, values
        """Where tokens' entries start; where latents' start; those entries; each entry's token, latent and value."""

    def back(self, values: np.ndarray) -> Tensor:
        """Values of the sorted entries in the order of the codes."""
        return torch.from_numpy(values[self.place])

    def fired_between(self, ends: list[int], n_latents: int) -> np.ndarray:
        """(windows closing + 1, F): on how many of this batch's tokens a latent fired, by window; the open one last."""
        cuts = self.offsets[[0, *ends, len(self.offsets) - 1]]
        return np.stack([np.bincount(self.columns[a:b], minlength=n_latents) for a, b in zip(cuts[:-1], cuts[1:])])


class _Term(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, step, codes, *options):
        ctx.others = 2 + len(options)
        total, grads = step(codes, *options)
        ctx.save_for_backward(grads)
        return values.new_tensor(total)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], *[None] * ctx.others


def consecutive_term(codes: CSR, follows: Tensor, beta: float, power: int, diagonal: bool) -> Tensor:
    """The term with run 0's weights, from the batch alone (``dense.consecutive_weights``)."""
    def step(codes, *options):
        rows = Rows(codes)
        value, grads = loops.consecutive(*rows.arrays, follows.numpy(), len(follows), np.float32(beta), *options)
        return value, rows.back(grads)
    return _Term.apply(codes.values, step, codes, power, diagonal)


def follows(document: Tensor, position: Tensor) -> Tensor:
    """(B,) bool: whether the row before holds the token before, of the same document and block."""
    document, position = document.cpu().long(), position.cpu().long()
    same = torch.zeros(len(document), dtype=torch.bool)
    same[1:] = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    return same
