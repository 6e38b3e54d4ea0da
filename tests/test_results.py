"""The results table and the claims about differences."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sae_lib import runs
from sae_lib.evaluation import compare, contrasts, results
from sae_lib.metrics import METRICS
from sae_lib.params import ParameterError, check
from sae_lib.views import figures_absorption, figures_compare, show


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


def dense(y, variants, seeds, one, other):
    """The contrast of an additive model by plain least squares on indicators, the first of each left out."""
    indicators = [np.equal(names, name) for names in (variants, seeds) for name in sorted(set(names))[1:]]
    x = np.stack([np.ones(len(y)), *indicators], 1).astype(float)
    solved, squares = np.linalg.lstsq(x, y, rcond=None)[:2]
    contrast = np.zeros(x.shape[1])
    for name, sign in ((one, 1), (other, -1)):
        if name != sorted(set(variants))[0]:
            contrast[sorted(set(variants)).index(name)] += sign
    freedom = len(y) - x.shape[1]
    error = np.sqrt(contrast @ np.linalg.inv(x.T @ x) @ contrast * squares[0] / freedom)
    reach = stats.t.ppf(0.975, freedom) * error
    return contrast @ solved, reach, 2 * stats.t.sf(abs(contrast @ solved) / error, freedom)


@pytest.mark.parametrize("missing", [0, 3])
def test_intervals_come_from_one_fit_of_variant_and_seed_and_holm_is_within_a_metric(missing):
    values = {"topk": [10.0, 11.0, 12.0, 9.0], "a": [10.1, 11.3, 12.2, 9.3], "b": [10.9, 12.0, 13.4, 9.8],
              "c": [10.2, 11.0, 11.8, 9.1]}
    names = [name for variant, own in values.items() for name in seeds(variant, own)]
    names = [name for name in names if name not in ("s/a-s4", "s/topk-s1", "s/c-s2")[:missing]]
    table = results.collect(names)
    rows = results.differences(table, "topk").query("metric == 'mse'").set_index("variant")
    raw = {}
    for variant in "abc":
        expected, reach, raw[variant] = dense(table.mse.to_numpy(), list(table.variant), list(table.seed), variant,
                                              "topk")
        assert rows.loc[variant, "difference"] == pytest.approx(expected)
        if rows.loc[variant, "pairs"] >= 3:
            assert rows.loc[variant, "high"] - expected == pytest.approx(reach)
        else:
            assert missing and np.isnan(rows.loc[variant, "high"]) and "no claim" in rows.loc[variant, "claim"]
    tested = [variant for variant in "abc" if rows.loc[variant, "pairs"] >= 3]
    assert rows.loc["b", "p_holm"] == pytest.approx(len(tested) * raw["b"])
    assert rows.loc["b", "claim"] == "higher: worse" and tested == (["b"] if missing else ["a", "b", "c"])


def test_a_second_baseline_s_runs_enter_no_other_fit():
    """Groups of one baseline are fitted apart: another model's scatter widens nothing."""
    one = seeds("topk", [10.0, 11.0, 12.0]) + seeds("a", [10.2, 11.1, 12.4])
    alone = results.differences(results.collect(one), "topk").query("metric == 'mse'")
    far = [fake_run(f"s/m-{v}-s{n}", seed=n, mse=value, hook="m") for v, own in
           (("topk", (1.0, 50.0, 7.0)), ("a", (90.0, 2.0, 30.0))) for n, value in enumerate(own, 1)]
    both = results.differences(results.collect([*one, *far]), "topk").query("metric == 'mse'").set_index("variant")
    assert both.loc["a", "high"] == pytest.approx(alone.high.iloc[0]) and both.loc["m-a", "high"] > 50


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("n_seeds", [3, 5])
def test_intervals_cover_at_their_level(n_seeds, balanced):
    """No true difference, ten variants beside a baseline, seeds that move all: the interval of one contrast a draw
    holds 0 in 95 % of draws, within the binomial interval (at 99.9 %, as there are four such tests)."""
    draw, n = np.random.default_rng(n_seeds), 2000
    variants, which = np.repeat([f"v{k:02d}" for k in range(11)], n_seeds), np.tile(np.arange(n_seeds), 11)
    hits = 0
    for number in range(n):
        y = draw.normal(size=11 * n_seeds) + 3 * draw.normal(size=n_seeds)[which]
        kept = np.ones(len(y), dtype=bool)
        if not balanced:  # four variants, maybe the baseline, lack a seed
            kept[draw.choice(11, 4, replace=False) * n_seeds + draw.integers(n_seeds, size=4)] = False
        fitted = contrasts.fit(y[kept], variants[kept], which[kept])
        found = fitted.contrast(f"v{1 + number % 10:02d}", "v00")
        hits += found["low"] <= 0 <= found["high"]
    low, high = stats.binom.interval(0.999, n, 0.95)
    assert low <= hits <= high, hits / n


def test_variants_without_a_seed_in_common_have_no_difference():
    fitted = contrasts.fit([1.0, 2.0, 5.0, 6.0], ["a", "a", "b", "b"], [1, 2, 3, 4])
    assert fitted.freedom == 0 and np.isnan(fitted.contrast("a", "b")["difference"])


def test_equal_values_are_no_difference_and_a_constant_one_is_certain():
    fitted = contrasts.fit([0.1, 0.7, 0.3] * 2, ["a"] * 3 + ["b"] * 3, [1, 2, 3] * 2)
    assert fitted.contrast("a", "b") == {"difference": 0, "low": 0, "high": 0, "p": 1}
    fitted = contrasts.fit([0.1, 0.7, 0.3, 1.1, 1.7, 1.3], ["a"] * 3 + ["b"] * 3, [1, 2, 3] * 2)
    assert fitted.contrast("b", "a")["p"] == 0 and fitted.contrast("b", "a")["low"] == pytest.approx(1)


def test_intervals_within_an_sae_are_columns_and_masked_as_figures_are(home):
    for name, status in (("s/topk-s1", "valid"), ("s/dead-s1", "invalid"), ("s/none-s1", "valid")):
        fake_run(name, status=status)
        path = runs.folder_of(name) / "evals/core.json"
        metrics = {"metrics": {"ce_loss_score": 0.3}}
        within = {"level": 0.95, "by": "b", "ce_loss_score": [0.25, 0.375], "explained_variance": [0, 1]}
        runs.write_json(path, runs.read_json(path) | metrics | ({} if "none" in name else {"within_this_sae": within}))
    found, _ = compared(["s/topk-s1", "s/dead-s1", "s/none-s1"])
    low = found.table["within/ce_loss_score/low"]
    assert low.tolist()[:2] == [0.25, 0.25] and np.isnan(low[2])
    # Core's explained variance is of other text than the table's, which training measured.
    assert "within/explained_variance/low" not in found.table
    table = pd.read_csv(home / "runs/s/compare/table.csv")
    assert table["within/ce_loss_score/high"].tolist()[0] == 0.375
    assert table["within/ce_loss_score/high"].isna().tolist() == [False, True, True]
    shown = figures_compare.readable(found.table)[METRICS["ce_loss_score"].called]
    assert shown.tolist()[0] == "0.3 [0.25 to 0.375]" and shown.isna()[1] and shown[2] == "0.3"
    drawn = figures_compare.comparison_table(found.table).data[0].cells["values"]
    assert any("0.25 to 0.375" in str(cell) and "font-size" in str(cell) for cell in drawn)
    path = runs.folder_of("s/topk-s1") / "evals/core.json"
    runs.write_json(path, runs.read_json(path) | {"within_this_sae": {"ce_loss_score": [1]}})
    assert results.collect(["s/topk-s1"]).status[0] == "failed"


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


def test_tables_are_exported_in_four_forms():
    name = fake_run("s/topk_a-s1")
    folder = compare.compare(check("compare", {"study": "s", "runs": [name]})).folder
    assert pd.read_parquet(folder / "table.parquet").run.tolist() == [name]
    assert pd.read_csv(folder / "table.csv").run.tolist() == [name]
    latex = (folder / "table.tex").read_text()
    assert r"s/topk\_a-s1" in latex and r"\begin{tabular}" in latex
    assert "| s/topk_a-s1" in (folder / "table.md").read_text()


def test_letters_figures_show_what_was_measured_and_keep_the_two_metrics_apart():
    names = [fake_run("s/topk-s1"), fake_run("s/dead-s1", status="invalid", reasons=["dead: 95 %"]),
             fake_run("s/other-s1"), fake_run("s/random-s1", status="null")]
    path = runs.folder_of(names[3]) / "params.yaml"
    path.write_text(path.read_text().replace("role: normal", "role: 'null'"))
    for name, rate in zip(names, (0.25, 0.0, 0.5, 0.3)):
        evals = runs.folder_of(name) / "evals"
        runs.write_json(evals / "absorption.json", {"metrics": {
            "mean_full_absorption_score": rate, "mean_absorption_fraction_score": 2 * rate,
            "mean_num_split_features": 1.5}, "config": {"comparable": "a"}})
        pd.DataFrame({"letter": ["a", "b", "x"], "kept": [True, True, False], "splits": [1.0, 2.0, None],
                      "full_absorption": [rate, rate, None], "absorption_fraction": [2 * rate, 2 * rate, None]}
                     ).to_parquet(evals / "absorption_letters.parquet")
    found = compare.compare(check("compare", {"study": "s", "runs": names, "baseline": "topk"}))
    drawn = figures_absorption.all_figures(found, "")
    assert set(drawn) == {"core_against_l0", "absorption_by_run", "splits_by_run", "letters_by_run"}
    by_run = drawn["absorption_by_run"]
    marks = [(list(trace.x), trace.marker.symbol) for trace in by_run.data if trace.x[0] is not None]
    assert [x for x, symbol in marks if symbol != "diamond-open"] == [[0.25, 0.5], [0.5, 1.0]]
    assert [x for x, symbol in marks if symbol == "diamond-open"] == [[0.3], [0.6]], "null baselines, hollow"
    assert any("dead: 95 %" in note.text for note in by_run.layout.annotations)
    heat = drawn["letters_by_run"]
    assert dict(zip(heat.data[0].y, heat.data[0].z.tolist())) == {"topk-s1": [0.25, 0.25], "other-s1": [0.5, 0.5]}
    # plotly.js writes a cell's number on another row's colour where a categoryarray turns the rows.
    assert heat.layout.yaxis.categoryarray is None and list(heat.data[0].y) == ["other-s1", "topk-s1"]


def test_a_comparison_of_nothing_says_so():
    with pytest.raises(runs.RunError, match="no runs in"):
        compare.compare(check("compare", {"study": "nothing"}))


def compared(names, baseline="topk"):
    """The comparison of runs, with every figure and table of its page built."""
    found = compare.compare(check("compare", {"study": "s", "runs": names, "baseline": baseline}))
    figures_compare.readable(found.table)
    return found, figures_compare.all_figures(found)


def damage_params(folder):
    (folder / "params.yaml").write_text("a: [1\n b: }")


def damage_status(folder):
    runs.write_json(folder / "validity.json", {"status": "fine", "reasons": [], "flags": []})


def damage_verdict(folder):
    runs.write_json(folder / "validity.json", {"status": "valid", "reasons": [], "flags": [], "checked": ["training"]})


def damage_training(folder):
    (folder / "training.json").unlink()


@pytest.mark.parametrize("damage", [damage_params, damage_status, damage_verdict, damage_training])
def test_every_damage_is_one_failed_row(damage):
    names = [fake_run("s/topk-s1"), fake_run("s/x-s1")]
    damage(runs.folder_of("s/x-s1"))
    found, _ = compared(names)
    assert found.table["status"].tolist() == ["valid", "failed"] and found.table.reasons[1]


def test_a_history_of_other_columns_and_a_study_without_any_run_end_nothing():
    names = [fake_run("s/topk-s1"), fake_run("s/x-s1", final_loss={f"t{n}": 1.0 for n in range(12)})]
    pd.DataFrame({"step": [1]}).to_parquet(runs.folder_of("s/x-s1") / "history.parquet")
    assert list(compared(names)[0].histories) == ["s/topk-s1"]
    assert compared(["s/topk-s8", "s/y-s8"])[0].table["status"].tolist() == ["failed", "failed"]


def test_the_file_s_columns_hold_results_alone(home):
    compared([fake_run("s/topk-s1"), fake_run("s/dead-s1", status="invalid", reasons=["dead"], mse=9999.0)])
    table = pd.read_csv(home / "runs/s/compare/table.csv")
    assert table.mse.mean() == 10.0 and table["not_a_result/mse"].tolist()[1] == 9999.0


def test_null_baselines_and_what_does_not_compare_enter_no_main_series():
    names = [fake_run("s/topk-s1"), fake_run("s/random-s1", mse=500.0), fake_run("s/longer-s1", samples=2, mse=77.0)]
    path = runs.folder_of("s/random-s1") / "params.yaml"
    path.write_text(path.read_text().replace("role: normal", "role: 'null'"))
    found, figs = compared(names)
    drawn = [x for t in figs["compression_panels"].data if t.marker.symbol != "x-thin" for x in t.x]
    assert 500.0 not in drawn and 77.0 not in drawn and 10.0 in drawn
    said = str(figs["comparison_table"].data[0].cells["values"][1])
    assert "null baseline" in said and "not comparable" in said


def test_a_swept_run_and_a_second_model_have_baselines_of_their_own():
    names = [fake_run(f"s/{model}-{variant}-k={k}-s{seed}", seed=seed, hook=model, l0=float(k))
             for model in ("a", "b") for variant in ("topk", "po") for k in (8, 16) for seed in (1, 2, 3)]
    found = compared(names)[0].differences
    assert sorted(set(found.variant)) == [f"{model}-po-k={k}" for model in "ab" for k in (16, 8)]


def test_a_baseline_that_no_run_has_is_an_error_with_the_nearest_name():
    with pytest.raises(ParameterError, match="did you mean 'topk'"):
        compared([fake_run("s/topk-s1"), fake_run("s/x-s1")], "tpok")


def test_a_baseline_s_seed_that_does_not_compare_and_a_seed_twice_give_no_pair():
    names = [fake_run(f"s/{variant}-s{seed}", seed=seed) for variant in ("topk", "po") for seed in (1, 2)]
    names += [fake_run("s/topk-s3", seed=3, activations={"content_hash": "other"}), fake_run("s/po-s3", seed=3)]
    assert compared(names)[0].differences.pairs.max() == 2
    assert compared([fake_run("a/topk-s1"), fake_run("b/topk-s1"), fake_run("a/x-s1")])[0].differences.empty


def test_a_frontier_runs_along_any_parameter(home):
    for k, weight in ((8, 0.1), (16, 0.2)):
        fake_run(f"s/m-a-k={k}-s1", l0=float(k))
        path = runs.folder_of(f"s/m-a-k={k}-s1") / "training.json"
        runs.write_json(path, runs.read_json(path) | {"ingredients": [{"name": "x", "weight": {"start": weight}}]})
    names = [f"s/m-a-k={k}-s1" for k in (8, 16)]
    def along(name):
        return compare.compare(check("compare", {"study": "s", "runs": names, "frontier": name})).table.along
    assert along("x.weight").tolist() == [0.1, 0.2]
    with pytest.raises(ParameterError, match="no run has a number for 'd_sea'; did you mean 'd_sae'"):
        along("d_sea")


def test_exported_text_is_never_read_as_a_number(tmp_path):
    frame = pd.DataFrame({"run_name": ["a", "b"], "hash": ["12e4", "0123"], "ev": [0.123456, np.nan]})
    compare._export(tmp_path, "t", frame)
    for ending, gap in (("tex", "--"), ("md", "")):
        text = (tmp_path / f"t.{ending}").read_text()
        assert "12e4" in text and "0123" in text and "0.1235" in text and "120000" not in text
        assert re.search(rf"0123 *[&|] *{gap} *(\\\\|\|)", text), text
    assert "run\\_name" in (tmp_path / "t.tex").read_text()


def test_a_claim_that_all_rows_share_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(show, "display", lambda what: said.append(what.data))
    rows = pd.DataFrame({"metric": ["ev", "ce"], "low": np.nan, "claim": "no claim possible: 1 paired seed"})
    show.claims(rows)
    assert said[0] == "Of every row: **no claim possible: 1 paired seed**."
    assert "no claim" not in said[1] and "<th>low</th>" not in said[1] and "<td>ce</td>" in said[1]
    said.clear()
    show.claims(rows.assign(claim=["higher: better", "no difference shown"]))
    assert len(said) == 1 and "higher: better" in said[0] and "<th>low</th>" in said[0]
