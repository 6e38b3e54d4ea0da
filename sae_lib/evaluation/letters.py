"""04's work: first-letter absorption of one SAE, per letter and word, into the run's evals/ folder.

Two figures that never mix: *full* absorption (no split latent fires, one other latent carries the letter) and the
absorption *fraction* (the share of the letter that up to three others carry). A run that is not valid has neither.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save_file

from sae_lib import params, runs
from sae_lib.data.language_model import PLANTED
from sae_lib.evaluation import (
    compression,
    faults,
    foreign_run,
    importance,
    letter_reports,
    nulls,
    over_training,
    validity,
)
from sae_lib.evaluation.evaluate import hook_of, trained
from sae_lib.params import digest
from sae_lib.sae.kept import keep

PROBES = "absorption_probes.safetensors"
"""Direction (D,) of each seed's and letter's probe, by ``seed<seed>.<letter>``."""
FILES = ("absorption.json", "absorption_letters.parquet", "absorption_words.parquet", PROBES,
         "compression_absorption.json", "absorption_nulls.json", "absorption_over_training.json")
"""All that an evaluation leaves in evals/."""


class Letters(NamedTuple):
    """What 04's page shows."""

    run: runs.Run
    report: dict[str, Any] = {}
    """The content of evals/absorption.json; empty for an SAE that cannot be evaluated."""
    letters: pd.DataFrame = pd.DataFrame()
    """The content of evals/absorption_letters.parquet: one row per seed and letter."""
    words: pd.DataFrame = pd.DataFrame()
    """The content of evals/absorption_words.parquet: one row per seed and test word."""
    verdict: validity.Verdict | None = None
    by_ratio: dict[str, Any] = {}
    """The content of evals/compression_absorption.json; empty where no ``absorption_ratios`` were asked for."""
    nulls: nulls.Found = {}
    """The content of evals/absorption_nulls.json."""
    along: dict[str, Any] = {}
    """The content of evals/absorption_over_training.json; empty where training kept no SAEs on the way."""


def evaluate(p: params.Letters) -> Letters:
    """Measure the run's SAE with every seed; write evals/absorption.json, two parquet files and validity.json.

    With ``p.sae`` the SAE of that folder, made elsewhere, becomes the run first. An SAE whose weights are not finite
    is not evaluated, nor one of a planted world, whose absorption is 03's. Raises what the evaluation fails on, when
    evals/absorption.json and validity.json say it.
    """
    run = foreign_run.bring_in(p) if p.sae else runs.Run(p.run)
    with run.stage("04_letter_absorption"):
        asked = trained(run)
        verdict, folder = validity.update(run), run.path / "evals"
        (folder / "letters_done.json").unlink(missing_ok=True)
        found, fault = Letters(run), None
        why = "a planted world has no letters" if asked.model == PLANTED else "; ".join(verdict.reasons)
        if asked.model == PLANTED or run.json("training.json")["nonfinite"]:
            print(f"not evaluated: {why}")
            _clear(folder)
        else:
            try:
                found = _written(folder, _measure(p, run, asked), asked)
            except Exception as error:
                fault = error
                _clear(folder)
                runs.write_json(folder / "absorption.json", faults.failed("absorption", fault, {
                    "preset": p.absorption_preset, "model": p.model or asked.model, "hook": hook_of(p.layer, asked)}))
        found = found._replace(verdict=validity.update(run))
        if not fault:
            runs.write_json(folder / "letters_done.json", {"evals": ["absorption"] * bool(found.report),
                                                           "status": found.verdict.status})
    if fault:  # outside the stage, which would write its own words over the verdict's
        raise fault
    return found


def _written(folder: Path, found: Letters, asked: params.Train) -> Letters:
    """What was measured, marked by the gate and written."""
    run = found.run
    # What else failed is no reason to set these figures apart in their files; the run's verdict will say it.
    others = {"core": run.json("evals/core.json")} | validity.further(run)
    sound = {name: one for name, one in others.items() if not faults.reason(one)}
    verdict = validity.judge(run.json("training.json"), sound.pop("core", None), asked.role, found.report, sound)
    report, letters, words = letter_reports.marked(found.report, found.letters, found.words, verdict)
    for name, frame in (("letters", letters), ("words", words)):
        with runs.whole(folder / f"absorption_{name}.parquet") as temporary:
            frame.to_parquet(temporary, index=False)
    runs.write_json(folder / "absorption.json", report)
    curves = {}
    for name, file in (("by_ratio", "compression_absorption"), ("along", "absorption_over_training")):
        if curve := getattr(found, name):
            curves[name] = compression.marked(curve, verdict)
            runs.write_json(folder / f"{file}.json", curves[name])
    return found._replace(report=report, letters=letters, words=words, **curves)


def _clear(folder: Path) -> None:
    """Remove what an earlier evaluation left: it is not what was asked for now."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _measure(p: params.Letters, run: runs.Run, asked: params.Train) -> Letters:
    """All that 04 measures, before the gate."""
    from sae_lib.evaluation.saebench import adapter, word_material
    from sae_lib.evaluation.saebench.absorption import absorption, sparse_batch
    from sae_lib.training.ingredients import load_sae

    start = time.perf_counter()
    sae = load_sae(run.path / "sae")
    found, materials, setup = {}, {}, 0.0

    def ask(one, seed):
        return absorption(one, materials[seed], side.tokenizer, side.bos_id, side.load, model=model, hook=site,
                          seed=seed, vocabulary=words.vocabulary, preset=p.absorption_preset, device=str(device))

    with adapter.settings(p.threads):
        side = word_material.WordReading(p, asked)
        model, site, info, device, words = side.model, side.hook, side.info, side.device, side.words
        sae = sae.to(device)
        adapter.check_sae(sae, model, info.d_model)
        for seed in p.absorption_seeds:
            began = time.perf_counter()
            materials[seed] = side.material(seed)
            setup += time.perf_counter() - began
            found[seed] = ask(sae, seed)
            print(f"seed {seed}: absorption measured, {time.perf_counter() - began:.0f} s", flush=True)
        masked = _by_ratio(p, sae, asked, found, ask)
        kept = _over_training(p, run, sae, found, materials, ask)
    config = {"preset": p.absorption_preset, "model": model, "model_identity": info.identity, "hook": site,
              "d_in": sae.d_in, "d_sae": sae.d_sae, "seeds": p.absorption_seeds, "words": len(words.tokens),
              "words_per_letter": side.words_per_letter,
              "examples": "of each word" if p.absorption_preset == "paper" else "shared by one word of each letter",
              "words_outside_training_prompts": side.held_out, "words_sha256": digest(words.tokens, 16),
              "sparse_probe_batch": sparse_batch(materials[p.absorption_seeds[0]].train, words.vocabulary,
                                                 p.absorption_preset),
              "dtype": materials[p.absorption_seeds[0]].dtype, "device": device.type}
    _keep_probes(run.path / "evals" / PROBES, materials)
    report = letter_reports.report_of(found, config) | {
        "l0_words": _l0(sae, materials.values()), "seconds": round(time.perf_counter() - start, 2),
        "sae_sha256": runs.sha256(run.path / validity.WEIGHTS), "seconds_setup": round(setup, 2),
        "words_reused": all(m.reused for m in materials.values())}
    letters, tested = letter_reports.tables(found)
    if report["metrics"]:
        report["within_this_sae"] = letter_reports.within_all(tested, letters)
    curve = {"eval": "absorption by share of latents kept", "config": report["config"],
             "provenance": report["provenance"],
             "by_ratio": [{"ratio": ratio, "kept": count} | _row_of(one, config) for ratio, count, one in masked]}
    along = over_training.absorption(run, asked, _rows(kept, config), report["config"])
    with adapter.settings(p.threads):
        beside = nulls.of_letters(p, run, asked, sae, report, lambda _, null: _of_null(null, found, config, ask))
    return Letters(run, report, letters, tested, by_ratio=curve if masked else {}, nulls=beside, along=along)


def _keep_probes(file: Path, materials: dict[int, Any]) -> None:
    """Each seed's and letter's probe, for the dashboards."""
    with runs.whole(file) as temporary:
        save_file({f"seed{seed}.{letter}": row.float().contiguous() for seed, one in materials.items()
                   for letter, row in zip(one.letters, one.weight)}, temporary)


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


def _of_null(null, found: dict[int, Any], config: dict[str, Any], ask) -> dict[str, Any]:
    """The report of a null baseline, with the seeds of ``found``."""
    one = {seed: ask(null, seed) for seed in found}
    letters, words = letter_reports.tables(one)
    report = letter_reports.report_of(one, config | {"d_sae": null.d_sae})
    return report | ({"within_this_sae": letter_reports.within_all(words, letters)} if report["metrics"] else {})
def _over_training(p: params.Letters, run: runs.Run, sae, found: dict[int, Any], materials: dict[int, Any], ask):
    """Each SAE that training kept, what ``ask`` finds by seed, and its L0 on words; of the finished one, ``found``."""
    def measure(one):
        one = one.to(sae.W_dec.device)
        return {seed: ask(one, seed) for seed in found}, _l0(one, materials.values())
    finished = found, _l0(sae, materials.values())
    return over_training.each(run, finished, measure) if p.absorption_over_training else []


def _row_of(found: dict[int, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The row of a curve for what was found by seed."""
    return letter_reports.row(letter_reports.report_of(found, config), *letter_reports.tables(found))


def _rows(kept: list[tuple[dict[str, Any], Any]], config: dict[str, Any]):
    """Each of ``kept`` with its row, its L0 on words among it; None for one that was not measured."""
    return [(one, part and _row_of(part[0], config) | {"l0_words": part[1]})
            for one, part in kept]


def _l0(sae, materials) -> float | None:
    """Mean number of active latents at the evaluated words; None without words."""
    with torch.no_grad():
        counts = [(sae.encode(part.to(sae.W_dec.device)) > 0).sum(1).float().cpu()
                  for material in materials for part in material.x.split(4096)]
    total = torch.cat(counts)
    return float(total.mean()) if len(total) else None
