"""The validity gate: may this run's figures be read as results?

Pure rules over what training (training.json) and evaluation (evals/*.json) measured. 02 writes what training can
know, 03 completes it, 05 obeys it. A run found invalid is a result too: its stages end without an error and say why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sae_lib import runs
from sae_lib.evaluation import faults
from sae_lib.metrics import METRICS
from sae_lib.training.limits import INERT

FURTHER = ("sparse_probing", "sae_probes", "scr", "tpp", "unlearning", "truth")
"""The evaluations beside core and absorption."""
BESIDE_NULLS = {"core": ("explained_variance", "ce_loss_score"), "sparse_probing": ("sae_top_1_test_accuracy",),
                "sae_probes": ("sae_probes_sae_top_1_test_auc",),
                "scr": ("scr_metric_threshold_20",), "tpp": ("tpp_threshold_20_total_metric",),
                "absorption": ("mean_full_absorption_score", "mean_absorption_fraction_score")}
"""Of each evaluation, the figures that a trained SAE should have better than a null baseline."""
WEIGHTS = "sae/sae_weights.safetensors"
DEAD_LIMIT, EMPTY_L0, FOLD_LIMIT, NORM_RATIO = 0.9, 0.1, 1e-4, (0.2, 2.0)


class Verdict(NamedTuple):
    """What validity.json holds, beside its provenance."""

    status: str
    """valid, invalid, null (a baseline, exempt) or failed (a fault of a stage or of one evaluation)."""
    reasons: list[str]
    """Why it is not valid, in words."""
    flags: list[str]
    """What a reader should know although it is valid."""
    checked: list[str]
    """The stages whose measurements were judged."""


def judge(training: dict[str, Any], core: dict[str, Any] | None = None, role: str = "normal",
          absorption: dict[str, Any] | None = None, further: dict[str, dict[str, Any]] | None = None,
          nulls: dict[str, dict[str, Any]] | None = None) -> Verdict:
    """Apply every rule that the measurements at hand allow. Missing or null measures count as not finite.

    Of ``further`` evaluations, by name, it is asked only that they are of the trained SAE and its model and layer.
    A null baseline (``role: null``) is exempt: what the rules find is said as flags. Of a valid run it is flagged
    which figures are not better than those of ``nulls`` (``evaluation.nulls``). An evaluation that failed makes any
    run ``failed``.
    """
    every = {"core": core, "absorption": absorption} | (further or {})
    broken = {name: why for name, report in every.items() if (why := faults.reason(report))}
    core, absorption = (None if name in broken else every[name] for name in ("core", "absorption"))
    further = {name: report for name, report in (further or {}).items() if name not in broken}
    reasons = _training_faults(training)
    if core is not None:
        reasons += _core_faults(training, core)
    if absorption is not None:
        reasons += [text for text in _absorption_faults(training, absorption) if text not in reasons]
    for report in further.values():
        reasons += [text for text in _other_than_trained(training, report["config"]) if text not in reasons]
    noted = {"absorption": absorption or {}} | further
    flags = _flags(training) + [f"{name}: {report['note']}" for name, report in noted.items() if report.get("note")]
    checked = ["training"] + ["core"] * (core is not None) + ["absorption"] * (absorption is not None)
    checked += [name for name, report in further.items() if "status" not in report]
    if broken:
        failures = [f"{name}: {why}" for name, why in broken.items()]
        return Verdict("failed", failures + reasons, flags, checked)
    if role == "null":
        return Verdict("null", [], [f"null baseline: {text}" for text in reasons] + flags, checked)
    if not reasons:
        flags += _not_better({"core": core or {}} | noted, nulls or {})
    return Verdict("invalid" if reasons else "valid", reasons, flags, checked)


def _training_faults(t: dict[str, Any]) -> list[str]:
    faults = []
    if t["steps"] == 0:
        faults.append("never trained: 0 steps")
    elif t["steps"] is not None and t["steps"] < t["planned_steps"]:
        faults.append(f"fewer steps than planned: {t['steps']} of {t['planned_steps']}")
    if t["nonfinite"]:
        faults.append(f"not finite: {t['nonfinite']}")
    if t["l0"] is not None and t["l0"] < EMPTY_L0:
        faults.append(f"mean L0 is {t['l0']:.2g}: (almost) no latent is active on held-out tokens")
    if t["steps"] and t["dead_share"] > DEAD_LIMIT:
        faults.append(f"dead: {t['dead_share']:.1%} of latents did not fire in the counted training samples "
                      f"({t['unused_share']:.1%} fire on no held-out token)")
    variance, untrained = t["explained_variance"], t["explained_variance_untrained"]
    if variance is None:
        faults += [] if t["nonfinite"] else ["not finite: explained variance"]
    elif variance <= 0:
        faults.append(f"explained variance {variance:.3f} is not above 0, what predicting the mean scores")
    elif untrained is not None and variance <= untrained:
        faults.append(f"explained variance {variance:.3f} is not above the same SAE untrained ({untrained:.3f})")
    ratio = t["norm_ratio"]
    if ratio is not None and not NORM_RATIO[0] <= ratio <= NORM_RATIO[1]:
        faults.append(f"reconstructions have {ratio:.2f} times the norm of what they reconstruct "
                      f"(allowed {NORM_RATIO[0]} to {NORM_RATIO[1]})")
    if t["fold_error"] is not None and t["fold_error"] > FOLD_LIMIT:
        faults.append(f"folding decoder norms into the code changes the reconstruction by {t['fold_error']:.1e} "
                      f"(allowed {FOLD_LIMIT:.0e}): decoder rows are not of unit norm")
    return faults + _bound_faults(t)


def _bound_faults(t: dict[str, Any]) -> list[str]:
    bounds = {name: found["bound"] for name, found in (t.get("measured") or {}).items() if "bound" in found}
    return [f"the compression bound does not hold: {name} declares a mask whose decoder rows are off norm 1 by "
            f"{bound['row_norm_error']:.1e}, whose reconstruction is off by {bound['mask_error']:.1e}, and whose "
            f"inequalities fail on {bound['decoded']['violations']} and {bound['summed']['violations']} of "
            f"{bound['tokens']} tokens" for name, bound in bounds.items() if bound["applicable"] and not bound["holds"]]


def _core_faults(t: dict[str, Any], core: dict[str, Any]) -> list[str]:
    faults, metrics, config = [], core["metrics"], core["config"]
    recovered = metrics.get("ce_loss_score")
    if recovered is None:
        faults.append("not finite: cross-entropy recovered")
    elif recovered <= 0:
        faults.append(f"cross-entropy recovered {recovered:.3f} is not above 0, what removing the activation scores")
    if metrics.get("l0") is not None and metrics["l0"] < EMPTY_L0 <= (t["l0"] or 0):
        faults.append(f"mean L0 is {metrics['l0']:.2g} in SAEBench core")
    unfit = [name for name, value in metrics.items() if value is None and name != "ce_loss_score"]
    if unfit and not faults:
        faults.append(f"not finite: SAEBench core's {', '.join(unfit)}")
    return faults + _other_than_trained(t, config)


def _absorption_faults(t: dict[str, Any], absorption: dict[str, Any]) -> list[str]:
    l0, faults = absorption["l0_words"], []
    if l0 is None or l0 < EMPTY_L0 <= (t["l0"] or 0):
        faults.append("not finite: L0 on words" if l0 is None else f"mean L0 on first-letter words is {l0:.2g}")
    return faults + _other_than_trained(t, absorption["config"])


def _other_than_trained(t: dict[str, Any], config: dict[str, Any]) -> list[str]:
    return [f"evaluated {what} '{config.get(key)}' is not the trained one '{t.get(key)}'"
            for key, what in (("model_identity", "model"), ("hook", "hook"), ("d_sae", "width"))
            if config.get(key) != t.get(key) and not (key == "model_identity" and config.get("declared_model"))]


def _not_better(reports: dict[str, dict[str, Any]], nulls: dict[str, dict[str, Any]]) -> list[str]:
    """Figures that, by their interval where there is one, are not better than a null's in the same evaluation."""
    found = []
    for evaluation, metrics in BESIDE_NULLS.items():
        report = reports.get(evaluation) or {}
        # The raw stream in place of itself loses nothing: it says nothing of a reconstruction.
        entries = [entry for null, of in nulls.items() if (entry := of.get(evaluation, {})).get("metrics")
                   and (null, evaluation) != ("residual", "core")
                   and entry["config"]["comparable"] == report.get("config", {}).get("comparable")]
        for name in metrics:
            value, metric = report.get("metrics", {}).get(name), METRICS[name]
            within = (report.get("within_this_sae") or {}).get(name)
            worst = value if within is None else within[0 if metric.direction > 0 else 1]
            better = [f"{entry['config']['what'].partition(' (')[0]} {other:.3f}" for entry in entries
                      if None not in (worst, other := entry["metrics"].get(name))
                      and metric.direction * (worst - other) <= 0]
            if better:
                said = f"{value:.3f}" + (f" [{within[0]:.3f}, {within[1]:.3f}]" if within else "")
                found.append(f"{metric.label.lower()} {said} not {'above' if metric.direction > 0 else 'below'} that "
                             f"of null baselines: {', '.join(better)}")
    return found


def _flags(t: dict[str, Any]) -> list[str]:
    flags = list(t.get("notes", []))
    if t["l0"] is not None and t["l0"] > t["d_in"] / 2:
        flags.append(f"not sparse: L0 {t['l0']:.0f} is above half the model's width ({t['d_in']})")
    for name, term in t["terms"].items():
        # AuxK is meant to be absent while nothing is dead; its absence is no fault.
        if name == "auxk":
            continue
        if term["inert_share"] > 0.5:
            flags.append(f"term '{name}' is inert: its gradient is under {INERT:g} of the reconstruction's "
                         f"(median {term['median_share']:.1e}) through {term['inert_share']:.0%} of training")
        # A sparsity penalty balances the reconstruction where training ends: its share is 1 there by its nature.
        if term["dominating_share"] > 0.5 and term.get("of") != "architecture":
            flags.append(f"term '{name}' dominates: its gradient exceeds the reconstruction's "
                         f"({term['median_share']:.2f} times, median) through {term['dominating_share']:.0%} of it")
    flags += [f"schedule unfinished: {name}" for name in t["unfinished_schedules"]]
    flags += [f"parameter without effect: {name}" for name in t["unused_parameters"]]
    return flags


def further(run: runs.Run) -> dict[str, dict[str, Any]]:
    """A run's reports of SAEBench's other evaluations, by name, as far as they are there; others' where they failed."""
    found = {name: run.json(f"evals/{name}.json") for name in (*FURTHER, "compression", "over_training")}
    return {name: report for name, report in found.items() if report and (name in FURTHER or faults.reason(report))}


def _of_another_sae(run: runs.Run) -> list[str]:
    """Reports whose hash of the SAE's weights is not that of the run's."""
    stamps = {name: (run.json(f"evals/{name}.json") or {}).get("sae_sha256") for name in faults.NAMES}
    weights = run.path / WEIGHTS
    own = runs.sha256(weights) if any(stamps.values()) and weights.exists() else None
    return [f"evals/{name}.json is of another SAE than the run's" for name, stamp in stamps.items()
            if stamp and stamp != own]


def null_baselines(run: runs.Run) -> dict[str, dict[str, Any]]:
    """What 03 and 04 wrote of null baselines into a run's evals/, by null and evaluation, as far as written."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("nulls", "absorption_nulls"):
        for null, entries in run.json(f"evals/{name}.json", {}).items():
            found[null] = found.get(null, {}) | entries
    return found


def update(run: runs.Run) -> Verdict:
    """Judge a run by all that its folder holds and write validity.json."""
    training = run.json("training.json")
    if training is None:
        raise runs.RunError(f"run '{run.name}': no training.json in {run.path}; run 02_train_variant first")
    role = run.params.get("role", "normal")
    measured = run.json("evals/core.json"), run.json("evals/absorption.json")
    try:
        verdict = judge(training, measured[0], role, measured[1], further(run), null_baselines(run))
        mixed = _of_another_sae(run)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise runs.RunError(f"{run.path}: training.json, evals/core.json, evals/absorption.json or that of another "
                            f"evaluation or of nulls is damaged ({error!r}); run their notebooks again") from None
    if mixed:
        verdict = verdict._replace(status="failed", reasons=mixed + verdict.reasons)
    runs.write_json(run.path / "validity.json", {**verdict._asdict(), "role": role, "provenance": runs.provenance()})
    return verdict


def sentence(verdict: Verdict) -> str:
    """The verdict as a reader sees it at the top of 02's and 03's page."""
    text = f"**{verdict.status}**"
    if verdict.status == "null":
        text += " – a baseline, exempt from the gate and shown apart"
    if verdict.reasons:
        text += " – " + "; ".join(verdict.reasons)
    if verdict.flags:
        text += "\n\nFlags: " + "; ".join(verdict.flags)
    return text
