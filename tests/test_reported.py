"""What earlier studies reported: every record placed and judged by rules, and none mixed with what is measured."""

import json

import numpy as np
import pytest

from sae_lib import params, runs
from sae_lib.evaluation import reported
from sae_lib.evaluation.reported import records, rules
from sae_lib.metrics import METRICS
from sae_lib.views import figures_reported, show
from sae_lib.views.template import FAINT, GREY, as_html

SIZES = {"progressive-orthogonality": 7, "temporal-coactivation": 3, "hybrid-contrastive": 11,
         "bounded-compression": 10}


@pytest.fixture(scope="module")
def raw():
    return json.loads(records.FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found():
    return {one.record.name: one for one in reported.judged()}


@pytest.fixture(scope="module")
def studies():
    return {study.name: study for study in reported.studies()}


def of(one, rule):
    return [note for note in one.annotations if note.rule == rule]


def altered(raw, tmp_path, change):
    """The records of a file in which ``change`` altered the raw data."""
    held = json.loads(json.dumps(raw))
    change(held)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(held))
    return records.read(path)


def test_all_records_are_placed(found, studies):
    assert {name: len(study.records) for name, study in studies.items()} == SIZES and len(found) == 31
    for one in found.values():
        record = one.record
        assert (runs.project() / f"params/variants/{record.variant}.yaml").exists()
        assert record.model == "google/gemma-2-2b" and record.d_in == 2304 and record.d_sae
        assert record.steps is not None and record.samples == record.steps * 2048
        assert record.hook in (None, f"blocks.{record.layer}.hook_resid_post")
        assert set(record.figures) <= set(METRICS) and all(np.isfinite(list(record.figures.values())))
        assert set(record.settings) <= set(record.evals)
    place = found["temporal-coactivation run_1"].record
    assert (place.layer, place.d_sae, place.k, place.l0, place.steps) == (12, 4608, 160, 160, 2441)
    assert not place.by_study and place.settings["scr"]["perform_scr"] is True
    # Where nothing is said, the study's description places it, and that is marked.
    prose = found["progressive-orthogonality run_3"].record
    assert (prose.layer, prose.d_sae, prose.k, prose.steps) == (12, 16384, 320, 2441)
    assert prose.by_study == {"layer", "d_sae", "k", "steps"}


@pytest.mark.parametrize("study, file", [("progressive-orthogonality", "progressive_gemma"),
                                         ("hybrid-contrastive", "hybrid_gemma"),
                                         ("bounded-compression", "compression_gemma")])
def test_a_study_s_description_is_what_its_params_file_trains(study, file):
    held, said = params.load_yaml(runs.project() / f"params/studies/{file}.yaml"), records.STUDIES[study]
    shared = held["shared"]
    assert (shared["d_sae"], shared.get("k"), held["baseline"]) == (said.d_sae, said.k, said.base)
    assert said.steps == shared["samples"] // shared["batch_size"] and shared["batch_size"] == records.BATCH


def test_study_1_s_baselines_have_their_letters_and_the_standard_one_is_not_sparse(found):
    topk, standard = (found[f"progressive-orthogonality baseline_{name}"] for name in ("topk", "standard"))
    assert (len(topk.record.letters), len(standard.record.letters)) == (25, 24)
    assert "24 letters (without v)" in of(standard, "letters")[0].sentence
    assert standard.status == "not comparable" and "L0 8896 of 16384" in of(standard, "not sparse")[0].sentence
    assert topk.status == "reported"
    assert of(topk, "contradicts itself")[0].sentence == "lr is 0.0002 in its configuration, 0.0003 in its summary"
    assert not of(standard, "contradicts itself")  # its two agree
    for number in range(1, 6):
        one = found[f"progressive-orthogonality run_{number}"]
        assert one.status == "reported" and of(one, "prose only")


def test_degenerate_scores_are_none(found, studies):
    for number in range(1, 10):
        one = found[f"hybrid-contrastive run_{number}"]
        assert one.status == "degenerate" and of(one, "no score") and not one.stands("mean_absorption_score")
        assert of(one, "another record")  # all nine have the same figures
    assert found["hybrid-contrastive run_10"].status == "not comparable"
    assert of(found["hybrid-contrastive run_10"], "nothing reported")
    compression = studies["bounded-compression"].records
    assert len(compression) == 10 and {one.status for one in compression} == {"degenerate"}
    rule_of = {one.record.run: {note.rule for note in one.annotations} for one in compression}
    assert {"never trained", "chance", "contradicts itself", "another record"} <= rule_of["baseline_standard"]
    assert {"never trained", "nothing active", "explained variance", "error of nothing",
            "no number"} <= rule_of["run_1"]
    assert all({"chance", "model's own"} <= rule_of[f"run_{number}"] for number in range(2, 6))
    assert all({"nothing active", "explained variance", "error of nothing"} <= rule_of[f"run_{number}"]
               for number in range(6, 10))
    for name in ("hybrid-contrastive", "bounded-compression"):
        assert not any(studies[name].standing(metric) for metric in METRICS)


def test_temporal_run_1_is_not_in_one_column_with_its_baseline(found, studies):
    study = studies["temporal-coactivation"]
    assert [[one.record.run for one in part.records] for part in study.parts] == [
        ["baseline_topk"], ["baseline_standard"], ["run_1"]]
    for word in ("width F 4608 against 18432", "k 160 against 320", "steps 2441 against 4882"):
        assert word in study.parts[2].why
    assert set(study.standing("kl_div_score")) == {"baseline_topk"}
    frames = [shown.frame for shown in figures_reported.tables([study]) if len(shown.frame)]
    assert [list(frame.run) for frame in frames] == [["baseline_topk"], ["baseline_standard"], ["run_1"]]


def test_an_evaluation_of_another_sae_greys_its_figures_alone(found):
    one = found["temporal-coactivation baseline_topk"]
    assert one.status == "reported" and one.stands("mean_absorption_score")
    assert not one.stands("unlearning_score") and "d_sae 4608 (trained: 18432)" in one.wrong
    assert "d_sae 65536" in found["temporal-coactivation baseline_standard"].wrong
    shown = figures_reported._table([one])
    assert shown[1].iloc[0].to_dict() == {key: key == METRICS["unlearning_score"].called for key in shown[0]}


def test_other_settings_than_the_baseline_s_are_named(raw, tmp_path):
    def change(held):
        held["runs"][1]["evals"]["sparse_probing"]["eval_config"] |= {"context_length": 64, "k_values": [1, 2]}
    one = next(one for one in rules.judge(altered(raw, tmp_path, change).records)
               if one.record.name == "progressive-orthogonality baseline_standard")
    note, = of(one, "settings")
    assert "context_length 64 against 128" in note.sentence and "k_values" in note.sentence
    assert "sae_top_1_test_accuracy" in note.figures and "mean_absorption_score" not in note.figures


@pytest.mark.parametrize("change, rule", [
    (lambda evals: evals["training"]["final_info"].update(training_steps=0), "never trained"),
    (lambda evals: evals["core"]["metrics"]["sparsity"].update(l0=0.0), "nothing active"),
    (lambda evals: evals["core"]["metrics"]["reconstruction_quality"].update(explained_variance=-3),
     "explained variance"),
    (lambda evals: evals["core"]["metrics"]["reconstruction_quality"].update(mse=47.25), "error of nothing"),
    (lambda evals: evals["absorption"]["eval_result_metrics"]["mean"].update(
        mean_absorption_score=0.0, mean_num_split_features=1.0), "no score"),
    (lambda evals: evals["sparse_probing"]["eval_result_metrics"]["sae"].update(
        dict.fromkeys(evals["sparse_probing"]["eval_result_metrics"]["sae"], 0.5)), "chance")])
def test_a_rule_reads_the_data_and_no_list(raw, tmp_path, change, rule):
    held = altered(raw, tmp_path, lambda data: change(data["runs"][0]["evals"]))
    one = rules.judge(held.records)[0]
    assert one.status == "degenerate" and of(one, rule)
    assert not one.stands("kl_div_score")


def test_targets_are_the_file_s_and_agree_with_the_metrics_directions(raw, tmp_path, studies):
    targets = studies["progressive-orthogonality"].targets
    assert {name: f"{target.sign} {target.value:g}" for name, target in targets.items()} == {
        "mean_absorption_score": "< 0.01", "sae_top_1_test_accuracy": "> 0.74", "unlearning_score": "> 0.1"}
    assert all(METRICS[name].direction == {"<": -1, ">": 1}[target.sign] for name, target in targets.items())
    assert targets["unlearning_score"].met(0.2) and not targets["mean_absorption_score"].met(0.02)

    def change(held):
        held["targets"]["progressive-orthogonality"]["unlearning_score"] = "> 0.3"
    assert altered(raw, tmp_path, change).targets["progressive-orthogonality"]["unlearning_score"].value == 0.3


def test_nan_and_null_are_no_figures(raw, tmp_path):
    def change(held):
        groups = held["runs"][0]["evals"]["core"]["metrics"]
        groups["reconstruction_quality"] |= {"cossim": None, "mse": float("nan")}
    record = altered(raw, tmp_path, change).records[0]
    assert not {"cossim", "core/mse"} & set(record.figures) and {"cossim", "core/mse"} <= set(record.missing)
    assert "sae_top_100_test_accuracy" not in record.missing  # it was not asked for
    one = rules.judge([record])[0]
    assert "Cosine similarity" in of(one, "no number")[0].sentence and one.status == "reported"


@pytest.mark.parametrize("change", [
    lambda held: held.pop("runs"), lambda held: held.pop("targets"), lambda held: held.update(runs=3),
    lambda held: held["runs"][3].pop("variant"), lambda held: held["runs"][3].update(source="another"),
    lambda held: held["runs"][3]["reported"].update(l0="many"), lambda held: held["runs"][3].update(evals=[]),
    lambda held: held["runs"][3]["reported"].update(hardness=1.0), lambda held: held["runs"].append(held["runs"][0]),
    lambda held: held["targets"]["progressive-orthogonality"].update(unlearning_score="about 1"),
    lambda held: held["runs"][0]["evals"]["core"].update(metrics=[1]),
    lambda held: held["runs"][0]["evals"]["absorption"].update(eval_result_details=[{}])])
def test_a_damaged_file_is_one_clear_error(raw, tmp_path, change):
    with pytest.raises(runs.RunError, match=r"results.json: the reported results are damaged .*install") as error:
        altered(raw, tmp_path, change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_cut_file_is_the_same_error(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    for path in (tmp_path / "results.json", tmp_path / "none.json"):
        with pytest.raises(runs.RunError, match="reported results are damaged"):
            records.read(path)


@pytest.mark.parametrize("variants, names", [
    (["topk", "standard", "batch_topk"], []), (["smollm2-topk", "smollm2-progressive_orthogonality_2"],
                                               ["progressive-orthogonality"]),
    (["progressive_orthogonality"], ["progressive-orthogonality"]),
    (["gemma-2-2b-hybrid_contrastive_3_topk-layer=5"], ["hybrid-contrastive"]),
    (["bounded_compression_fixed", "temporal_coactivation_0"], ["temporal-coactivation", "bounded-compression"])])
def test_a_comparison_s_variants_tell_the_study(variants, names):
    assert [study.name for study in reported.of_variants(variants)] == names


def test_the_tables_grey_what_is_no_result_and_say_directions(studies, monkeypatch):
    for study in studies.values():
        heading, *shown = figures_reported.tables([study])
        assert heading.sentence.startswith("## As reported") and len(shown) == len(study.parts)
        for part, table in zip(study.parts, shown):
            grey = [one.status != "reported" for one in part.records]
            assert list(table.grey.all(axis=1)) == grey and table.frame.shape == table.grey.shape
            text = as_html(table.frame, table.grey)
            assert text.count(FAINT) == table.grey.to_numpy().sum()
            assert not any(METRICS[name].of_model for name in METRICS if METRICS[name].called in table.frame)
            assert all(one.wrong in said or one.wrong == "" for one, said in zip(part.records,
                                                                                 table.frame["what is wrong"]))
    text = "".join(figures_reported.tables([studies["progressive-orthogonality"]])[1].frame)
    for word in ("(early SAEBench) (lower is better)", "Unlearning (higher is better)"):
        assert word in text
    assert figures_reported.tables([]) == [] and figures_reported.all_figures([]) == {}
    drawn = []
    monkeypatch.setattr(show, "display", drawn.append)
    show.tables(figures_reported.tables([studies["temporal-coactivation"]]))
    assert len(drawn) == 1 + 2 * 3 and "<script" not in "".join(piece.data for piece in drawn)


def test_the_figure_has_the_study_s_targets_and_faulty_runs_grey(studies):
    study = studies["progressive-orthogonality"]
    fig = figures_reported.figure(study)
    assert [shape.x0 for shape in fig.layout.shapes] == [0.01, 0.74, 0.1]
    filled, hollow, crosses = fig.data[:3]
    assert list(filled.x) == [pytest.approx(0.0295923, rel=1e-5)] and len(hollow.x) == 5
    assert list(crosses.x) == [pytest.approx(0.0161386, rel=1e-5)] and crosses.marker.color == GREY
    assert study.standing("mean_absorption_score").keys() == {"baseline_topk", *(f"run_{n}" for n in range(1, 6))}
    for name in ("hybrid-contrastive", "bounded-compression"):
        assert all(trace.marker.color == GREY for trace in figures_reported.figure(studies[name]).data if len(trace.x))
