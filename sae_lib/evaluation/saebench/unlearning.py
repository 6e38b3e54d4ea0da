"""SAEBench's unlearning of one of our SAEs: how many answers on biology (WMDP) a tuned Gemma-2 loses when latents go.

Latents that fire on a forget corpus and rarely on other text are clamped; the score is the best of a sweep that keeps
0.99 of the answers on other subjects. Only questions count that the model answers right in all 24 orders of the
choices: a model that knows none has nothing to unlearn, which is said in place of a number.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from sae_lib import runs
from sae_lib.evaluation.hooked_model import to_hooked
from sae_lib.evaluation.reported import settings as reported
from sae_lib.evaluation.rerun import identity
from sae_lib.evaluation.saebench import checking, model_side, unlearning_data
from sae_lib.evaluation.saebench.adapter import check_sae, import_sae_bench, in_place, quiet, settings, wrap
from sae_lib.evaluation.saebench.sparse_probing import described, finished
from sae_lib.params import digest

MODELS = ("gemma-2-2b-it", "gemma-2-9b-it")
"""The models whose prompts SAEBench knows."""
FEW = 50
"""Known questions on biology under which a score is called coarse."""
IDS = "{folder}/data/question_ids/{split}/{name}_correct.csv"


class Preset(NamedTuple):
    """How many sequences of a corpus tell which latents fire on it, their tokens, and what is swept."""

    sequences: int
    tokens: int
    given: dict[str, Any] = {}
    """Settings of SAEBench's own where they are not its defaults."""


PRESETS = {"smoke": Preset(32, 128, {"retain_thresholds": [0.01], "n_features_list": [10], "multipliers": [50, 200]}),
           "default": Preset(256, 512), "paper": Preset(1024, 1024)}


def unlearning(sae, lm, preset: str = "default", *, folder: str | None = None, seed: int = 42, threads: int = 0,
               declared: bool = False) -> dict[str, Any]:
    """Run SAEBench's unlearning on ``sae`` (a SparseAutoencoder for raw activations) in the whole model ``lm``.

    ``folder`` holds the data (``unlearning_data``). ``declared``: the model is named for this evaluation and is not
    the trained one. Returns a report as ``sparse_probing``'s; without a number its ``status`` is ``not applicable``,
    with the reason. Raises ParameterError for data that are not there, RunError with SAEBench's own words.
    """
    start, name = time.perf_counter(), lm.name.rpartition("/")[2]
    if name not in MODELS:
        return _none(sae, lm, declared, f"only {' and '.join(MODELS)} answer its questions well enough, not {lm.name}; "
                     "name one of them as `model` in another 03 (evals: [unlearning])")
    asked = reported.chosen(preset, PRESETS, "unlearning", lm, _reported)
    check_sae(sae, lm.name, lm.d_model)
    import_sae_bench()
    with settings(threads):
        work = Work(sae, lm, name, unlearning_data.Data(folder), asked, seed)
        raw = model_side.run("unlearning", work.call, seed, work.config, optional=True)
    report = described("unlearning", lm, sae, SimpleNamespace(keys=work.data.keys, reused=work.reused), {
        "preset": preset, "sequences": asked.sequences, "tokens": asked.tokens, "seed": seed}, work.data.about)
    report["config"] |= {"questions": work.known, "declared_model": declared}
    if raw is None:
        said = ", ".join(f"{known} of {total} on {one}" for one, (known, total) in work.known.items())
        return _none(sae, lm, declared, f"the model knows {said}: some of each are needed", report["config"])
    report["config"]["not_as_reported"] = reported.differences(preset, "unlearning", raw)
    metrics = checking.figures("unlearning", raw["eval_result_metrics"]["unlearning"], ["unlearning_score"])
    report = finished(report, metrics, raw, work.l0, start, None, within={})
    known = work.known["wmdp-bio"][0]
    if known < FEW and not report["note"]:
        report["note"] = f"the model knows {known} questions on biology: the score moves in steps of {1 / known:.2g}"
    return report


def _none(sae, lm, declared: bool, reason: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    about = {"model": lm.name, "model_identity": lm.identity, "hook": lm.hook, "d_sae": sae.d_sae,
             "declared_model": declared}
    return {"eval": "unlearning", "status": "not applicable", "reason": reason, "metrics": {},
            "provenance": runs.provenance(), "config": about | (config or {})}


def _reported(record: dict[str, Any]) -> Preset:
    return Preset(record["dataset_size"], record["seq_len"], reported.given(record))


class Work:
    """One run of SAEBench's code: the model in place of the hub's, the data in place of ``load_dataset``."""

    def __init__(self, sae, lm, name: str, data, asked: Preset, seed: int):
        from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig

        self.sae, self.lm, self.data, self.asked, self.l0, self.reused = sae, lm, data, asked, 0.0, False
        self.config = UnlearningEvalConfig(**{"random_seed": seed, "dataset_size": asked.sequences,
                                              "seq_len": asked.tokens} | asked.given, model_name=name,
                                           llm_batch_size=4, llm_dtype=str(lm.dtype).removeprefix("torch."))
        self.known: dict[str, tuple[int, int]] = {}
        """Of each set of questions, how many the model knows and how many there are."""

    def call(self, folder: str) -> None:
        """Find the questions that the model knows; where there are some of each set, run SAEBench's ``run_eval``."""
        from sae_bench.evals.unlearning import main
        from sae_bench.evals.unlearning.utils import eval as single
        from sae_bench.evals.unlearning.utils import feature_activation
        from sae_bench.evals.unlearning.utils import metrics as questions

        model = to_hooked(self.lm)
        model.cfg.model_name = self.config.model_name
        artifacts = f"artifacts/unlearning/{self.config.model_name}"
        self.data.place(Path("sae_bench/evals/unlearning/data"))
        wrapped = wrap(self.sae, self.config.model_name, self.lm.hook, device=self.lm.device, dtype=self.lm.dtype,
                       context=self.asked.tokens)
        tokens = feature_activation.get_shuffled_forget_retain_tokens
        with (in_place(questions, load_dataset=self.data.load, tqdm=quiet()),
              in_place(feature_activation, load_dataset=self.data.load,
                       get_shuffled_forget_retain_tokens=lambda *a, **o: self.data.long_enough(tokens(*a, **o))),
              in_place(main, tqdm=quiet(),
                       HookedTransformer=SimpleNamespace(from_pretrained_no_processing=lambda *_a, **_o: model))):
            if not self._questions(model, questions, artifacts):
                return
            main.run_eval(self.config, [("workbook", wrapped)], str(self.lm.device), folder, force_rerun=True)
        forget = single.load_sparsity_data(artifacts, "workbook_custom_sae")[0]
        self.l0 = float(np.sum(forget))

    def _questions(self, model, questions, artifacts: str) -> bool:
        """Whether the model knows some of each set; which ones is the model's own, and kept for the next SAE."""
        names = self.config.dataset_names
        text = digest([self.data.rows(name) for name in names], 24).encode()
        file = runs.cache() / f"evaluation/questions-{digest([*identity(self.lm, text), names], 24)}.json"
        held = runs.read_json(file) if file.exists() else {}
        for path, content in held.items():
            runs.write_text(Path(artifacts) / path, content)
        self.reused = bool(held)
        for name in names:
            questions.save_target_question_ids(model, 2 * self.config.llm_batch_size, artifacts, name)
            full = name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"
            ids = Path(IDS.format(folder=artifacts, split="all", name=full)).read_text().split()
            self.known[name] = len(ids), len(self.data.rows(name))
        if not held:
            found = Path(artifacts).glob("data/question_ids/*/*.csv")
            runs.write_json(file, {path.relative_to(artifacts).as_posix(): path.read_text() for path in found})
        return all(known for known, _ in self.known.values())
