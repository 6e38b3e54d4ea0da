"""The gate's rules, each alone, on measurements as the stages write them."""

import pytest

from sae_lib.evaluation.validity import judge, sentence

GOOD = {"steps": 976, "planned_steps": 976, "nonfinite": None, "l0": 32.0, "dead_share": 0.01, "unused_share": 0.02,
        "explained_variance": 0.8, "explained_variance_untrained": 0.3, "norm_ratio": 0.97, "fold_error": 1e-7,
        "terms": {"auxk": {"median_share": 0.0, "inert_share": 1.0, "dominating_share": 0.0}}, "d_in": 576,
        "unfinished_schedules": [], "unused_parameters": [], "model_identity": "m", "hook": "h", "d_sae": 4096}
CORE = {"metrics": {"ce_loss_score": 0.95, "l0": 32.0},
        "config": {"model_identity": "m", "hook": "h", "d_sae": 4096}}


def test_a_good_run_is_valid():
    verdict = judge(GOOD, CORE)
    assert verdict == ("valid", [], [], ["training", "core"])
    assert judge(GOOD).checked == ["training"]


@pytest.mark.parametrize("changes, reason", [
    ({"steps": 0}, "never trained: 0 steps"),
    ({"steps": 0, "planned_steps": 0}, "never trained: 0 steps"),
    ({"steps": 975}, "fewer steps than planned: 975 of 976"),
    ({"nonfinite": "weights are not finite", "explained_variance": None}, "not finite: weights are not finite"),
    ({"l0": 0.0}, "mean L0 is 0"),
    ({"dead_share": 0.91}, "dead: 91.0% of latents"),
    ({"explained_variance": 0.0}, "explained variance 0.000 is not above 0"),
    ({"explained_variance": 0.29}, "not above the same SAE untrained (0.300)"),
    ({"explained_variance": None}, "not finite: explained variance"),
    ({"norm_ratio": 0.19}, "0.19 times the norm"),
    ({"norm_ratio": 2.1}, "2.10 times the norm"),
    ({"fold_error": 2e-4}, "decoder rows are not of unit norm"),
])
def test_each_training_rule_alone(changes, reason):
    verdict = judge(GOOD | changes, CORE)
    assert verdict.status == "invalid" and len(verdict.reasons) == 1 and reason in verdict.reasons[0]
    assert reason in sentence(verdict)


@pytest.mark.parametrize("where, changes, reason", [
    ("metrics", {"ce_loss_score": 0.0}, "cross-entropy recovered 0.000 is not above 0"),
    ("metrics", {"ce_loss_score": None}, "not finite: cross-entropy recovered"),
    ("metrics", {"l0": 0.0}, "mean L0 is 0 in SAEBench core"),
    ("config", {"model_identity": "other"}, "evaluated model 'other' is not the trained one 'm'"),
    ("config", {"hook": "h2"}, "evaluated hook"),
    ("config", {"d_sae": 2048}, "evaluated width '2048' is not the trained one '4096'"),
])
def test_each_evaluation_rule_alone(where, changes, reason):
    verdict = judge(GOOD, CORE | {where: CORE[where] | changes})
    assert verdict.status == "invalid" and len(verdict.reasons) == 1 and reason in verdict.reasons[0]


@pytest.mark.parametrize("changes, flag", [
    ({"l0": 289.0}, "not sparse: L0 289"),
    ({"terms": {"x": {"median_share": 1e-5, "inert_share": 0.9, "dominating_share": 0}}}, "term 'x' is inert"),
    ({"terms": {"x": {"median_share": 3, "inert_share": 0, "dominating_share": 0.6}}}, "term 'x' dominates"),
    ({"unfinished_schedules": ["x.weight"]}, "schedule unfinished: x.weight"),
    ({"unused_parameters": ["l1"]}, "parameter without effect: l1"),
])
def test_flags_leave_a_run_valid(changes, flag):
    verdict = judge(GOOD | changes, CORE)
    assert verdict.status == "valid" and flag in verdict.flags[0]
