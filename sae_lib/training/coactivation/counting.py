"""Which latents fire together, counted once over some tokens: the strongest pairs as a sparse matrix."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from scipy import sparse

from sae_lib import runs
from sae_lib.sae.codes import CSR
from sae_lib.training.coactivation.loops import CHUNKS, COMPILED, gather
from sae_lib.training.coactivation.packed import Rows
from sae_lib.training.measure import passes

LIMIT = 20_000_000
"""Pairs that are kept: all of them but for wide or hardly sparse SAEs."""
EDGES = np.concatenate([[0.0], np.logspace(-4, 0, 41)])
"""Bins of the overlap |A and B| / |A or B|, the first for what is under 1e-4."""


class Counts(NamedTuple):
    """Co-activation over ``tokens`` tokens."""

    pairs: sparse.csr_matrix
    """(F, F) int32, upper triangle: tokens on which both are active; the diagonal holds each latent's own firings."""
    tokens: int
    least: int
    """Pairs of fewer common tokens are left out."""
    seen: int
    """Pairs i < j with a common token at all."""
    overlap: np.ndarray
    """Pairs seen, by overlap |A and B| / |A or B| in bins of EDGES."""

    def save(self, folder: Path, name: str) -> None:
        """Write <name>.npz (scipy CSR) and <name>.json, each whole or not at all."""
        with runs.whole(folder / f"{name}.npz") as temporary, temporary.open("wb") as file:
            sparse.save_npz(file, self.pairs)
        runs.write_json(folder / f"{name}.json", {
            "tokens": self.tokens, "least": self.least, "pairs_seen": self.seen,
            "firings": self.pairs.diagonal().tolist(),
            "overlap": {"edges": EDGES.tolist(), "pairs": self.overlap.tolist()}})


def count(codes: CSR, limit: int = LIMIT) -> Counts:
    """Count the pairs of (T, F) codes; at most ``limit`` pairs i < j are kept, those of the most common tokens."""
    tokens, n_latents = len(codes.offsets) - 1, codes.n_latents
    rows = Rows(codes)
    arrays = rows.arrays
    own = np.diff(arrays[1])
    counted, overlap = _histograms(*arrays, own, tokens, EDGES[1:-1])
    above = np.cumsum(counted[::-1])[::-1]
    least = max(1, int(np.argmax(above <= limit)))
    sizes, nothing = np.zeros(n_latents, np.int64), np.zeros(0, np.int32)
    _emit(*arrays, least, False, sizes, nothing, nothing)
    kept = np.concatenate([[0], sizes.cumsum()])
    second, common = np.zeros((2, kept[-1]), np.int32)
    _emit(*arrays, least, True, kept, second, common)
    pairs = sparse.csr_matrix((common, second, kept), shape=(n_latents, n_latents))
    pairs.sort_indices()
    return Counts(pairs, tokens, least, int(counted[1:].sum()), overlap)


@njit(**COMPILED, parallel=True)
def _histograms(offsets, start, entries, token, columns, values, own, tokens, edges):
    """Pairs i < j by their number of common tokens, and by overlap."""
    n_latents = start.size - 1
    counted, overlap = np.zeros((CHUNKS, tokens + 2), np.int64), np.zeros((CHUNKS, edges.size + 1), np.int64)
    for chunk in prange(CHUNKS):
        hits, touched = np.zeros(n_latents, np.int32), np.empty(n_latents, np.uint32)
        gram = np.zeros(n_latents, np.float32)  # what gather also gives is not used here
        for i in range(chunk, n_latents, CHUNKS):
            for t in range(gather(i, start, entries, token, offsets, columns, values, gram, hits, touched)):
                j = touched[t]
                n = hits[j]
                hits[j] = 0
                if j != i:
                    counted[chunk, n] += 1
                    overlap[chunk, np.searchsorted(edges, n / (own[i] + own[j] - n), side="right")] += 1
    return counted.sum(0), overlap.sum(0)


@njit(**COMPILED, parallel=True)
def _emit(offsets, start, entries, token, columns, values, least, fill, kept, second, common):
    """Each row's pairs of ``least`` common tokens or more, and its diagonal: their number, then themselves."""
    n_latents = start.size - 1
    for chunk in prange(CHUNKS):
        hits, touched = np.zeros(n_latents, np.int32), np.empty(n_latents, np.uint32)
        gram = np.zeros(n_latents, np.float32)  # what gather also gives is not used here
        for i in range(chunk, n_latents, CHUNKS):
            place = kept[i] if fill else 0
            for t in range(gather(i, start, entries, token, offsets, columns, values, gram, hits, touched)):
                j = touched[t]
                if hits[j] >= least or j == i:
                    if fill:
                        second[place], common[place] = j, hits[j]
                    place += 1
                hits[j] = 0
            if not fill:
                kept[i] = place


def codes_of(sae, x: torch.Tensor) -> CSR:
    """Codes of activations (T, D) as the model gives them, on the CPU."""
    parts = [ctx.codes.csr() for ctx in passes(sae, x)]
    counts = torch.cat([part.offsets.diff() for part in parts]).cpu()
    return CSR(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), torch.cat([part.indices for part in parts]).cpu(),
               torch.cat([part.values for part in parts]).cpu(), sae.d_sae)
