"""The bootstrap behind intervals within one SAE: against plain resampling, within strata, in portions."""

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import Planted

from sae_lib import intervals
from sae_lib.evaluation import letter_reports
from sae_lib.metrics import explained_variance
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training import measure


def mean_of(values):
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def test_the_interval_is_that_of_plain_resampling():
    values = np.random.default_rng(1).exponential(size=80)
    drawn = np.random.default_rng(2).choice(values, (20_000, 80)).mean(1)
    found = intervals.interval(intervals.spread(80, mean_of(values))["mean"])
    assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    draw, hits, n = np.random.default_rng(0), 0, 300
    for _ in range(n):
        low, high = intervals.interval(intervals.spread(60, mean_of(draw.normal(size=60)))["mean"])
        hits += low <= 0 <= high
    assert 0.90 < hits / n < 0.98


def test_portions_change_nothing_and_strata_are_drawn_apart(monkeypatch):
    values, strata = np.arange(30.0), [np.arange(10), np.arange(10, 30)]

    def figures(weights):
        assert (weights[:, :10].sum(1) == 10).all() and (weights[:, 10:].sum(1) == 20).all()
        return mean_of(values)(weights)

    whole = intervals.spread(30, figures, strata=strata)["mean"]
    assert len(whole) == intervals.DRAWS and len(set(whole)) > 100
    assert not np.array_equal(whole, intervals.spread(30, figures, strata=strata, seed=1)["mean"])
    plain = intervals.spread(30, mean_of(values))["mean"]
    monkeypatch.setattr(intervals, "PORTION", 100)
    assert np.array_equal(plain, intervals.spread(30, mean_of(values))["mean"])


def test_what_is_no_number_is_left_out_and_mostly_so_is_no_interval():
    values = np.r_[np.arange(100.0), np.full(50, np.nan)]
    assert intervals.interval(values) == pytest.approx([2.475, 96.525])
    assert intervals.interval(np.full(5, np.nan)) is None
    assert intervals.within("words", {"a": values, "b": np.full(5, np.nan)}).keys() == {"level", "by", "a"}


def test_letters_intervals_are_of_means_over_seeds_of_means_over_letters():
    draw = np.random.default_rng(0)
    words = pd.DataFrame([{"seed": seed, "letter": letter, "y": draw.random() < rate} for seed in (1, 2)
                          for letter, rate, count in (("a", 0.2, 30), ("b", 0.7, 12), ("c", 0.5, 9))
                          for _ in range(count)])
    kept = pd.DataFrame({"seed": [1, 1, 1, 2, 2, 2], "letter": list("abcabc"), "kept": [1, 1, 0, 1, 1, 1]})
    kept["kept"] = kept.kept.astype(bool)
    chosen = words.merge(kept[kept.kept], on=["seed", "letter"])
    by_hand = [np.mean([np.mean([draw.choice(own.y, len(own)).mean() for _, own in of_seed.groupby("letter")])
                        for _, of_seed in chosen.groupby("seed")]) for _ in range(4000)]
    assert letter_reports.within(words, kept, "y") == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.015)


def test_intervals_of_what_training_measures_are_those_of_resampled_blocks():
    """Each figure computed anew on the rows of redrawn blocks, of an SAE whose L0 differs by token."""
    g, rows = torch.Generator().manual_seed(0), Planted(rows=4096).heldout()
    sae = SparseAutoencoder.initialise(64, torch.zeros(32), architectures.get("standard")(), g)
    found = measure.heldout(sae, rows, 0.7, within=True)
    within = found.pop("within_this_sae")
    assert within.pop("by") == "bootstrap over blocks of text" and within.pop("level") == 0.95
    assert within.keys() == {"explained_variance", "l0", "mse", "norm_ratio"}
    draw, blocks, drawn = np.random.default_rng(0), rows.block.unique(), []
    assert len(blocks) == 32 and found["heldout_tokens"] == 512
    x_hat, active = sae(rows.x), (sae.encode(rows.x) > 0).sum(1)
    for _ in range(3000):
        chosen = torch.cat([(rows.block == block).nonzero()[:, 0] for block in draw.choice(blocks, len(blocks))])
        x, out = rows.x[chosen], x_hat[chosen]
        drawn.append({"explained_variance": explained_variance(x, out), "l0": active[chosen].double().mean(),
                      "mse": (0.49 * (x - out).square().sum(1)).double().mean(),
                      "norm_ratio": (out.norm(dim=1) / x.norm(dim=1)).double().mean()})
    for name, ends in within.items():
        low, high = np.quantile([float(one[name]) for one in drawn], [0.025, 0.975])
        assert low < found[name] < high and ends == pytest.approx([low, high], abs=0.1 * (high - low)), name
    assert measure.heldout(sae, rows._replace(block=torch.zeros(512)), 0.7, within=True)["within_this_sae"] == {}
