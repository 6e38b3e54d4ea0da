"""The bootstrap behind intervals within one SAE: against plain resampling, within strata, in portions."""

import numpy as np
import pandas as pd
import pytest

from sae_lib.evaluation import intervals, letter_reports


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
