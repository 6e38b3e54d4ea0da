"""What SAEBench's evaluations on labelled texts say of one SAE, as tables for 03's page."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sae_lib.metrics import METRICS
from sae_lib.metrics.saebench_tasks import PREFIX, PROBED
from sae_lib.views import beside_nulls, show
from sae_lib.views.template import value_within

TITLES = {"sparse_probing": "Sparse probing", "sae_probes": "sae-probes: k-sparse probing",
          "scr": "Spurious correlation removal", "tpp": "Targeted probe perturbation", "unlearning": "Unlearning"}
READING = {
    "sparse_probing": "Share of test texts that a linear probe puts in the right class; 0.5 is chance. `all`: on every "
                      "channel or latent, `top k`: on the best k",
    "sae_probes": "AUC (and accuracy) of a linear probe that tells two classes of texts by their last token; 0.5 is "
                  "chance. `LLM`: on all channels, `top k`: on the k latents whose means differ most between classes",
    "scr": "Share of the accuracy lost to a spurious label that comes back with the best n latents for it ablated; 1 "
           "is all, below 0 harms. Later work holds it, and TPP, unfit to rank SAEs",
    "unlearning": "Share of the biology questions known that are no longer answered, at the best of a sweep that keeps "
                  "0.99 of other subjects'; more settings raise it",
    "tpp": "Accuracy lost by a class' own probe less that lost by the others', with the class' best n latents ablated"}
HEADLINE = {"sparse_probing": "sae_top_1_test_accuracy", "sae_probes": "sae_probes_sae_top_1_test_auc",
            "scr": "scr_metric_threshold_20", "tpp": "tpp_threshold_20_total_metric", "unlearning": "unlearning_score"}
"""Of each evaluation, the metric whose direction is the table's."""


def tables(results: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """By evaluation that gave figures: a row for each data set, one for their mean with intervals, each null's mean."""
    found = {}
    for name in READING:
        report = results.get(name, {})
        if report.get("metrics"):
            found[name] = pd.DataFrame([*(_row(name, detail) for detail in report["raw"]["eval_result_details"]),
                                        _row(name, {"dataset_name": "mean", **report["metrics"]},
                                             report.get("within_this_sae", {})),
                                        *(_row(name, {"dataset_name": f"mean, {what}", **metrics}) for what, metrics in
                                          beside_nulls.figures(results.get("nulls", {}), name).items())])
    return found


def display(results: dict[str, Any]) -> None:
    """Display every evaluation beside core: its table and how to read it, or why it has none."""
    shown, asked = tables(results), [name for name in TITLES if name in results]
    for name in asked:
        report = results[name]
        within = report.get("within_this_sae", {})
        data = "; ".join(f"{one}: {about}" for one, about in report["config"].get("data", {}).items())
        words = [f"**{TITLES[name]}**", _reading(name), f"{report['status']}: {report['reason']}."
                 if "reason" in report else None, report.get("note"), f"Data: {data}." if data else None,
                 f"Small, within this SAE ({within['level']:.0%}): {within['by']}." if len(within) > 2 else None,
                 beside_nulls.without(results.get("nulls", {}), name)]
        show.markdown("\n\n".join(word for word in words if word))
        if name in shown:
            own = len(results[name]["raw"]["eval_result_details"]) + 1
            show.table(shown[name], shown[name].apply(lambda column, own=own: column.index >= own))
    if not asked:
        show.markdown("*none asked for*")


def _reading(name: str) -> str | None:
    return f"{READING[name]}; {METRICS[HEADLINE[name]].reading}." if name in READING else None


def _row(name: str, detail: dict[str, Any], within: dict[str, list[float]] | None = None) -> dict[str, Any]:
    if name == "sparse_probing":
        keys = {f"{kind}, {f'top {k}' if k else 'all'}": f"{kind.lower()}_{f'top_{k}_' if k else ''}test_accuracy"
                for kind in ("LLM", "SAE") for k in (0, 1, 2, 5)}
    elif name == "sae_probes":  # the mean's keys are the metrics', a data set's SAEBench's
        detail = {key.removeprefix(PREFIX): value for key, value in detail.items()}
        within = within and {key.removeprefix(PREFIX): ends for key, ends in within.items()}
        keys = {f"{head}{what}": f"{probe}_test_{measure}"
                for what, measure in ((" (AUC)", "auc"), (" (accuracy)", "accuracy"))
                for head, probe in (("LLM", "llm"), *((f"SAE, top {k}", f"sae_top_{k}") for k in PROBED))}
    elif name == "unlearning":
        keys = {METRICS["unlearning_score"].label: "unlearning_score"}
    else:
        keys = {f"n = {key.split('_threshold_')[1].split('_')[0]}": key for key in detail
                if key.startswith("scr_metric") or (name == "tpp" and key.endswith("_total_metric"))}
    figures = {head: detail[key] if within is None else value_within(detail[key], *within.get(key, ()))
               for head, key in keys.items() if detail.get(key) is not None}
    return {"data": detail["dataset_name"].removesuffix("_results"), **figures}
