"""What SAEBench's evaluations on labelled texts say of one SAE, as tables for 03's page."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sae_lib.metrics import METRICS
from sae_lib.views import show

TITLES = {"sparse_probing": "Sparse probing", "scr": "Spurious correlation removal",
          "tpp": "Targeted probe perturbation", "unlearning": "Unlearning"}
READING = {
    "sparse_probing": "Share of test texts that a linear probe puts in the right class; 0.5 is chance. `all`: on every "
                      "channel or latent, `top k`: on the best k",
    "scr": "Share of the accuracy lost to a spurious label that comes back with the best n latents for it ablated; 1 "
           "is all, below 0 harms. Later work holds it, and TPP, unfit to rank SAEs",
    "unlearning": "Share of the biology questions known that are no longer answered, at the best of a sweep that keeps "
                  "0.99 of other subjects'; more settings raise it",
    "tpp": "Accuracy lost by a class' own probe less that lost by the others', with the class' best n latents ablated"}
HEADLINE = {"sparse_probing": "sae_top_1_test_accuracy", "scr": "scr_metric_threshold_20",
            "tpp": "tpp_threshold_20_total_metric", "unlearning": "unlearning_score"}
"""Of each evaluation, the metric whose direction is the table's."""


def tables(results: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """By evaluation that gave figures: a row for each data set and one for their mean."""
    found = {}
    for name in READING:
        report = results.get(name, {})
        if report.get("metrics"):
            details = [*report["raw"]["eval_result_details"], {"dataset_name": "mean", **report["metrics"]}]
            found[name] = pd.DataFrame([_row(name, detail) for detail in details])
    return found


def display(results: dict[str, Any]) -> None:
    """Display every evaluation beside core: its table and how to read it, or why it has none."""
    shown, asked = tables(results), [name for name in TITLES if name in results]
    for name in asked:
        report = results[name]
        data = "; ".join(f"{one}: {about}" for one, about in report["config"].get("data", {}).items())
        words = [f"**{TITLES[name]}**", _reading(name), f"{report['status']}: {report['reason']}."
                 if "reason" in report else None, report.get("note"), f"Data: {data}." if data else None]
        show.markdown("\n\n".join(word for word in words if word))
        if name in shown:
            show.table(shown[name])
    if not asked:
        show.markdown("*none asked for*")


def _reading(name: str) -> str | None:
    return f"{READING[name]}; {METRICS[HEADLINE[name]].reading}." if name in READING else None


def _row(name: str, detail: dict[str, Any]) -> dict[str, Any]:
    if name == "sparse_probing":
        figures = {f"{kind}, {f'top {k}' if k else 'all'}": detail.get(
            f"{kind.lower()}_{f'top_{k}_' if k else ''}test_accuracy") for kind in ("LLM", "SAE") for k in (0, 1, 2, 5)}
    elif name == "unlearning":
        figures = {METRICS["unlearning_score"].label: detail["unlearning_score"]}
    else:
        figures = {f"n = {key.split('_threshold_')[1].split('_')[0]}": value for key, value in detail.items()
                   if key.startswith("scr_metric") or (name == "tpp" and key.endswith("_total_metric"))}
    figures = {key: value for key, value in figures.items() if value is not None}
    return {"data": detail["dataset_name"].removesuffix("_results"), **figures}
