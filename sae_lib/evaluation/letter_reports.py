"""What 04 says of one SAE: figures of every evaluation seed and their means, tables of letters and words, intervals.

Pure functions over what ``saebench.absorption`` gives by seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sae_lib import intervals, runs
from sae_lib.evaluation import validity
from sae_lib.params import digest

FIGURES = ("full_absorption", "fully_absorbed", "absorption_fraction", "splits")
"""Columns of the letters' table that are results; a letter without a result has gaps there."""
BOOTSTRAP = {"mean_full_absorption_score": "full_absorption", "mean_absorption_fraction_score": "absorption_fraction"}


def report_of(found: dict[int, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Figures of every seed and their means; a note where a seed gives none."""
    seeds, notes = {}, {}
    for seed, one in found.items():
        first = [scores[0] for scores in one.letters.f1_by_k.dropna()]
        note = one.note
        if not note and not any(first):
            note = "no latent predicts any letter (F1 0 for all), so that an absorption of 0 is no score"
        notes |= {seed: note} if note else {}
        seeds[seed] = {"metrics": {} if note else one.metrics, "letters": int(one.letters.kept.sum()), "note": note,
                       "dropped": dict(one.letters.loc[~one.letters.kept, ["letter", "reason"]].to_numpy())}
    usable = [one["metrics"] for one in seeds.values() if one["metrics"]]
    means = {name: float(np.mean([values[name] for values in usable])) for name in (usable[0] if usable else ())}
    provenance = runs.provenance()
    comparable = digest([provenance["packages"]["sae-bench"], {k: v for k, v in config.items() if k != "d_sae"}])
    return {"eval": "absorption", "metrics": means, "seeds": seeds,
            "note": "; ".join(f"seed {seed}: {note}" for seed, note in notes.items()) or None,
            "config": config | {"comparable": comparable}, "raw": {seed: one.raw for seed, one in found.items()},
            "provenance": provenance}


def tables(found: dict[int, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Letters and words of all seeds."""
    return tuple(pd.concat([getattr(one, name).assign(seed=seed) for seed, one in found.items()], ignore_index=True)
                 for name in ("letters", "words"))


def row(report: dict[str, Any], letters: pd.DataFrame, words: pd.DataFrame) -> dict[str, Any]:
    """Of one SAE: means over letters with their intervals, how many letters, and, if none, why."""
    return {"metrics": report["metrics"], "interval": within_all(words, letters) if report["metrics"] else {},
            "letters": {seed: one["letters"] for seed, one in report["seeds"].items()}, "note": report["note"]}


def marked(report: dict[str, Any], letters: pd.DataFrame, words: pd.DataFrame, verdict: validity.Verdict):
    """Report and tables with their run's status; figures that are no result stay in the report's ``raw`` only.

    That is all of an invalid run's, and those of a seed that has a note instead.
    """
    why = "; ".join(verdict.reasons) if verdict.status == "invalid" else ""
    no_result = {seed: why or one["note"] for seed, one in report["seeds"].items() if why or one["note"]}
    report = report | {"status": verdict.status, "not_a_result": why or None}
    if why:
        report |= {"metrics": {}, "seeds": {seed: one | {"metrics": {}} for seed, one in report["seeds"].items()}}
        report.pop("within_this_sae", None)
    report["raw"] = {seed: None if raw is None else {"not_a_result": no_result.get(seed)} | raw
                     for seed, raw in report["raw"].items()}
    out = []
    for frame, columns in ((letters, FIGURES), (words, ("full_absorption", "absorbing_latent",
                                                        "absorption_fraction"))):
        frame = frame.assign(status=verdict.status, not_a_result=frame.seed.map(no_result).fillna(""))
        frame["full_absorption"] = frame.full_absorption.astype("boolean" if columns is not FIGURES else float)
        for column in columns:
            frame[column] = frame[column].mask(frame.not_a_result != "")
        out.append(frame)
    return report, *out


def within_all(words: pd.DataFrame, letters: pd.DataFrame) -> dict[str, Any]:
    """Of the two kinds of absorption, the interval that ``within`` draws."""
    return {"level": intervals.LEVEL, "by": "bootstrap over words within letters; letters are fixed",
            **{name: within(words, letters, column) for name, column in BOOTSTRAP.items()}}


def within(words: pd.DataFrame, letters: pd.DataFrame, column: str) -> list[float]:
    """Bootstrap interval of the mean over kept letters of a column of ``words``: words are drawn within letters.

    It says how far the figure of *this* SAE rests on the words; nothing about a variant.
    """
    kept = letters.loc[letters.kept, ["seed", "letter"]]
    counted = words.merge(kept, on=["seed", "letter"]).reset_index(drop=True)
    groups = counted.groupby(["seed", "letter"])
    # A mean over seeds of means over letters of means over words is one weighted sum of words.
    words_in, letters_in = groups.letter.transform("size"), counted.groupby("seed").letter.transform("nunique")
    share = counted[column].to_numpy(dtype=float) / (words_in * letters_in * counted.seed.nunique()).to_numpy()
    drawn = intervals.spread(len(counted), lambda weights: {column: weights @ share},
                             strata=list(groups.indices.values()))
    return intervals.interval(drawn[column])
