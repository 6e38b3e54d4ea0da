"""Pairs of latents of one run, as its snapshots keep them: an overview of all, a block around one latent.

Measures: ``count`` n of tokens on which both fire; ``rate`` n / T; ``Jaccard`` n / (n_i + n_j - n); ``lift``
n T / (n_i n_j), 1 for independent latents; ``decoder cosine``; ``stability`` min / max of a pair's rate here and at the
snapshot before, which is 1 - |c - c'| / max(c, c').
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from scipy import sparse
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from sae_lib import runs
from sae_lib.evaluation import pooling
from sae_lib.sae.codes import CSR
from sae_lib.training.coactivation import counting
from sae_lib.training.phases import NAMES

MEASURES = (*pooling.MEASURES, "decoder cosine", "stability")
CELLS, LARGEST_BLOCK = 512, 512


class Snapshot:
    """Pairs at one moment of training; files are read when first asked for."""

    def __init__(self, folder: Path, name: str, step: int | None, run: runs.Run):
        self.folder, self.name, self.step, self.run = folder, name, step, run

    @functools.cached_property
    def matrix(self) -> sparse.csr_matrix:
        """(F, F) int32, upper triangle, each latent's own firings on the diagonal. Raises RunError where damaged."""
        try:
            found = sparse.csr_matrix(sparse.load_npz(self.folder / f"{self.name}.npz"))
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise runs.RunError(f"{self.folder / self.name}.npz: damaged ({error}); run 02 again") from None
        if not found.has_sorted_indices:
            found.sort_indices()
        return found

    @functools.cached_property
    def about(self) -> dict:
        """tokens, least, pairs_seen of the count."""
        return runs.read_json(self.folder / f"{self.name}.json")

    @functools.cached_property
    def own(self) -> np.ndarray:
        """(F,) firings of each latent; without reading the pairs where they were noted apart."""
        noted = None if "matrix" in self.__dict__ else self.about.get("firings")
        return (self.matrix.diagonal() if noted is None else np.array(noted)).astype(np.int64)

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """(F, D) unit decoder rows at this moment. Raises RunError where they were not kept."""
        try:
            with safe_open(self._rows_file, "pt") as held:
                rows = held.get_tensor("W_dec").float()
        except (OSError, SafetensorError) as error:
            raise runs.RunError(f"{self.run.path}: no decoder rows of '{self.name}' ({error})") from None
        return torch.nn.functional.normalize(torch.nan_to_num(rows), dim=1)

    def row(self, latent: int) -> torch.Tensor:
        """(D,) one unit decoder row, without reading the others."""
        if "rows" in self.__dict__:
            return self.rows[latent]
        with safe_open(self._rows_file, "pt") as held:
            found = torch.nan_to_num(held.get_slice("W_dec")[latent:latent + 1].float())
        return torch.nn.functional.normalize(found, dim=1)[0]

    @property
    def _rows_file(self) -> Path:
        if not self.has_rows:
            raise runs.RunError(f"{self.run.path}: the decoder of snapshot '{self.name}' was not kept")
        kept = self.folder / f"{self.name}.safetensors"
        return kept if kept.exists() else self.run.path / "sae/sae_weights.safetensors"

    @property
    def tokens(self) -> int:
        """Tokens over which pairs were counted."""
        return int(self.about["tokens"])

    @property
    def has_rows(self) -> bool:
        """Whether the decoder of this moment is known."""
        return self.name == NAMES[-1] or (self.folder / f"{self.name}.safetensors").exists()

    def partners(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents that fired with ``latent``, and on how many tokens."""
        held = self.matrix
        later = slice(*held.indptr[latent:latent + 2])
        earlier = np.flatnonzero(held.indices[:later.start] == latent)  # one pass is quicker than a second order
        others = np.concatenate([np.searchsorted(held.indptr, earlier, side="right") - 1, held.indices[later]])
        counts = np.concatenate([held.data[earlier], held.data[later]])
        return others[others != latent], counts[others != latent]


def snapshots(run: runs.Run) -> list[Snapshot]:
    """The run's snapshots in the order of training; empty where it kept none (too short, or made elsewhere)."""
    folder = run.path / "coactivation"
    steps = {entry["phase"]: entry["step"] for entry in (run.json("training.json") or {}).get("phases", [])}
    return [Snapshot(folder, name, steps[name], run) for name in NAMES if name in steps
            if (folder / f"{name}.npz").exists() and (folder / f"{name}.json").exists()]


def last(run: runs.Run) -> Snapshot:
    """The finished SAE's, whose decoder is the run's own."""
    return Snapshot(run.path / "coactivation", NAMES[-1], None, run)


def moments(run: runs.Run, codes: Callable[[], sparse.csc_matrix]) -> list[Snapshot]:
    """The run's snapshots, the last of them the finished SAE: counted now over its codes where training was cut."""
    found = snapshots(run)
    return found if found and found[-1].name == NAMES[-1] else [*found, of_codes(run, codes())]


def of_codes(run: runs.Run, codes: sparse.csc_matrix) -> Snapshot:
    """Pairs of the finished SAE, counted now over its (T, F) codes."""
    by_token = codes.tocsr()
    made = counting.count(CSR(*(torch.from_numpy(part) for part in (
        by_token.indptr.astype(np.int64), by_token.indices.astype(np.int64), by_token.data)), codes.shape[1]))
    found = last(run)
    found.matrix, found.about = made.pairs, {"tokens": made.tokens, "least": made.least, "pairs_seen": made.seen}
    return found


def cells(snapshot: Snapshot, order: str) -> np.ndarray:
    """(F,) each latent's cell in the overview: latents by number, or by density, the most frequent first."""
    n_latents = snapshot.matrix.shape[0]
    rank = np.arange(n_latents)
    if order == "density":
        rank[np.argsort(-snapshot.own, kind="stable")] = np.arange(n_latents)
    return (rank // -(-n_latents // CELLS)).astype(np.int64)


def overview(snapshot: Snapshot, measure: str, cell: np.ndarray, before: Snapshot | None = None) -> np.ndarray:
    """(n, n) mean of a measure over each cell's pairs, NaN where it has none; ``before`` is stability's other one."""
    n_cells = int(cell.max()) + 1
    pairs = pooling.pairs_of(cell, n_cells)
    if measure == "decoder cosine":
        sums = _cosine_sums(snapshot.rows, cell, n_cells)
    elif measure == "stability":
        if before is None:
            raise runs.RunError("stability needs a snapshot before this one")
        one, other = snapshot.matrix, before.matrix
        sums, seen = pooling.pool_stability(one.indptr, one.indices, one.data, 1 / snapshot.tokens, other.indptr,
                                            other.indices, other.data, 1 / before.tokens, cell, n_cells)
        sums, pairs = pooling.mirrored(sums), pooling.mirrored(seen)
    else:
        held = snapshot.matrix
        sums = pooling.mirrored(pooling.pool(held.indptr, held.indices, held.data, snapshot.own, snapshot.tokens, cell,
                                             n_cells, pooling.MEASURES.index(measure)))
    return np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)


def _cosine_sums(rows: torch.Tensor, cell: np.ndarray, n_cells: int) -> np.ndarray:
    """Sums of cosines over each cell's pairs: the product of summed rows, without F x F cosines."""
    kept = torch.from_numpy(np.flatnonzero(cell >= 0))
    summed = torch.zeros(n_cells, rows.shape[1]).index_add_(0, torch.from_numpy(cell)[kept], rows[kept])
    sums = (summed @ summed.T).double().numpy()
    norms = torch.zeros(n_cells, dtype=torch.float64).index_add_(
        0, torch.from_numpy(cell)[kept], rows[kept].square().sum(1).double())
    sums[np.diag_indices(n_cells)] = (np.diag(sums) - norms.numpy()) / 2
    return sums


def members(snapshot: Snapshot, latent: int, size: int, measure: str) -> np.ndarray:
    """The latent and those nearest to it by a measure (at most ``size`` in all), in increasing number."""
    size = min(size, LARGEST_BLOCK, snapshot.matrix.shape[0])
    if measure == "decoder cosine":
        near = (snapshot.rows @ snapshot.rows[latent]).abs().numpy()
        near[latent] = np.inf
        return np.sort(np.argpartition(-near, size - 1)[:size])
    others, strength = strengths(snapshot, latent, "Jaccard" if measure == "stability" else measure)
    best = others[np.argsort(-strength, kind="stable")[:size - 1]]
    return np.sort(np.append(best, latent)).astype(np.int64)


def strengths(snapshot: Snapshot, latent: int, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """The latents that fired with one, and a measure of each pair from its counts."""
    others, counts = snapshot.partners(latent)
    return others, _of_counts(measure, counts, snapshot.own[latent], snapshot.own[others], snapshot.tokens)


def _of_counts(measure: str, both, first, second, tokens: int) -> np.ndarray:
    """A measure of pairs from their counts; 0 where neither fires."""
    both, first, second = (np.asarray(part, dtype=float) for part in (both, first, second))
    above, below = {"count": (both, np.ones_like(both)), "rate": (both, np.full_like(both, tokens)),
                    "Jaccard": (both, first + second - both), "lift": (both * tokens, first * second)}[measure]
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def block(snapshot: Snapshot, chosen: np.ndarray, measure: str, before: Snapshot | None = None) -> np.ndarray:
    """(n, n) a measure among ``chosen`` latents (sorted; n at most 512), NaN on the diagonal."""
    if measure == "decoder cosine":
        found = (snapshot.rows[torch.from_numpy(chosen)] @ snapshot.rows[torch.from_numpy(chosen)].T).double().numpy()
    elif measure == "stability":
        if before is None:
            raise runs.RunError("stability needs a snapshot before this one")
        one, other = _dense(snapshot, chosen) / snapshot.tokens, _dense(before, chosen) / before.tokens
        larger = np.maximum(one, other)
        found = np.divide(np.minimum(one, other), larger, out=np.full_like(one, np.nan), where=larger > 0)
    else:
        own = snapshot.own[chosen]
        found = _of_counts(measure, _dense(snapshot, chosen), *np.broadcast_arrays(own[:, None], own[None]),
                           snapshot.tokens)
    np.fill_diagonal(found, np.nan)
    return found


def _dense(snapshot: Snapshot, chosen: np.ndarray) -> np.ndarray:
    """(n, n) counts among sorted latents, symmetric."""
    upper = snapshot.matrix[chosen][:, chosen].toarray().astype(float)
    return upper + np.triu(upper, 1).T


def cluster_order(snapshot: Snapshot, chosen: np.ndarray, measure: str) -> np.ndarray:
    """Places of ``chosen`` in the order of an average-linkage tree over Jaccard (or |decoder cosine|)."""
    if len(chosen) < 3:
        return np.arange(len(chosen))
    near = np.abs(block(snapshot, chosen, "decoder cosine" if measure == "decoder cosine" else "Jaccard"))
    apart = 1 - np.clip(np.nan_to_num(near), 0, 1)
    np.fill_diagonal(apart, 0)
    return hierarchy.leaves_list(hierarchy.linkage(squareform((apart + apart.T) / 2, checks=False), "average"))


def history(found: list[Snapshot], latent: int) -> pd.DataFrame:
    """A latent at each of a run's snapshots: step, density, cosine of its decoder row with its last one."""
    final = next((one.row(latent) for one in reversed(found) if one.has_rows), None)
    rows = [{"phase": one.name, "step": one.step, "density": one.own[latent] / one.tokens,
             "cosine": float(one.row(latent) @ final) if one.has_rows else np.nan} for one in found]
    return pd.DataFrame(rows, columns=["phase", "step", "density", "cosine"])
