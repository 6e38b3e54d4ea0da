"""SAEBench's sparse probing of one of our SAEs: how well its best 1, 2 and 5 latents tell labelled texts apart.

Its metrics are SAEBench's own code, its data the embedded labelled texts or, for a model of the hub in ``paper``, its
own. One departure: each probe is trained from a seed of its own, so that what the cache holds changes no figure.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lib import params, runs
from sae_lib.data import labelled
from sae_lib.evaluation.reported import settings as reported
from sae_lib.evaluation.saebench import checking, model_side, per_text
from sae_lib.evaluation.saebench.adapter import check_sae, import_sae_bench, in_place, quiet, settings, wrap
from sae_lib.params import digest

K_VALUES = (1, 2, 5)
EMBEDDED, TINY = ("sentiment", "topics", "languages", "code"), ("tiny_letters",)
EMPTY_L0 = 0.1
"""Active latents per token under which figures say nothing of the SAE: a dead one scores 0.5 without a warning."""


class Preset(NamedTuple):
    """Texts of a probe, half of them of its class, and tokens of a text; as SAEBench counts them."""

    train: int
    test: int
    context: int
    k_values: tuple[int, ...] = K_VALUES
    given: dict[str, Any] = {}
    """Settings of SAEBench's own that a study reported; with them go SAEBench's own data."""


PRESETS = {"smoke": Preset(80, 40, 32), "default": Preset(400, 200, 64), "paper": Preset(4000, 1000, 128)}


def of_hub(model: str) -> bool:
    """Whether a model's name is the hub's: then ``paper`` reads SAEBench's own data, which come from there too."""
    return model not in ("tiny", "smollm2") and params.local_path(model) is None


def data_of(model: str, preset: str, embedded: tuple[str, ...], tiny: tuple[str, ...]) -> tuple[str, ...] | None:
    """The embedded data sets that a model is evaluated on; None for SAEBench's own."""
    if preset in reported.PRESETS or (preset == "paper" and of_hub(model)):
        return None
    return tiny if model == "tiny" else embedded


def sparse_probing(sae, lm, preset: str = "default", *, seed: int = 42, threads: int = 0, mode: str = "batch",
                   data: tuple[str, ...] | None = None, output_folder: Path | None = None) -> dict[str, Any]:
    """Run SAEBench's sparse probing on ``sae`` (a SparseAutoencoder for raw activations) at ``lm.hook``.

    ``data`` names embedded data sets (``labelled.LABELLED``); None takes those of the model. Returns eval, metrics
    (SAEBench's names, means over data sets; shares of test texts), config, raw (SAEBench's own JSON, with every data
    set and class), provenance, seconds; written as ``output_folder/sparse_probing.json`` if a folder is given. Raises
    ParameterError for what cannot be evaluated, RunError with SAEBench's own words when it fails.
    """
    start = time.perf_counter()
    asked = reported.chosen(preset, PRESETS, "sparse_probing", lm, _reported)
    seed = asked.given.get("random_seed", seed)
    check_sae(sae, lm.name, lm.d_model)
    import_sae_bench()
    names = data or data_of(lm.name, preset, EMBEDDED, TINY)
    sets = {name: labelled.labelled(name).sample(asked.train, asked.test, seed) for name in names or ()}
    with settings(threads):
        side = model_side.ModelSide(lm, asked.context, mode)
        raw, l0, answers = _run(sae, lm, side, sets, asked, seed)
    found = raw["eval_result_metrics"]
    checking.data_sets("sparse probing", raw, list(sets) or raw["eval_config"]["dataset_names"])
    metrics = checking.figures("sparse probing", found["llm"] | found["sae"], [
        f"{kind}_{part}test_accuracy" for kind in ("llm", "sae")
        for part in ("", *(f"top_{k}_" for k in asked.k_values))])
    config = {"preset": preset, "train": asked.train, "test": asked.test, "context": asked.context, "seed": seed,
              "k_values": list(asked.k_values)}
    report = described("sparse_probing", lm, sae, side, config, {
        name: labelled.labelled(name).about for name in sets} or dict.fromkeys(
        raw["eval_config"]["dataset_names"], "SAEBench's own, of the hub"))
    report["config"]["texts"] = {name: [{label: len(texts) for label, texts in part.items()} for part in both]
                                 for name, both in sets.items()}
    report["config"]["not_as_reported"] = reported.differences(preset, "sparse_probing", raw)
    return finished(report, metrics, raw, l0, start, output_folder, per_text.within(answers))


def _reported(settings: dict[str, Any]) -> Preset:
    return Preset(settings["probe_train_set_size"], settings["probe_test_set_size"], settings["context_length"],
                  tuple(settings["k_values"]), reported.given(settings))


def described(name: str, lm, sae, side, config: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """The part of a report that says what was measured on what; ``comparable`` is equal where figures may be compared.

    ``data`` says of each data set what it is.
    """
    provenance = runs.provenance()
    config |= {"model": lm.name, "model_identity": lm.identity, "hook": lm.hook, "d_in": sae.d_in,
               "dtype": str(lm.dtype).removeprefix("torch."), "device": str(lm.device), "data": data,
               "texts_sha256": dict(sorted(side.keys.items()))}
    config["comparable"] = digest([name, provenance["packages"]["sae-bench"], config])
    return {"eval": name, "metrics": {}, "config": config | {"d_sae": sae.d_sae}, "provenance": provenance,
            "model_reused": side.reused}


def finished(report: dict[str, Any], metrics: dict[str, float], raw: dict[str, Any], l0: float, start: float,
             folder: Path | None, within: dict[str, Any]) -> dict[str, Any]:
    """The report with its figures and their intervals, and a note where the SAE does not fire; into ``folder``."""
    note = None if l0 >= EMPTY_L0 else (f"mean L0 on these texts is {l0:.2g}: (almost) no latent is active, and the "
                                        "figures are those of no SAE")
    report |= {"metrics": metrics, "within_this_sae": within, "l0_texts": l0, "note": note, "raw": raw,
               "seconds": round(time.perf_counter() - start, 2)}
    if folder is not None:
        runs.write_json(Path(folder) / f"{report['eval']}.json", report)
    return report


@torch.no_grad()
def mean_l0(sae, x: torch.Tensor, most: int = 8192) -> float:
    """Mean active latents over the first tokens of activations (texts, tokens, D) that are text."""
    rows = x[x.sum(-1) != 0][:most].float()
    return float((sae.encode(rows) != 0).float().sum(1).mean())


def _run(sae, lm, side, sets, asked: Preset, seed: int):
    """SAEBench's own ``run_eval`` with activations and the model's own probes from ``side``.

    Its JSON, the L0, and by data set which texts the SAE's probes put in the right class.
    """
    from sae_bench.evals.sparse_probing import main
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    options = {"random_seed": seed, "probe_train_set_size": asked.train, "probe_test_set_size": asked.test,
               "context_length": asked.context, "k_values": list(asked.k_values)} | asked.given
    config = main.SparseProbingEvalConfig(
        **options | ({"dataset_names": list(sets)} if sets else {}), llm_batch_size=32,
        sae_batch_size=model_side.sae_batch(sae.d_sae, asked.context),
        llm_dtype=str(lm.dtype).removeprefix("torch."), model_name=lm.name)
    own, l0s, at = main.probe_training.train_probe_on_activations, [], SimpleNamespace(name="", calls=0)
    heard: list[tuple[per_text.Answers, dict[str, int]]] = []

    def activations(name: str, *_args, **_options):
        """In place of SAEBench's ``get_dataset_activations``: of training and test texts, by class."""
        both = sets.get(name) or [
            dataset_utils.filter_dataset(part, dataset_info.chosen_classes_per_dataset[name])
            for part in dataset_utils.get_multi_label_train_test_data(name, asked.train, asked.test, seed)]
        at.name, at.calls = name, 0
        found = side.activations(name, *both)
        heard.append((per_text.Answers(both[1]), {}))
        l0s.append(mean_l0(sae, next(iter(found[1].values()))))
        return found

    def train(train_acts, test_acts, select_top_k=None, **how):
        """SAEBench's probes, those of the model itself from what is kept."""
        at.calls += 1
        of_model = at.calls <= 1 + len(asked.k_values)  # the model's own probes come first

        def probed():
            model_side.reseed(seed, at.name, of_model, select_top_k)
            return own(train_acts, test_acts, select_top_k=select_top_k, **how)

        if not of_model:
            answers, numbers = heard[-1]
            name = f"sae_top_{select_top_k}_test_accuracy" if select_top_k else "sae_test_accuracy"
            with per_text.listening(answers, test_acts):
                found = probed()
            numbers[name] = len(found[1])  # probes, one a class
            return found
        what = ["sparse_probing", seed, select_top_k, how]
        return {}, side.learnt(at.name, what, lambda: ({}, probed()[1]))[1]

    def call(folder: str) -> None:
        wrapped = wrap(sae, lm.name, lm.hook, device=lm.device, dtype=lm.dtype, context=asked.context)
        with in_place(main, tqdm=quiet(), get_dataset_activations=activations,
                      probe_training=SimpleNamespace(train_probe_on_activations=train),
                      HookedTransformer=SimpleNamespace(from_pretrained_no_processing=lambda *_a, **_o: None)):
            main.run_eval(config, [("workbook", wrapped)], str(lm.device), folder, force_rerun=True,
                          save_activations=False)

    raw = model_side.run("sparse probing", call, seed, config)
    return raw, sum(l0s) / len(l0s), [(answers, _means(numbers)) for answers, numbers in heard]


def _means(numbers: dict[str, int]) -> per_text.Figures:
    """Means over classes of accuracies (W, M), whose probes stand metric by metric, as many as ``numbers`` says."""
    def figures(accuracies: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(accuracies, np.cumsum(list(numbers.values()))[:-1], axis=1)
        return {name: part.mean(1) for name, part in zip(numbers, parts)}
    return figures
