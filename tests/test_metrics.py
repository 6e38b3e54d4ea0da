"""Every metric says what a reader must know, and none of the misreadings of earlier studies is possible again."""

import importlib.metadata
import re
import tomllib
from math import inf, isfinite

import pandas as pd
import pytest
import torch
from sae_bench.evals.absorption.eval_output import AbsorptionMeanMetrics
from sae_bench.evals.core import eval_output as core
from sae_bench.evals.scr_and_tpp.eval_output import ScrMetrics, TppMetrics
from sae_bench.evals.sparse_probing.eval_output import SparseProbingLlmMetrics, SparseProbingSaeMetrics
from sae_bench.evals.unlearning.eval_output import UnlearningMetrics

from sae_lib import metrics, runs
from sae_lib.data.language_model import import_transformers
from sae_lib.evaluation import results
from sae_lib.metrics import METRICS, saebench, saebench_tasks
from sae_lib.views import figures_absorption, figures_compare, figures_explore

REPORTED = {ScrMetrics, TppMetrics, SparseProbingLlmMetrics, SparseProbingSaeMetrics, UnlearningMetrics,
            AbsorptionMeanMetrics, *(getattr(core, name) for name in (
                "ModelBehaviorPreservationMetrics", "ModelPerformancePreservationMetrics", "MiscMetrics",
                "ReconstructionQualityMetrics", "ShrinkageMetrics", "SparsityMetrics", "TokenStatsMetrics"))}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_carries_what_a_reader_must_know(metric):
    assert metric.label and metric.unit and metric.formula and metric.source and metric.version
    assert metric.direction in (-1, 0, 1) and metric.lowest < metric.highest
    if metric.trivial is not None:
        assert metric.lowest <= metric.trivial <= metric.highest and isfinite(metric.trivial) and metric.trivial_by
    assert not (metric.of_model and metric.direction), "what no SAE moves is neither good nor bad"


def test_labels_and_names_are_unique():
    labels = [metric.label for metric in METRICS.values()]
    assert len(set(labels)) == len(labels)
    assert all(name == metric.name for name, metric in METRICS.items())


def test_all_that_saebench_reports_is_known():
    names = {metrics.of_core(name) for kind in REPORTED for name in kind.__dataclass_fields__}
    # Spread over letters, which is no error bar, is shown nowhere.
    assert {name for name in names if name not in METRICS and not name.startswith("std_dev_")} == set()


def test_all_that_sae_probes_reports_is_known_by_names_of_its_own():
    import_transformers()  # sae-probes imports models
    from sae_bench.evals.sparse_probing_sae_probes.eval_output import SaeProbesLlmMetrics, SaeProbesSaeMetrics

    names = {name for kind in (SaeProbesLlmMetrics, SaeProbesSaeMetrics) for name in kind.__dataclass_fields__}
    # SAEBench has a field for a probe on all latents, and never fills it.
    assert {saebench_tasks.PREFIX + name for name in names - {"sae_test_accuracy"}} == {
        name for name in METRICS if name.startswith(saebench_tasks.PREFIX)}
    assert f"sae-probes {importlib.metadata.version('sae-probes')}" in METRICS["sae_probes_llm_test_auc"].version


def test_versions_are_those_that_are_installed():
    held = tomllib.loads((runs.project() / "pyproject.toml").read_text())["project"]
    assert saebench.VERSION.replace(" ", "==") in held["dependencies"]
    assert METRICS["explained_variance"].version == f"sae-workbook {held['version']}"
    assert METRICS["mean_absorption_score"].version != METRICS["mean_full_absorption_score"].version


@pytest.mark.parametrize("name", ["mean_absorption_score", "mean_full_absorption_score",
                                  "mean_absorption_fraction_score", "mean_num_split_features"])
def test_absorption_and_splits_are_lower_better_and_a_dead_sae_s_best_score_is_none(name):
    metric = METRICS[name]
    assert metric.reading == "lower is better" and metric.trivial == metric.lowest
    assert "no score" in metric.range


def test_unlearning_is_higher_better():
    metric = METRICS["unlearning_score"]
    assert metric.reading == "higher is better" and (metric.lowest, metric.highest, metric.trivial) == (0, 1, 0)


@pytest.mark.parametrize("name", ["l0", "core/l0"])
def test_l0_is_a_count_of_active_latents_and_no_share_of_zeros(name):
    metric = METRICS[name]
    assert metric.direction == 0 and metric.highest == inf and metric.unit == "active latents per token"
    assert "share" in metric.formula and "no share of zeros" in metric.formula


@pytest.mark.parametrize("name", ["explained_variance", "core/explained_variance", "explained_variance_legacy"])
def test_explained_variance_has_no_floor_and_0_is_the_mean(name):
    metric = METRICS[name]
    assert (metric.lowest, metric.highest, metric.trivial) == (-inf, 1, 0) and "no floor" in metric.range
    x = torch.randn(50, 4) + 5
    assert metrics.explained_variance(x, -x) < -10


@pytest.mark.parametrize("name", [name for name in METRICS if "llm_" in name])
def test_the_model_s_own_accuracy_is_nothing_that_an_sae_moved(name):
    metric = METRICS[name]
    assert metric.of_model and metric.direction == 0 and "no SAE is in it" in metric.formula
    beside = METRICS.get(name.replace("llm", "sae"), METRICS.get(name.replace("llm_", "sae_top_1_")))
    assert beside.direction == 1
    assert results._claim({"metric": name, "pairs": 3, "difference": 0.2, "low": 0.1, "high": 0.3, "p_holm": 0.01},
                          0.95) == "higher"


def test_tpp_is_good_where_the_class_meant_loses_and_the_others_do_not():
    assert [METRICS[f"tpp_threshold_10_{part}"].direction for part in (
        "total_metric", "intended_diff_only", "unintended_diff_only")] == [1, 1, -1]


def test_headers_and_axes_take_their_words_from_the_metrics():
    for name, metric in METRICS.items():
        assert figures_explore.called(name) == metric.called
    table = pd.DataFrame({"run": ["a"], "status": ["valid"], "reasons": [""], "flags": [""], "l0": [3.0], "mse": [1.0]})
    assert {METRICS["l0"].called, METRICS["mse"].called} < set(figures_compare.readable(table))
    assert set(figures_absorption.MAPS.values()) < set(METRICS)
    # No view writes a direction of its own.
    for path in (runs.project() / "sae_lib/views").rglob("*.py"):
        said = re.findall(r"(?:higher|lower) is better", path.read_text())
        assert len(said) == (2 if path.name == "figures_compare.py" else 0), path  # the arrows' key
