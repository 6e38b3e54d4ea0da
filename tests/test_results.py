"""The results table and what may be said of differences."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sae_lib import runs
from sae_lib.evaluation import compare, results
from sae_lib.params import check
from sae_lib.views import figures_compare


def fake_run(name, seed=1, status="valid", reasons=(), **measured):
    """A run's folder as the stages leave it."""
    folder = runs.folder_of(name)
    runs.write_text(folder / "params.yaml",
                    f"role: normal\nmodel: tiny\nseed: {seed}\narchitecture: topk\nd_sae: 64\nk: 8\n")
    training = {"explained_variance": 0.8, "mse": 10.0, "l0": 8.0, "mean_cos2": 0.01,
                "dead_share": 0.0, "samples": 1000, "unused_share": 0.0, "norm_ratio": 0.97,
                "final_loss": {"reconstruction": 10.0}, "terms": {},
                "hook": "blocks.1.hook_resid_post", "activations": {"content_hash": "abc"}, "seconds": 1.0,
                "provenance": {"library": "other"}} | measured
    runs.write_json(folder / "training.json", training)
    runs.write_json(folder / "validity.json", {"status": status, "reasons": list(reasons), "flags": []})
    runs.write_json(folder / "evals/core.json", {"metrics": {"kl_div_with_sae": 0.3}, "config": {"comparable": "c"},
                                                 "provenance": {"packages": {"sae-bench": "0.6.0"}}})
    history = pd.DataFrame({"step": [0, 1], "samples": [10, 20], "loss/reconstruction": [20.0, 10.0],
                            "explained_variance": [0.5, 0.8]})
    history.to_parquet(folder / "history.parquet")
    return name


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    return tmp_path


def test_a_bad_run_is_a_row_and_never_the_end(home):
    names = [fake_run("s/topk-s1"), fake_run("s/dead-s1", status="invalid", reasons=["dead: 95.0% of latents"]),
             fake_run("s/broken-s1"), "s/absent-s1", fake_run("s/half-s1")]
    (home / "runs/s/broken-s1/training.json").write_text('{"explained')
    (home / "runs/s/half-s1/validity.json").unlink()
    table = results.collect(names).set_index("run")
    assert table["status"].tolist() == ["valid", "invalid", "failed", "failed", "failed"]
    assert "damaged JSON" in table.loc["s/broken-s1", "reasons"]
    assert table.loc["s/absent-s1", "reasons"].startswith("not there")
    assert "no verdict" in table.loc["s/half-s1", "reasons"]
    assert results.results(table.reset_index()).run.tolist() == ["s/topk-s1"]
    assert table.loc["s/topk-s1", "stale"]


def test_figures_of_a_run_not_valid_enter_nothing(home):
    names = [fake_run("s/topk-s1"), fake_run("s/dead-s1", status="invalid", reasons=["dead: 95 % <b>"], mse=9999.0)]
    found = compare.compare(check("compare", {"study": "s", "runs": names, "baseline": "topk"}))
    assert found.differences.empty
    assert found.table.set_index("run").apart["s/dead-s1"] == "invalid"
    page = figures_compare.readable(found.table)
    assert page.iloc[1].drop(["run", "verdict", "reasons", "flags", "library"]).isna().all()
    panels = figures_compare.all_figures(found)["compression_panels"]
    grey = [t for t in panels.data if t.marker.symbol == "x-thin"]
    assert len(grey) == 4 and all("dead" in text for t in grey for text in t.hovertext)
    assert all(9999.0 not in (t.x if t.x is not None else []) for t in panels.data)
    assert "invalid: dead" in str(figures_compare.all_figures(found)["comparison_table"].data[0].cells["values"])


@pytest.mark.parametrize("change, why", [
    ({"samples": 2000}, "training samples (2000 against 1000)"),
    ({"activations": {"content_hash": "other"}}, "activations (other against abc)"),
    ({"hook": "blocks.0.hook_resid_post"}, "hook"),
    ({"l0": 9.0}, "L0 (9.0 against 8.0, over 10 % apart)"),
])
def test_what_is_not_comparable_says_why_and_stays_out(change, why):
    names = [fake_run("s/topk-s1"), fake_run("s/other-s1", **change), fake_run("s/near-s1", l0=8.5)]
    table = results.compared(results.collect(names), "topk")
    assert why in table.apart[1] and table.apart[2] == ""
    assert set(results.differences(table, "topk").variant) == {"near"}


def seeds(variant, values):
    return [fake_run(f"s/{variant}-s{seed}", seed=seed, mse=value) for seed, value in enumerate(values, 1)]


def test_one_variant_s_interval_is_the_paired_t_interval():
    base, other = [10.0, 11.0, 12.5, 9.0], [9.1, 10.3, 11.2, 8.4]
    table = results.collect(seeds("topk", base) + seeds("other", other))
    row = results.differences(table, "topk").set_index("metric").loc["mse"]
    difference = np.array(other) - np.array(base)
    low, high = stats.t.interval(0.95, 3, difference.mean(), stats.sem(difference))
    assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
    assert row.p_holm == pytest.approx(stats.ttest_rel(other, base).pvalue) and row.claim == "lower: better"


def test_variance_is_pooled_over_variants_and_holm_is_within_a_metric():
    base = [10.0, 11.0, 12.0]
    table = results.collect(seeds("topk", base) + seeds("a", [10.1, 11.3, 12.2]) + seeds("b", [10.9, 12.0, 13.4]))
    rows = results.differences(table, "topk").query("metric == 'mse'").set_index("variant")
    a, b = np.array([0.1, 0.3, 0.2]), np.array([0.9, 1.0, 1.4])
    pooled = (a.var(ddof=1) * 2 + b.var(ddof=1) * 2) / 4
    reach = stats.t.ppf(0.975, 4) * np.sqrt(pooled / 3)
    assert rows.loc["a", "high"] == pytest.approx(0.2 + reach)
    raw = {v: 2 * stats.t.sf(d.mean() / np.sqrt(pooled / 3), 4) for v, d in (("a", a), ("b", b))}
    assert rows.loc["b", "p_holm"] == pytest.approx(2 * raw["b"])
    assert rows.loc["a", "p_holm"] == pytest.approx(max(raw["a"], 2 * raw["b"]))
    assert rows.loc["b", "claim"] == "higher: worse" and rows.loc["a", "claim"] == "no difference shown"


def test_intervals_cover_at_their_level():
    """Simulated: no true difference, three variants, three seeds; 95 % intervals contain 0 in 95 % of draws."""
    draw, hits, n = np.random.default_rng(0), 0, 2000
    for _ in range(n):
        pairs = {v: draw.normal(size=3) for v in "abc"}
        hits += sum(row["low"] <= 0 <= row["high"] for row in results._intervals("m", pairs, 0.95))
    assert abs(hits / (3 * n) - 0.95) < 0.012


def test_fewer_than_three_seeds_claim_nothing():
    table = results.collect(seeds("topk", [10.0, 11.0]) + seeds("other", [1.0, 2.0]))
    row = results.differences(table, "topk").set_index("metric").loc["mse"]
    assert row.claim == "no claim possible: 2 paired seeds, at least 3 are needed" and np.isnan(row.low)


def test_null_baselines_stand_apart():
    name = fake_run("s/random-s1")
    path = runs.folder_of(name) / "params.yaml"
    path.write_text(path.read_text().replace("role: normal", "role: 'null'"))
    table = results.collect([fake_run("s/topk-s1"), name])
    assert results.results(table).run.tolist() == ["s/topk-s1"]


def test_a_comparison_of_nothing_says_so():
    with pytest.raises(runs.RunError, match="no runs in"):
        compare.compare(check("compare", {"study": "nothing"}))
