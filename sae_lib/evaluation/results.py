"""Runs into one table: verdicts first, then figures, then what the differences support.

A run that is missing, failed or damaged is one row with its reason, never the end of the table. Figures of runs that
are not valid are kept apart (``results`` masks them), so that no mean, ranking or plot can take them up.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import yaml

from sae_lib import params, runs
from sae_lib.evaluation import contrasts, faults
from sae_lib.metrics import METRICS

TRAINING = ("explained_variance", "mse", "l0", "dead_share", "idle_share", "unused_share", "mean_cos2", "norm_ratio")
CORE = ("ce_loss_score", "kl_div_score", "kl_div_with_sae", "frac_alive", "cossim", "l2_ratio")
LETTERS = ("mean_full_absorption_score", "mean_absorption_fraction_score", "mean_num_split_features")
FURTHER = {"sparse_probing": ("sae_top_1_test_accuracy", "sae_top_5_test_accuracy", "llm_test_accuracy"),
           "sae_probes": ("sae_probes_sae_top_1_test_auc", "sae_probes_sae_top_5_test_auc", "sae_probes_llm_test_auc"),
           "scr": ("scr_metric_threshold_20",), "tpp": ("tpp_threshold_20_total_metric",),
           "unlearning": ("unlearning_score",),
           "truth": ("mcc", "recovered", "true_absorption", "true_absorption_of_parent", "saebench_full_absorption",
                     "saebench_full_absorption_with_child", "saebench_absorption_fraction")}
"""Of each of the other evaluations, the figures that a table shows."""
FIGURES = TRAINING + CORE + LETTERS + tuple(name for names in FURTHER.values() for name in names if name in METRICS)
EVALUATION = dict.fromkeys(CORE, "core") | dict.fromkeys(LETTERS, "absorption") | {
    name: evaluation for evaluation, names in FURTHER.items() for name in names}
"""The evaluation that a figure is of; training's are of none."""
L0_TOLERANCE = 0.1
NUMBERS, LARGEST = ("seed", "samples", "seconds", "d_sae", "k"), 1e300
STATES = ("valid", "invalid", "failed", "null")


def collect(names: list[str]) -> pd.DataFrame:
    """One row per run of ``names``: identity, verdict, comparability key and every metric found."""
    rows = [_row(name) for name in names]
    table = pd.DataFrame(rows, columns=list(dict.fromkeys(key for row in rows for key in row)))
    return table.assign(**{name: pd.to_numeric(table.get(name), errors="coerce") for name in FIGURES})


def _row(name: str) -> dict[str, Any]:
    row = {"run": name, "variant": variant_of(name), "status": "failed", "reasons": "", "flags": "", "role": "normal",
           "model": None, "seed": None}
    try:
        return row | _plain(_read(runs.Run(name)))
    except (runs.RunError, params.ParameterError, KeyError, TypeError, AttributeError, ValueError, OSError,
            yaml.YAMLError) as error:
        text = str(error) if isinstance(error, (runs.RunError, params.ParameterError)) else f"damaged: {error!r}"
        return row | {"reasons": text}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row, whose values are words and numbers that a column can hold. Raises ValueError naming another."""
    for key, value in row.items():
        number = key in FIGURES or key in NUMBERS or key.startswith(("loss/", "share/", "within/"))
        fine = (int, float) if number else bool if key == "stale" else str
        switch = isinstance(value, bool) and key != "stale"
        if value is not None and (switch or not isinstance(value, fine) or (number and abs(value) > LARGEST)):
            raise ValueError(f"{key} is {str(value)[:40]!r}")
    return row


def _read(run: runs.Run) -> dict[str, Any]:
    if not run.path.is_dir():
        raise runs.RunError(f"not there: {run.path.relative_to(runs.home())}")
    verdict = run.json("validity.json", {"status": "failed", "reasons": ["no verdict: 02 did not end"], "flags": []})
    if verdict["status"] == "failed" and not (run.path / "params.yaml").exists() and len(verdict["reasons"]):
        raise runs.RunError("; ".join(verdict["reasons"]))  # it never began
    values, t, core = run.params, run.json("training.json", {}), run.json("evals/core.json", {})
    row = {"status": verdict["status"], "reasons": "; ".join(verdict["reasons"]), "flags": "; ".join(verdict["flags"])}
    if row["status"] not in STATES:
        raise runs.RunError(f"validity.json: expected a status of {', '.join(STATES)}, got '{row['status']}'")
    if row["status"] == "valid" and not t:
        raise runs.RunError("no training.json: run 02_train_variant again")
    gone = [name for name in verdict.get("checked", ()) if name in faults.NAMES and not run.json(f"evals/{name}.json")]
    if gone:
        raise runs.RunError(f"the verdict has seen {', '.join(gone)}, but there is no evals/{gone[0]}.json: run its "
                            "notebook again")
    if core.get("metrics") and "core" not in verdict.get("checked", ["core"]):
        raise runs.RunError("the verdict has not seen evals/core.json (03 was cut): run 03_eval again")
    row |= {key: values.get(key) for key in ("role", "model", "seed", "architecture", "d_sae", "k")}
    row |= {"hook": t.get("hook"), "samples": t.get("samples")}
    row["activations"] = t.get("activations", {}).get("content_hash")
    row |= {name: t.get(name) for name in TRAINING} | {name: core.get("metrics", {}).get(name) for name in CORE}
    row |= {f"loss/{key}": value for key, value in t.get("final_loss", {}).items()}
    row |= {f"share/{key}": value["median_share"] for key, value in t.get("terms", {}).items()}
    row |= within(t, TRAINING) | within(core, CORE)
    absorption = run.json("evals/absorption.json", {})
    row |= within(absorption, LETTERS)
    row |= {name: absorption.get("metrics", {}).get(name) for name in LETTERS}
    row["letters"] = absorption.get("config", {}).get("comparable")
    for evaluation in FURTHER:
        report = run.json(f"evals/{evaluation}.json", {})
        row |= {name: value for name, value in report.get("metrics", {}).items() if name in FIGURES}
        row |= within(report, FURTHER[evaluation])
        row[evaluation] = report.get("config", {}).get("comparable")
    reports = {name: run.json(f"evals/{name}.json") for name in faults.NAMES}
    row |= {f"no_figure/{name}": why for name, report in reports.items()
            if report and (why := faults.no_figure(report))}
    row["evaluation"] = core.get("config", {}).get("comparable")
    row["sae_bench"] = core.get("provenance", {}).get("packages", {}).get("sae-bench")
    row["stale"] = t.get("provenance", {}).get("library") != runs.library_digest()
    row["seconds"] = t.get("seconds")
    return row


def within(report: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """A report's intervals "within this SAE" as columns ``within/<metric>/low`` and ``/high``, for those it has."""
    found = report.get("within_this_sae") or {}
    return {f"within/{name}/{side}": end for name in names if found.get(name)
            for side, end in zip(("low", "high"), found[name], strict=True)}


def variant_of(name: str) -> str:
    """The variant (with its model and swept values) of a run's name: the folder without its seed."""
    return re.sub(r"-s\d+$", "", name.rpartition("/")[2])


def results(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose figures are results: valid, and no null baselines."""
    return table[(table.status == "valid") & (table.role != "null")]


def masked(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a file: figures that are not results move to columns ``not_a_result/<metric>``.

    So a mean over a metric's column of table.csv takes up results alone.
    """
    result = pd.Series(table.index.isin(results(table).index), table.index)
    figures = [name for name in table if name in METRICS or name.startswith(("loss/", "share/", "within/"))]
    moved = pd.DataFrame({f"not_a_result/{name}": table[name].where(~result) for name in figures})
    kept = table.assign(**{name: table[name].where(result) for name in figures})
    return pd.concat([kept, moved.dropna(axis=1, how="all")], axis=1)


KEY = {"model": "model", "hook": "hook", "activations": "activations", "samples": "training samples", "d_sae": "width",
       "evaluation": "evaluation", "letters": "absorption's evaluation",
       "sparse_probing": "sparse probing's evaluation", "sae_probes": "sae-probes' evaluation",
       "scr": "SCR's evaluation", "tpp": "TPP's evaluation",
       "unlearning": "unlearning's evaluation", "truth": "the planted truth",
       "sae_bench": "sae-bench version"}


def why_apart(row: pd.Series, baseline: pd.Series, free: set[str] = frozenset()) -> str:
    """Why a run's figures may not stand in one column with the baseline's; empty where they may.

    What is ``free`` (of a curve, what it runs along) may differ.
    """
    apart = [f"{label} ({row.get(key)} against {baseline.get(key)})" for key, label in KEY.items()
             if key not in free and not _same(row.get(key), baseline.get(key))]
    l0, other = row.get("l0"), baseline.get("l0")
    if "l0" not in free and pd.notna(l0) and pd.notna(other) and abs(l0 - other) > L0_TOLERANCE * other:
        apart.append(f"L0 ({l0:.1f} against {other:.1f}, over 10 % apart)")
    return "; ".join(apart)


def _same(a: Any, b: Any) -> bool:
    return (pd.isna(a) and pd.isna(b)) or a == b


def compared(table: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """The table with ``apart``: why a run's figures do not stand beside its baseline's; empty where they do.

    A run's baseline has the same model and swept values; where it has no valid run, nothing is known to differ.
    """
    own, valid, apart = baselines(table, baseline), results(table), []
    for place, row in table.iterrows():
        base = valid[valid.variant == own[place]]
        apart.append("null baseline" if row.role == "null" else row.status if row.status != "valid" else
                     why_apart(row, base.iloc[0]) if len(base) else "")
    return table.assign(apart=apart)


def parts_of(variant: str, model: str | None) -> tuple[str, str, str]:
    """A table's variant as model, variant's own name and swept values: ``smollm2-topk-k=64`` -> smollm2, topk, k=64."""
    head, sweep = re.fullmatch(r"(.*?)(?:-(\w+=.*))?", variant).groups()
    front = (model or "").rpartition("/")[2] + "-"
    return (front[:-1], head.removeprefix(front), sweep or "") if head.startswith(front) else ("", head, sweep or "")


def baselines(table: pd.DataFrame, baseline: str | None) -> pd.Series:
    """For each run, the variant (as the table names it) that is its baseline: of its model and its swept values.

    ``baseline`` may have the model in front; None takes the first run's. Raises ParameterError for one that no run has.
    """
    # A run that is not there has no model, and a file of params/models need not be called as its model is: what
    # stands before the baseline's name is a model too.
    heads = [parts_of(variant, None)[1] for variant in table.variant]
    models = [str(model) for model in table.model.dropna().unique()]
    models += [head.removesuffix(f"-{baseline}") for head in heads if baseline and head.endswith(f"-{baseline}")]
    parts = [next((p for m in [row.model, *models] if (p := parts_of(row.variant, m))[0]), parts_of(row.variant, None))
             for row in table.itertuples()]
    named = dict(zip(table.variant, parts))
    wanted = named.get(baseline, (None, baseline))[1] if baseline else parts[0][1]
    if wanted not in {part[1] for part in parts}:
        known = sorted({part[1] for part in parts})
        raise params.ParameterError(f"baseline: no run is of variant '{baseline}'{params.nearest(str(baseline), known)}"
                                    f"; there are {', '.join(known)}")
    places = {part: variant for variant, part in named.items() if part[1] == wanted}
    found = [places.get((model, wanted, sweep)) or places.get((model, wanted, "")) or next(iter(places.values()))
             for model, _, sweep in parts]
    return pd.Series(found, index=table.index)


def differences(table: pd.DataFrame, baseline: str | None, metrics=FIGURES, level: float = 0.95) -> pd.DataFrame:
    """Each variant beside the baseline, over the seeds that they share: difference, interval, claim.

    Both come from one fit of variant + seed over all runs that share a baseline (``contrasts.fit``): with one variant,
    the paired t interval. Holm's correction is within a metric. Fewer than three pairs: no claim. A difference is
    called one only if its interval excludes zero and Holm keeps it. Who reads ten metrics meets more false claims than
    who reads one: ``all_metrics`` says of each claim whether Holm's correction over the whole table keeps it too.
    """
    valid, rows = single(table, baseline), []
    for metric in metrics:
        found = []
        for own, group in valid[["own", "variant", "seed", metric]].dropna(subset=[metric]).groupby("own", sort=False):
            fitted = contrasts.fit(group[metric], group.variant, group.seed)
            base = set(group.seed[group.variant == own])
            for variant, runs_of in group[group.variant != own].groupby("variant", sort=False):
                if pairs := len(base & set(runs_of.seed)):
                    row = {"metric": metric, "variant": variant, "pairs": pairs, **fitted.contrast(variant, own, level)}
                    found.append(row | dict.fromkeys(("low", "high", "p"), np.nan) if pairs < 3 else row)
        contrasts.holm(found)
        rows += [row | {"claim": _claim(row, level)} for row in found]
    every = [{"p": row["p"]} for row in rows]
    contrasts.holm(every)
    for row, whole in zip(rows, every):
        called = row["claim"].startswith(("higher", "lower"))
        row["all_metrics"] = "" if not called else "holds" if whole["p_holm"] <= 1 - level else "not shown"
    return pd.DataFrame(rows, columns=["metric", "variant", "pairs", "difference", "low", "high", "p_holm", "claim",
                                       "all_metrics"])


def single(table: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """The runs that are results and compare with their baseline, whose variant ``own`` names, one a seed.

    Two runs of one variant and seed (of two studies, say) leave open which is meant: neither is taken.
    """
    table = compared(table, baseline)
    valid = results(table.assign(own=baselines(table, baseline)))
    valid = valid[valid.apart == ""].dropna(subset=["seed"])
    return valid[~valid.duplicated(["variant", "seed"], keep=False)]


def _claim(row: dict[str, Any], level: float) -> str:
    if row["pairs"] < 3:
        return f"no claim possible: {row['pairs']} paired seed{'s' * (row['pairs'] != 1)}, at least 3 are needed"
    if row["low"] <= 0 <= row["high"] or row["p_holm"] > 1 - level:
        return "no difference shown"
    gain = METRICS[row["metric"]].direction * row["difference"] if row["metric"] in METRICS else 0
    return ("higher" if row["difference"] > 0 else "lower") + (": better" if gain > 0 else ": worse" if gain else "")
