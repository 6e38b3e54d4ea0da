"""SAEBench's first-letter absorption of one of our SAEs: its own entry point, on our model, words, folders and seed.

Put right for the length of one evaluation: the model that it loads by name, the words and probes that it keeps in
its installed package, the seed that it declares and never uses, the letters that it drops without a word, and the
two figures that it gives for the number of split latents (its JSON counts all, its tables those beyond the first).
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import torch

from sae_lib import runs
from sae_lib.evaluation.saebench import checking
from sae_lib.evaluation.saebench.adapter import import_sae_bench, in_place, quiet, seeded, wrap
from sae_lib.evaluation.saebench.letter_words import (
    FEWEST_LETTERS,
    POSITION,
    TEMPLATE,
    Material,
    WordModel,
    examples_of,
)
from sae_lib.params import ParameterError
from sae_lib.runs import RunError

LATENT_BYTES = 2**31
"""Latents of all training words are held at once up to this size: the same figures, much sooner."""
PROBE_F1 = 0.6
"""A letter is dropped where the model's own probe does not reach it."""


class Preset(NamedTuple):
    """How much is probed; all else is SAEBench's own setting."""

    max_k: int
    """Most latents of a letter's sparse probe."""
    epochs: int
    """Of the sparse probes' training."""


PRESETS = {"smoke": Preset(3, 20), "default": Preset(10, 50), "paper": Preset(10, 50)}
MEANS = ["mean_full_absorption_score", "mean_absorption_fraction_score", "mean_num_split_features"]
SPARSE_BATCH, FEWEST_BATCHES = 4096, 10
"""SAEBench's batch of words for the sparse probes, and the fewest batches of an epoch."""


def sparse_batch(train: int, vocabulary: int, preset: str) -> int:
    """Batch size of the sparse probes: an epoch of ``train`` words has as many batches as one of a whole vocabulary.

    A departure from SAEBench's 4096, which cuts a capped set of words in two. The figure depends on it. Measured on
    the embedded default (4,864 words, one SAE, one seed), full absorption and mean F1 of the first latent: 4096 .328,
    .21; the same with five times the epochs .223, .38; 486 .175, .46; 486 with a fifth of the epochs .206, .34. That
    the whole vocabulary at 4096 gives what this does was not tried. ``paper`` keeps 4096.
    """
    batches = max(FEWEST_BATCHES, -(-4 * vocabulary // (5 * SPARSE_BATCH)))
    return SPARSE_BATCH if preset == "paper" else max(1, min(SPARSE_BATCH, train // batches))


class Absorption(NamedTuple):
    """What SAEBench says of one SAE, for one seed."""

    metrics: dict[str, float] | None
    """Means over letters, by SAEBench's names; None where it gives none."""
    note: str | None
    """Why there is no figure."""
    letters: pd.DataFrame
    """One row per letter of the alphabet."""
    words: pd.DataFrame
    """One row per test word that the probe knows: whether it was absorbed, and by which latent."""
    raw: dict[str, Any] | None
    """SAEBench's own JSON."""


def absorption(sae, material: Material, tokenizer, bos_id: int, load, *, model: str, hook: str, seed: int,
               vocabulary: int, preset: str = "default", device: str = "cpu") -> Absorption:
    """Run SAEBench's absorption on ``sae`` (a SparseAutoencoder for raw activations) with one seed's material.

    ``load()`` gives the language model, should a prompt be missing in the material; ``vocabulary`` counts all words of
    its tokenizer. Raises ParameterError for an SAE
    with fewer latents than are ranked, RunError with SAEBench's own words when it gives no result.
    """
    asked = PRESETS[preset]
    if sae.d_sae < 10:
        raise ParameterError(f"d_sae: {sae.d_sae} latents; absorption ranks ten of them")
    if len(material.letters) < FEWEST_LETTERS:
        note = f"{len(material.letters)} letters have enough words; SAEBench wants {FEWEST_LETTERS}"
        return Absorption(None, note, _letters({}, pd.DataFrame(), None, material), _words(pd.DataFrame()), None)
    import_sae_bench()
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

    config = AbsorptionEvalConfig(
        model_name=model, random_seed=seed, max_k_value=asked.max_k, prompt_template=TEMPLATE,
        prompt_token_pos=POSITION, llm_batch_size=64, llm_dtype="float32", min_GT_probe_f1=PROBE_F1,
        min_feats_for_eval=FEWEST_LETTERS, k_sparse_probe_num_epochs=asked.epochs,
        k_sparse_probe_batch_size=sparse_batch(material.train, vocabulary, preset),
        precalc_k_sparse_probe_sae_acts=4 * sae.d_sae * material.train < LATENT_BYTES)
    known = WordModel(tokenizer, bos_id, load, dict(material.prompts), model, device)
    wrapped = wrap(sae, model, hook, device=torch.device(device), dtype=torch.float32, context=128)
    with examples_of(preset, seed):
        probed, absorbed, raw, said = _run(wrapped, known, material, config, seed, device)
    if raw is None and "insufficent" not in said:
        lines = [line for line in said.splitlines() if line.strip()]
        raise RunError("SAEBench absorption gave no result; it said: " + (" | ".join(lines[-5:]) or "nothing"))
    details = {} if raw is None else {row["first_letter"]: row for row in raw["eval_result_details"]}
    letters = _letters(details, probed, absorbed, material)
    _complete(letters, probed, absorbed, material)
    kept = int((probed.f1_probe > PROBE_F1).sum())
    note = None if raw else f"{kept} letters have a probe of F1 above {PROBE_F1}; SAEBench wants {FEWEST_LETTERS}"
    metrics = None
    if raw is not None:
        checking.configuration("absorption", raw, checking.asked(config))
        metrics = checking.figures("absorption", {name: value for name, value in
                                                  raw["eval_result_metrics"]["mean"].items() if "mean_" in name}, MEANS)
    return Absorption(metrics, note, letters, _words(absorbed), raw)


def _complete(letters: pd.DataFrame, probed: pd.DataFrame, absorbed: pd.DataFrame | None, material: Material) -> None:
    """Raise RunError for letters that should have a result and have none, or a result that is no number.

    SAEBench leaves a letter out where its probe is too weak or knows none of the test words; never else.
    """
    unprobed = sorted(set(material.letters) - set(probed.letter))
    lost, x, numbers = [], material.x[material.train:], material.labels[material.train:]
    if absorbed is not None:
        own = (x @ material.weight.T + material.bias)[range(len(x)), numbers] > 0
        positive = {material.letters[number] for number, found in zip(numbers, own) if found}
        good = set(probed.letter[probed.f1_probe > PROBE_F1])
        lost = sorted((positive & good) - set(letters.letter[letters.kept]))
        unfit = [row.letter for row in letters[letters.kept].itertuples()
                 if pd.isna([row.full_absorption, row.absorption_fraction, row.splits]).any()]
        lost += unfit
    if unprobed or lost:
        raise RunError(f"SAEBench absorption gave no result for the letters {', '.join(unprobed + lost)}, which have "
                       "words enough")


def _run(wrapped, model: WordModel, material: Material, config, seed: int, device: str):
    """SAEBench's own ``run_eval``: its table of probes, its table of words (or None), its JSON (or None), its words."""
    from sae_bench.evals.absorption import (
        feature_absorption,
        feature_absorption_calculator,
        k_sparse_probing,
        main,
        probing,
        util,
    )

    with seeded(seed):  # its weights begin at random
        probe = probing.LinearProbe(*reversed(material.weight.shape))
    probe.load_state_dict({"fc.weight": material.weight, "fc.bias": material.bias})
    probe.requires_grad_(False)
    parts = {"train": slice(0, material.train), "test": slice(material.train, None)}
    pairs, tables, said = list(zip(material.words, material.labels)), {}, io.StringIO()

    def split_of(*_args, split: str, **_options):
        return material.x[parts[split]].clone(), pairs[parts[split]]

    def keeping(name: str, experiment, **folders):
        def run(**options):
            with seeded(seed):
                tables[name] = experiment(**options, **folders)
            return tables[name]
        return run

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for module in (main, k_sparse_probing, feature_absorption, feature_absorption_calculator, probing, util):
            stack.enter_context(in_place(module, tqdm=quiet()))
        stack.enter_context(in_place(k_sparse_probing, LETTERS=material.letters, load_or_train_probe=lambda **_: probe,
                                     load_probe_data_split_or_train=split_of))
        stack.enter_context(in_place(
            feature_absorption, LETTERS=material.letters, load_probe=lambda **_: probe,
            get_alpha_tokens=lambda _tokenizer: sorted(material.words)))
        stack.enter_context(in_place(
            main, HookedTransformer=SimpleNamespace(from_pretrained_no_processing=lambda *_a, **_o: model),
            run_k_sparse_probing_experiment=keeping(
                "probes", main.run_k_sparse_probing_experiment, experiment_dir=f"{folder}/probes"),
            run_feature_absortion_experiment=keeping(
                "words", main.run_feature_absortion_experiment, experiment_dir=f"{folder}/words",
                sparse_probing_experiment_dir=f"{folder}/probes")))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.chdir(folder))  # it writes a folder "artifacts" where it stands
        os.makedirs("results")
        main.run_eval(config, [("workbook", wrapped)], device, "results", force_rerun=True)
        files = sorted(Path("results").glob("*_eval_results.json"))
        raw = runs.read_json(files[0]) if files else None
    if raw is not None:
        raw.pop("sae_bench_commit_hash", None)  # of the working directory, not of SAEBench
    return tables["probes"], tables.get("words"), raw, said.getvalue()


def _letters(details: dict[str, dict], probed: pd.DataFrame, absorbed: pd.DataFrame | None,
             material: Material) -> pd.DataFrame:
    """One row per letter: whether it is kept or why not, probe, absorption, split latents and their F1 by k."""
    probes = {} if probed.empty else {row["letter"]: row for row in probed.to_dict("records")}
    positives = {} if absorbed is None or absorbed.empty else absorbed.letter.value_counts().to_dict()
    rows = []
    for letter in "abcdefghijklmnopqrstuvwxyz":
        number, probe, found = material.letters.find(letter), probes.get(letter), details.get(letter)
        row = {"letter": letter, "kept": found is not None, "reason": material.dropped.get(letter, ""),
               "train_words": material.labels[:material.train].count(number),
               "test_words": material.labels[material.train:].count(number)}
        if probe:
            scores = [float(probe[f"f1_sparse_sae_{k}"]) for k in range(1, 1 + _most(probed))]
            if not row["reason"] and probe["f1_probe"] <= PROBE_F1:
                row["reason"] = f"probe F1 {probe['f1_probe']:.2f}, above {PROBE_F1} is needed"
            elif not row["reason"] and absorbed is not None and letter not in positives:
                row["reason"] = "no true positives of the probe"
            row |= {f"probe_{name}": float(probe[f"{name}_probe"]) for name in ("f1", "precision", "recall")}
            row |= {"f1_by_k": scores, "split_latents": list(map(int, probe["split_feats"])),
                    "latents_by_k": [list(map(int, probe[f"sparse_sae_k_{k}_feats"])) for k in
                                     range(1, 1 + _most(probed))]}
        if found:
            row |= {"true_positives": found["num_probe_true_positives"],
                    "full_absorption": found["full_absorption_rate"],
                    "fully_absorbed": found["num_full_absorption"],
                    "absorption_fraction": found["mean_absorption_fraction"],
                    "splits": found["num_split_features"]}
        rows.append(row)
    return pd.DataFrame(rows, columns=LETTER_COLUMNS)


LETTER_COLUMNS = ("letter", "kept", "reason", "train_words", "test_words", "probe_f1", "probe_precision",
                  "probe_recall", "true_positives", "full_absorption", "fully_absorbed", "absorption_fraction",
                  "splits", "split_latents", "f1_by_k", "latents_by_k")


def _most(probed: pd.DataFrame) -> int:
    return sum(column.startswith("f1_sparse_sae_") for column in probed)


def _words(absorbed: pd.DataFrame | None) -> pd.DataFrame:
    """One row per test word with a true positive of the probe, in names that stand for themselves."""
    if absorbed is None or absorbed.empty:
        return pd.DataFrame(columns=WORD_COLUMNS)
    full = absorbed.is_full_absorption.astype(bool)
    return pd.DataFrame({
        "letter": absorbed.letter, "word": absorbed.token, "full_absorption": full,
        "absorbing_latent": absorbed.top_projection_feat.where(full).astype("Int64"),
        "absorption_fraction": absorbed.absorption_fraction.astype(float),
        "top_latent": absorbed.top_projection_feat, "top_projection": absorbed.top_probe_projection,
        "top_cosine": absorbed.top_projection_feat_probe_cos, "latents": absorbed.projection_feats,
        "activations": absorbed.projection_feat_acts, "cosines": absorbed.projection_feat_probe_cos,
        "split_latents": absorbed.split_feats, "split_activations": absorbed.split_feat_acts,
        "prompt": absorbed.prompt}, columns=WORD_COLUMNS)


WORD_COLUMNS = ("letter", "word", "full_absorption", "absorbing_latent", "absorption_fraction", "top_latent",
                "top_projection", "top_cosine", "latents", "activations", "cosines", "split_latents",
                "split_activations", "prompt")
