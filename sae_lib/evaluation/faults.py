"""An evaluation that fails: its reason stands in its own JSON, so that no older figure is read in its place.

A failed evaluation costs no other: those after it still run. The run's verdict is then ``failed``, its other figures
stand apart, and its stage ends with an error when all is written.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from sae_lib import runs
from sae_lib.data.assets import AssetError
from sae_lib.params import ParameterError

NAMES = ("core", "sparse_probing", "sae_probes", "scr", "tpp", "unlearning", "truth", "compression", "over_training",
         "absorption")
"""Evaluations that leave evals/<name>.json."""


def failed(name: str, error: Exception, config: dict[str, Any]) -> dict[str, Any]:
    """The report of an evaluation that ended with ``error``; ``config`` says what was asked for."""
    said = str(error) if isinstance(error, (runs.RunError, ParameterError, AssetError)) else (
        f"{type(error).__name__}: {error}")
    return {"eval": name, "status": "failed", "reason": said, "metrics": {}, "config": config,
            "traceback": "".join(traceback.format_exception(error, limit=-3)), "provenance": runs.provenance()}


def attempt(run: runs.Run, name: str, measure: Callable[[], dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Write and return what ``measure()`` reports as evals/<name>.json, or the report of its failure."""
    try:
        report = measure()
    except Exception as error:
        report = failed(name, error, config)
        print(f"{name} failed: {report['reason']}", flush=True)
    runs.write_json(run.path / f"evals/{name}.json", report)
    return report


def reason(report: dict[str, Any] | None) -> str | None:
    """Why an evaluation failed; None where it did not. (Absorption's report also carries its run's ``status``.)"""
    return report.get("reason") if report and report.get("status") == "failed" else None


def no_figure(report: dict[str, Any]) -> str | None:
    """Why a report has no figure, as ``failed: ...`` or ``not applicable: ...``; None where it has some.

    Of a run that is not valid the reason is the verdict's.
    """
    if "reason" in report:
        return f"{report['status']}: {report['reason']}"
    figures = report.get("metrics") or report.get("not_a_result")
    return f"failed: {report['note']}" if report.get("note") and not figures else None


def forget(run: runs.Run, asked: list[str]) -> None:
    """Remove the reports of failed evaluations of 03 that are not asked for any more."""
    for name in set(NAMES) - {*asked, "absorption"}:
        if reason(run.json(f"evals/{name}.json")):
            (run.path / f"evals/{name}.json").unlink()


def insist(results: dict[str, dict[str, Any]]) -> None:
    """Raise RunError naming every evaluation of ``results`` that failed, with its reason: the end of a stage."""
    found = [f"{name}: {why}" for name, report in results.items() if (why := reason(report))]
    if found:
        asked = len({*results} - {"nulls"})
        raise runs.RunError(f"{len(found)} of {asked} evaluations failed; {'; '.join(found)}")
