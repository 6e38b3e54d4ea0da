"""Pairs of latents as dashboards read them, against dense F x F matrices; matching, against planted partners."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_lib import runs
from sae_lib.evaluation import matching, pairs, pooling
from sae_lib.training.phases import NAMES


class Moment(pairs.Snapshot):
    """A snapshot of given firings (T, F) bool and decoder rows."""

    def __init__(self, fired, rows=None, name="late"):
        super().__init__(None, name, 10, None)
        counts = fired.T.astype(np.int64) @ fired
        self.matrix = sparse.csr_matrix(np.triu(counts).astype(np.int32))
        self.about = {"tokens": len(fired), "least": 1, "pairs_seen": 0}
        self.counts = counts.astype(float)
        if rows is not None:
            self.rows = torch.nn.functional.normalize(rows, dim=1)


def moments(n_latents=37, tokens=400, seed=0, scale=1.0):
    draw = np.random.default_rng(seed)
    base = draw.random((tokens, 6)) < 0.2
    mix = base @ (draw.random((6, n_latents)) < 0.4) > 0
    return [Moment(mix & (draw.random((tokens, n_latents)) < share * scale),
                   torch.from_numpy(draw.normal(size=(n_latents, 8))).float()) for share in (0.3, 0.6)]


def dense(moment, measure, before=None):
    """Every measure from its formula over the whole matrix."""
    n, t = moment.counts, moment.tokens
    own = np.diag(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        if measure == "stability":
            a, b = n / t, before.counts / before.tokens
            return np.minimum(a, b) / np.maximum(a, b)
        found = {"count": n, "rate": n / t, "Jaccard": n / (own[:, None] + own - n),
                 "lift": n * t / (own[:, None] * own[None])}.get(measure)
    return (moment.rows @ moment.rows.T).double().numpy() if found is None else np.nan_to_num(found)


def pooled(matrix, cell):
    """Mean over the pairs i != j of each cell, one cell at a time."""
    cells = int(cell.max()) + 1
    found = np.full((cells, cells), np.nan)
    for a in range(cells):
        for b in range(cells):
            values = [matrix[i, j] for i in np.flatnonzero(cell == a) for j in np.flatnonzero(cell == b) if i != j]
            values = [value for value in values if np.isfinite(value)]
            found[a, b] = np.mean(values) if values else np.nan
    return found


@pytest.mark.parametrize("measure", pairs.MEASURES)
@pytest.mark.parametrize("order", ["number", "density"])
def test_the_overview_is_the_mean_over_each_cell_s_pairs(measure, order, monkeypatch):
    monkeypatch.setattr(pairs, "CELLS", 9)
    before, now = moments()
    cell = pairs.cells(now, order)
    assert np.bincount(cell).max() == 5 and (order == "number") == (np.diff(cell) >= 0).all()
    if order == "density":
        assert (np.diff(now.own[np.argsort(cell, kind="stable")[::5]]) <= 0).all()
    found = pairs.overview(now, measure, cell, before)
    np.testing.assert_allclose(found, pooled(dense(now, measure, before), cell), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


@given(st.integers(2, 30), st.integers(1, 7), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_cells_left_out_count_in_no_mean(n_latents, cells, seed):
    now = moments(n_latents, 60, seed)[1]
    cell = np.random.default_rng(seed).integers(-1, cells, n_latents)
    cell[0] = cells - 1
    found = pairs.overview(now, "Jaccard", cell)
    np.testing.assert_allclose(found, pooled(dense(now, "Jaccard"), cell), atol=1e-12)
    assert pooling.pairs_of(cell, cells).sum() >= 0


@pytest.mark.parametrize("measure", pairs.MEASURES)
def test_a_block_is_a_piece_of_the_matrix(measure):
    before, now = moments()
    chosen = pairs.members(now, 5, 12, measure)
    assert 5 in chosen and len(chosen) == 12 and (np.diff(chosen) > 0).all()
    found = pairs.block(now, chosen, measure, before)
    expected = dense(now, measure, before)[np.ix_(chosen, chosen)]
    off = ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(found[off], expected[off], rtol=1e-5, atol=1e-6)
    assert np.isnan(np.diag(found)).all()
    strongest = np.abs(dense(now, "Jaccard" if measure == "stability" else measure)[5])
    strongest[5] = -1
    assert set(np.argsort(-strongest)[:5]) <= set(chosen) or measure in ("count", "rate")  # ties
    order = pairs.cluster_order(now, chosen, measure)
    assert sorted(order) == list(range(12))


def test_clusters_stand_together():
    """Two planted groups that fire together are each in one piece, whatever their numbers."""
    draw = np.random.default_rng(0)
    groups = draw.permutation(np.repeat([0, 1], 10))
    on = draw.random((500, 2)) < 0.3
    now = Moment(on[:, groups] & (draw.random((500, 20)) < 0.9))
    order = pairs.cluster_order(now, np.arange(20), "Jaccard")
    assert (np.diff(groups[order]) != 0).sum() == 1


def test_stability_needs_a_snapshot_before():
    with pytest.raises(runs.RunError, match="stability needs a snapshot before"):
        pairs.block(moments()[0], np.arange(3), "stability")


def test_a_snapshot_of_codes_counts_them():
    draw = np.random.default_rng(1)
    values = draw.random((300, 20)) * (draw.random((300, 20)) < 0.2)
    codes = sparse.csc_matrix(values.astype(np.float32))
    found = pairs.of_codes(runs.Run("x"), codes)
    fired = (values > 0).astype(int)
    np.testing.assert_array_equal(found.matrix.toarray(), np.triu(fired.T @ fired))
    assert found.tokens == 300 and found.name == NAMES[-1]


def test_matching_finds_a_planted_permutation_and_leaves_out_what_has_no_partner():
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(300, 64, generator=draw), dim=1)
    order = torch.randperm(300, generator=draw)
    other = torch.nn.functional.normalize(rows[order] + 0.03 * torch.randn(300, 64, generator=draw), dim=1)
    other[:30] = torch.nn.functional.normalize(torch.randn(30, 64, generator=draw), dim=1)
    found = matching.match(rows, other)
    place = torch.empty(300, dtype=torch.int64)
    place[order] = torch.arange(300)
    gone = (place < 30).numpy()
    assert (found.partner[~gone] == place.numpy()[~gone]).all() and (found.partner[gone] == -1).all()
    np.testing.assert_allclose(found.cosine[~gone], (rows * other[place]).sum(1).numpy()[~gone], atol=1e-6)
    assert found.share == pytest.approx((~gone).mean())
    with pytest.raises(runs.RunError, match="not of one model"):
        matching.match(rows, other[:, :32])


@pytest.mark.parametrize("measure", pairs.MEASURES)
def test_the_difference_is_between_matched_latents(measure, monkeypatch):
    monkeypatch.setattr(pairs, "CELLS", 7)
    one, other = moments(20), moments(24, seed=3)
    partner = np.random.default_rng(0).permutation(24)[:20]
    partner[[3, 9]] = -1
    matched = matching.Match(partner, np.ones(20))
    known = partner >= 0
    a, b = dense(one[1], measure, one[0]), dense(other[1], measure, other[0])
    there = np.where(known[:, None] & known[None], b[np.ix_(partner, partner)], np.nan)
    chosen = np.array([0, 3, 4, 11, 19])
    befores = (one[0], other[0])
    found = matching.block_difference(one[1], other[1], matched, chosen, measure, befores)
    expected = (a - there)[np.ix_(chosen, chosen)]
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    cell = pairs.cells(one[1], "number")
    whole = matching.overview_difference(one[1], other[1], matched, measure, cell, befores)
    own = np.where(known, cell, -1)
    np.testing.assert_allclose(whole, pooled(a, own) - pooled(there, own), rtol=1e-4, atol=1e-6)
