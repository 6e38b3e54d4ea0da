"""04's work: first-letter absorption of one SAE, per letter and word, into the run's evals/ folder.

Two figures that never mix: *full* absorption (no split latent fires, one other latent carries the letter) and the
absorption *fraction* (the share of the letter that up to three others carry). A run that is not valid has neither.
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.evaluation import compression, faults, foreign_run, importance, validity
from sae_lib.evaluation.evaluate import hook_of, trained
from sae_lib.params import digest
from sae_lib.sae.kept import keep

FIGURES = ("full_absorption", "fully_absorbed", "absorption_fraction", "splits")
"""Columns of the letters' table that are results, and missing where there is none."""
BOOTSTRAP = {"mean_full_absorption_score": "full_absorption", "mean_absorption_fraction_score": "absorption_fraction"}
DRAWS, LEVEL = 1000, 0.95
PROBES = "absorption_probes.safetensors"
"""Direction (D,) of each seed's and letter's probe, by ``seed<seed>.<letter>``."""


class Letters(NamedTuple):
    """What 04's page shows."""

    run: runs.Run
    report: dict[str, Any]
    """The content of evals/absorption.json; empty for an SAE that cannot be evaluated."""
    letters: pd.DataFrame
    """The content of evals/absorption_letters.parquet: one row per seed and letter."""
    words: pd.DataFrame
    """The content of evals/absorption_words.parquet: one row per seed and test word."""
    verdict: validity.Verdict
    by_ratio: dict[str, Any] = {}
    """The content of evals/compression_absorption.json; empty where no ``absorption_ratios`` were asked for."""


def evaluate(p: params.Letters) -> Letters:
    """Measure the run's SAE with every seed; write evals/absorption.json, two parquet files and validity.json.

    With ``p.sae`` the SAE of that folder, made elsewhere, becomes the run first. An SAE whose weights are not finite
    is not evaluated. Raises what the evaluation fails on, when evals/absorption.json and validity.json say it.
    """
    run = foreign_run.bring_in(p) if p.sae else runs.Run(p.run)
    with run.stage("04_letter_absorption"):
        asked = trained(run)
        verdict, folder = validity.update(run), run.path / "evals"
        report, letters, words, by_ratio = {}, pd.DataFrame(), pd.DataFrame(), {}
        (folder / "letters_done.json").unlink(missing_ok=True)
        fault = None
        if run.json("training.json")["nonfinite"]:
            print(f"not evaluated: {'; '.join(verdict.reasons)}")
            _clear(folder)
        else:
            try:
                report, letters, words, by_ratio = _measure(p, run, asked)
            except Exception as error:
                fault = error
        if fault:
            _clear(folder)
            runs.write_json(folder / "absorption.json", faults.failed("absorption", fault, {
                "preset": p.absorption_preset, "model": p.model or asked.model, "hook": hook_of(p.layer, asked)}))
        elif report:
            # What else failed is no reason to set these figures apart in their files; the run's verdict will say it.
            others = {"core": run.json("evals/core.json")} | validity.further(run)
            sound = {name: one for name, one in others.items() if not faults.reason(one)}
            verdict = validity.judge(run.json("training.json"), sound.pop("core", None), asked.role, report, sound)
            report, letters, words = marked(report, letters, words, verdict)
            for name, frame in (("letters", letters), ("words", words)):
                with runs.whole(folder / f"absorption_{name}.parquet") as temporary:
                    frame.to_parquet(temporary, index=False)
            runs.write_json(folder / "absorption.json", report)
            if by_ratio:
                by_ratio = compression.marked(by_ratio, verdict)
                runs.write_json(folder / "compression_absorption.json", by_ratio)
        verdict = validity.update(run)
        if not fault:
            runs.write_json(folder / "letters_done.json", {"evals": ["absorption"] * bool(report),
                                                           "status": verdict.status})
    if fault:  # outside the stage, which would write its own words over the verdict's
        raise fault
    return Letters(run, report, letters, words, verdict, by_ratio)


def _clear(folder: Path) -> None:
    """Remove what an earlier evaluation left: it is not what was asked for now."""
    for name in ("absorption.json", "absorption_letters.parquet", "absorption_words.parquet", PROBES,
                 "compression_absorption.json"):
        (folder / name).unlink(missing_ok=True)


def _measure(p: params.Letters, run: runs.Run, asked: params.Train):
    """The report before the gate, the two tables over all seeds, and absorption by share of latents kept."""
    from sae_lib.data import language_model
    from sae_lib.evaluation.saebench import adapter, letter_words
    from sae_lib.evaluation.saebench.absorption import absorption, sparse_batch
    from sae_lib.training.ingredients import load_sae

    start = time.perf_counter()
    model = p.model or asked.model
    site = hook_of(p.layer, asked)
    language_model.check_layer(model, site)
    info, device = language_model.describe(model), language_model.pick_device(p.device)
    sae = load_sae(run.path / "sae").to(device)
    adapter.check_sae(sae, model, info.d_model)
    tokenizer, bos_id = language_model.load_tokenizer(model)
    dtype = _precision(asked)
    load = functools.cache(lambda: language_model.load(model, hook=site, dtype=dtype, device=p.device))
    paper = p.absorption_preset == "paper"
    held_out = not paper or asked.spelling_share > 0
    found, materials, setup = {}, {}, 0.0

    def ask(one, seed):
        return absorption(one, materials[seed], tokenizer, bos_id, load, model=model, hook=site, seed=seed,
                          vocabulary=words.vocabulary, preset=p.absorption_preset, device=str(device))

    with adapter.settings(p.threads):
        words = letter_words.choose(tokenizer, None if paper else p.absorption_words_per_letter, held_out)
        for seed in p.absorption_seeds:
            began = time.perf_counter()
            materials[seed] = letter_words.prepare(
                words, tokenizer, bos_id, load, identity=[info.identity, site, dtype, device.type],
                d_model=info.d_model, seed=seed, mode=p.mode)
            setup += time.perf_counter() - began
            found[seed] = ask(sae, seed)
            print(f"seed {seed}: absorption measured, {time.perf_counter() - began:.0f} s", flush=True)
        masked = _by_ratio(p, sae, asked, found, ask)
    config = {"preset": p.absorption_preset, "model": model, "model_identity": info.identity, "hook": site,
              "d_in": sae.d_in, "d_sae": sae.d_sae, "seeds": p.absorption_seeds, "words": len(words.tokens),
              "words_per_letter": None if paper else p.absorption_words_per_letter,
              "words_outside_training_prompts": held_out, "words_sha256": digest(words.tokens, 16),
              "sparse_probe_batch": sparse_batch(materials[p.absorption_seeds[0]].train, words.vocabulary,
                                                 p.absorption_preset),
              "dtype": materials[p.absorption_seeds[0]].dtype, "device": device.type}
    with runs.whole(run.path / "evals" / PROBES) as temporary:
        save_file({f"seed{seed}.{letter}": row.float().contiguous() for seed, one in materials.items()
                   for letter, row in zip(one.letters, one.weight)}, temporary)
    report = _report(found, config) | {
        "l0_words": _l0(sae, materials.values()), "seconds": round(time.perf_counter() - start, 2),
        "sae_sha256": runs.sha256(run.path / validity.WEIGHTS), "seconds_setup": round(setup, 2),
        "words_reused": all(m.reused for m in materials.values())}
    letters, tested = _tables(found)
    if report["metrics"]:
        report["within_this_sae"] = _within(tested, letters)
    by_ratio = [{"ratio": ratio, "kept": kept} | _row(_report(one, config), *_tables(one))
                for ratio, kept, one in masked]
    curve = {"eval": "absorption by share of latents kept", "by_ratio": by_ratio, "config": report["config"],
             "provenance": report["provenance"]}
    return report, letters, tested, curve if by_ratio else {}


def _by_ratio(p: params.Letters, sae, asked: params.Train, found: dict[int, Any], ask):
    """Each of ``p.absorption_ratios``, how many latents it keeps, and what ``ask`` finds by seed; of all, ``found``.

    The latents kept are 03's: those of the largest mean over training tokens.
    """
    if not p.absorption_ratios:
        return []
    scores, rows = importance.of_run(sae, asked)[0].overall, []
    for ratio in p.absorption_ratios:
        kept, began = importance.most(scores, ratio), time.perf_counter()
        part = keep(sae, kept.to(sae.W_dec.device))
        rows.append((ratio, int(kept.sum()), found if kept.all() else {seed: ask(part, seed) for seed in found}))
        print(f"{ratio:.0%} of the latents: absorption measured, {time.perf_counter() - began:.0f} s", flush=True)
    return rows


def _row(report: dict[str, Any], letters: pd.DataFrame, words: pd.DataFrame) -> dict[str, Any]:
    """Of one share: means over letters with their intervals, how many letters, and why there is none."""
    return {"metrics": report["metrics"], "interval": _within(words, letters) if report["metrics"] else {},
            "letters": {seed: one["letters"] for seed, one in report["seeds"].items()}, "note": report["note"]}


def _tables(found: dict[int, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Letters and words of all seeds."""
    return tuple(pd.concat([getattr(one, name).assign(seed=seed) for seed, one in found.items()], ignore_index=True)
                 for name in ("letters", "words"))


def _within(words: pd.DataFrame, letters: pd.DataFrame) -> dict[str, Any]:
    return {"level": LEVEL, "by": "bootstrap over words within letters; letters are fixed",
            **{name: within(words, letters, column) for name, column in BOOTSTRAP.items()}}


def _precision(asked: params.Train) -> str:
    """The language model's precision: where it was ``auto``, the store's, not one timed anew."""
    if asked.dtype == "auto":
        with contextlib.suppress(params.ParameterError, runs.RunError):
            held = activations.find(asked).manifest["dtype"]
            return held if held in ("float32", "bfloat16") else "auto"
    return asked.dtype


def _l0(sae, materials) -> float | None:
    """Mean number of active latents at the evaluated words; None without words."""
    with torch.no_grad():
        counts = [(sae.encode(part.to(sae.W_dec.device)) > 0).sum(1).float().cpu()
                  for material in materials for part in material.x.split(4096)]
    total = torch.cat(counts)
    return float(total.mean()) if len(total) else None


def _report(found: dict[int, Any], config: dict[str, Any]) -> dict[str, Any]:
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
        frame["full_absorption"] = frame.full_absorption.astype("boolean" if columns is not FIGURES else "Float64")
        for column in columns:
            frame[column] = frame[column].mask(frame.not_a_result != "")
        out.append(frame)
    return report, *out


def within(words: pd.DataFrame, letters: pd.DataFrame, column: str) -> list[float]:
    """Bootstrap interval of the mean over kept letters of a column of ``words``: words are drawn within letters.

    It says how far the figure of *this* SAE rests on the words; nothing about a variant.
    """
    draw, by_seed = np.random.default_rng(0), {}
    kept = letters.loc[letters.kept, ["seed", "letter"]]
    for (seed, _), group in words.merge(kept, on=["seed", "letter"]).groupby(["seed", "letter"]):
        values = group[column].to_numpy(dtype=float)
        by_seed.setdefault(seed, []).append(values[draw.integers(len(values), size=(DRAWS, len(values)))].mean(1))
    means = np.mean([np.mean(rates, axis=0) for rates in by_seed.values()], axis=0)
    return [float(edge) for edge in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
