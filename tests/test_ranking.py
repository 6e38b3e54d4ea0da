"""Orders of variants: what is told apart, by a simulation that is known, and what the page says of it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sae_lib.evaluation import contrasts, ranking
from sae_lib.views import figures_ranking


def table(values, **columns):
    """A table of runs, one metric's values (seeds,) by variant, all valid and comparable."""
    rows = [{"run": f"s/m-{variant}-s{seed}", "variant": f"m-{variant}", "seed": seed, "explained_variance": value}
            for variant, own in values.items() for seed, value in enumerate(own, 1)]
    plain = {"status": "valid", "role": "normal", "reasons": "", "flags": "", "model": "m", "hook": "h", "l0": 8.0,
             "activations": "a", "samples": 10, "d_sae": 64, "evaluation": "e", "letters": "l", "sae_bench": "0.6"}
    return pd.DataFrame(rows).assign(**plain | columns)


SEEDS = np.array([0.0, 0.03, -0.02])
FOUR = {"topk": 0.5 + SEEDS + [0, 0.001, -0.001], "far": 0.9 + SEEDS + [0.001, 0, 0],
        "near": 0.501 + SEEDS + [0.001, -0.001, 0], "low": 0.1 + SEEDS}


def test_variants_that_differ_have_a_place_and_others_share_a_range():
    found = ranking.ranking(table(FOUR), "topk", ["explained_variance", "l0"])
    assert found.variant.tolist() == ["m-far", "m-near", "m-topk", "m-low"] and set(found.metric) == {
        "explained_variance"}, "L0 has no direction"
    assert found["rank"].tolist() == ["1", "2-3", "2-3", "4"]
    assert found.alike.tolist() == ["", "m-topk", "m-near", ""]
    assert found.claim[1] == "not distinguishable from m-topk"
    assert found.claim[0] == "distinguishable from every other"
    low, high = stats.t.interval(0.95, 2, np.mean(FOUR["far"]), stats.sem(FOUR["far"]))
    assert (found["mean"][0], found.low[0], found.high[0]) == pytest.approx((np.mean(FOUR["far"]), low, high))


def test_a_metric_of_lower_better_is_ranked_from_below():
    found = ranking.ranking(table(FOUR).rename(columns={"explained_variance": "mse"}), "topk", ["mse"])
    assert found.variant.tolist() == ["m-low", "m-topk", "m-near", "m-far"]


def test_under_three_seeds_and_alone_nothing_is_ranked():
    found = ranking.ranking(table({"topk": [0.5, 0.6, 0.7], "two": [0.8, 0.9]}), "topk", ["explained_variance"])
    assert found["rank"].tolist() == ["1", ""] and found.claim.tolist() == [
        "no other variant to rank it with", "no claim possible: 2 seeds, at least 3 are needed"]
    assert np.isnan(found.low[1])


def test_without_seeds_enough_variants_stay_in_the_table_s_order():
    found = ranking.ranking(table({"topk": [0.5], "b": [0.9], "c": [0.7]}), "topk", ["explained_variance"])
    assert found.variant.tolist() == ["m-topk", "m-b", "m-c"] and not any(found["rank"])


def test_what_is_not_a_result_or_does_not_compare_is_not_ranked():
    runs = table(FOUR)
    runs.loc[runs.variant == "m-far", "status"] = "invalid"
    runs.loc[runs.variant == "m-low", "samples"] = 99
    assert set(ranking.ranking(runs, "topk", ["explained_variance"]).variant) == {"m-topk", "m-near"}


def test_equal_variants_are_told_apart_as_seldom_as_the_level_says():
    """Six equal variants, four seeds: in at most 5 % of draws (binomially) any two of them are told apart."""
    draw, n, hits = np.random.default_rng(0), 400, 0
    variants, seeds = np.repeat(list("abcdef"), 4), np.tile(range(4), 6)
    for _ in range(n):
        y = draw.normal(size=24) + draw.normal(size=4)[seeds]
        fitted = contrasts.fit(y, variants, seeds)
        pairs = [fitted.contrast(a, b) for place, a in enumerate("abcdef") for b in "abcdef"[:place]]
        contrasts.holm(pairs)
        hits += any(pair["p_holm"] <= 0.05 for pair in pairs)
    assert hits <= stats.binom.ppf(0.999, n, 0.05)


def test_the_page_says_it_in_words_and_one_figure():
    runs = table(FOUR)
    comparison = SimpleNamespace(table=runs, ranking=ranking.ranking(runs, "topk"))
    shown = figures_ranking.named(comparison)
    page = figures_ranking.table(shown)
    assert page.variant.tolist() == ["far", "near", "topk", "low"]
    assert page["claim"][1] == "not distinguishable from topk"
    assert page["mean over seeds"][0].startswith("0.9037 [0.8") and page.metric[0].endswith("(higher is better)")
    fig = figures_ranking.ranking_by_metric(shown, "note")
    texts = [note.text for note in fig.layout.annotations]
    assert any("higher is better" in text for text in texts) and texts.count("place 2-3") == 2
    none = ranking.ranking(table({"topk": [1.0], "x": [2.0]}), "topk")
    empty = figures_ranking.ranking_by_metric(figures_ranking.named(SimpleNamespace(table=runs, ranking=none)))
    assert "no claim possible" in empty.layout.annotations[0].text
    assert "no claim possible" in figures_ranking.table(figures_ranking.named(
        SimpleNamespace(table=runs, ranking=none)))["claim"][0]
