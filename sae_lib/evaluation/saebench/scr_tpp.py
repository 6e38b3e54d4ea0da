"""SAEBench's spurious correlation removal (SCR) and targeted probe perturbation (TPP) of one of our SAEs.

SCR: of a probe trained where two labels go together, how much of its spurious half the best latents for it can remove.
TPP: how much ablating a class' best latents harms its own probe more than those of other classes. Metrics are
SAEBench's own code. Later work (arXiv 2605.18229) holds both, at their usual settings, unfit to rank SAEs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from sae_lib.data import labelled
from sae_lib.evaluation.reported import settings as reported
from sae_lib.evaluation.saebench import checking, model_side, per_text
from sae_lib.evaluation.saebench.adapter import check_sae, import_sae_bench, in_place, quiet, settings, wrap
from sae_lib.evaluation.saebench.latent_sums import LatentSums
from sae_lib.evaluation.saebench.sparse_probing import data_of, described, finished, mean_l0
from sae_lib.params import ParameterError

DATA = {"scr": (("source_by_sentiment",), ("tiny_crossed",)), "tpp": (("topics", "sources"), ("tiny_letters",))}
"""The embedded data sets of an evaluation, and those of the model ``tiny``."""
FEWEST = 4
"""Texts of a combination of two labels at least."""


class Preset(NamedTuple):
    """Texts of a probe, tokens of a text, and how many latents are ablated; as SAEBench counts them."""

    train: int
    test: int
    context: int
    ablated: tuple[int, ...]
    given: dict[str, Any] = {}
    """Settings of SAEBench's own that a study reported; with them go SAEBench's own data."""


PRESETS = {"smoke": Preset(160, 64, 32, (2, 20)), "default": Preset(800, 400, 64, (2, 5, 10, 20, 50)),
           "paper": Preset(4000, 1000, 128, (2, 5, 10, 20, 50, 100, 500))}


def scr(sae, lm, preset: str = "default", **options) -> dict[str, Any]:
    """Run SAEBench's SCR on ``sae`` at ``lm.hook``; options and result are those of ``tpp``.

    Where two labels do not cross often enough for the preset, a pair has fewer texts; ``config.texts`` says how many
    of each combination.
    """
    return _evaluate("scr", sae, lm, preset, **options)


def tpp(sae, lm, preset: str = "default", **options) -> dict[str, Any]:
    """Run SAEBench's TPP on ``sae`` (a SparseAutoencoder for raw activations) at ``lm.hook``.

    Options: ``seed``, ``threads``, ``mode``, ``data`` (names of embedded data sets; None takes those of the model),
    ``output_folder``. Returns eval, metrics (SAEBench's names, means over data sets), config, raw (its own JSON, with
    every data set), provenance, seconds. Raises ParameterError for what cannot be evaluated, RunError with SAEBench's
    own words when it fails.
    """
    return _evaluate("tpp", sae, lm, preset, **options)


def _evaluate(name: str, sae, lm, preset: str, *, seed: int = 42, threads: int = 0, mode: str = "batch",
              data: tuple[str, ...] | None = None, output_folder: Path | None = None) -> dict[str, Any]:
    start = time.perf_counter()
    asked = reported.chosen(preset, PRESETS, name, lm, _reported)
    seed = asked.given.get("random_seed", seed)
    check_sae(sae, lm.name, lm.d_model)
    import_sae_bench()
    make = labelled.crossed if name == "scr" else labelled.labelled
    names = data or data_of(lm.name, preset, *DATA[name])
    sets = {one: make(one) for one in names or ()}
    with settings(threads):
        side = model_side.ModelSide(lm, asked.context, mode)
        work = Work(name, sae, lm, side, sets, asked, seed)
        raw = model_side.run(name.upper(), work.call, seed, work.config)
    checking.data_sets(name.upper(), raw, list(sets) or raw["eval_config"]["dataset_names"])
    metrics = checking.figures(name.upper(), raw["eval_result_metrics"][f"{name}_metrics"], [
        f"scr_metric_threshold_{n}" if name == "scr" else f"tpp_threshold_{n}_total_metric" for n in work.ablated])
    config = {"preset": preset, "train": asked.train, "test": asked.test, "context": asked.context,
              "ablated": asked.ablated, "seed": seed}
    report = described(name, lm, sae, side, config, {
        one: found.about for one, found in sets.items()} or dict.fromkeys(
        raw["eval_config"]["dataset_names"], "SAEBench's own, of the hub"))
    report["config"] |= {"texts": work.texts, "ablated": work.ablated,
                         "not_as_reported": reported.differences(preset, name, raw)}
    return finished(report, metrics, raw, sum(work.l0s) / len(work.l0s), start, output_folder,
                    per_text.within(work.parts()))


@dataclasses.dataclass
class Tests:
    """The tests of one data set's probes: of the SAE as it is, then with each class' latents ablated."""

    answers: per_text.Answers
    states: list[dict[str, int]] = dataclasses.field(default_factory=list)
    """By SAEBench's name of a test the number of its probe's answers; as it is first, then by class and count."""
    classes: list[str] = dataclasses.field(default_factory=list)
    noting: bool = False
    """Whether what is prepared now is tested, and not trained on."""
    asked: int = 0


def _reported(settings: dict[str, Any]) -> Preset:
    return Preset(settings["train_set_size"], settings["test_set_size"], settings["context_length"],
                  tuple(settings["n_values"]), reported.given(settings, but=("n_values",)))


class Work:
    """One run of SAEBench's code, with activations and the model's own probes from ``side``."""

    def __init__(self, name: str, sae, lm, side, sets: dict[str, Any], asked: Preset, seed: int):
        self.name, self.sae, self.lm, self.side, self.sets = name, sae, lm, side, sets
        self.asked, self.seed, self.at = asked, seed, ""
        self.ablated = [count for count in asked.ablated if count <= sae.d_sae]
        """Numbers of latents that this SAE has."""
        self.l0s: list[float] = []
        self.texts: dict[str, dict[str, int]] = {}
        """Of each data set (or pair of labels) the training and test texts of a class (or combination)."""
        self.tests: list[Tests] = []
        """Of each, which test texts its probes put in the right class."""

        self.config = self._config()

    def _config(self):
        from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

        options = {"random_seed": self.seed, "perform_scr": self.name == "scr", "train_set_size": self.asked.train,
                   "test_set_size": self.asked.test, "context_length": self.asked.context} | self.asked.given
        if self.sets:
            options["dataset_names"] = list(self.sets)
        if self.sets and self.name == "scr":
            options["column1_vals_lookup"] = {one: list(found.pairs) for one, found in self.sets.items()}
        return ScrAndTppEvalConfig(
            llm_batch_size=32, sae_batch_size=model_side.sae_batch(self.sae.d_sae, self.asked.context),
            n_values=self.ablated, llm_dtype=str(self.lm.dtype).removeprefix("torch."), model_name=self.lm.name,
            **options)

    def call(self, folder: str) -> None:
        """Run SAEBench's ``run_eval``, its data and model in place for its length."""
        from sae_bench.evals.scr_and_tpp import main
        from sae_bench.sae_bench_utils import dataset_info

        classes, columns, values = {}, {}, {}
        for one, found in self.sets.items():
            labels = found.rows.columns
            values[one] = getattr(found, "second", None)
            classes[one] = sorted(found.rows.label.unique()) if "label" in labels else []
            columns[one] = {"text_column_name": "text"} | {
                key: value for number, column in enumerate(("first", "second"), 1) if column in labels
                for key, value in ((f"column{number}_name", column),
                                   (f"column{number}_mapping", {v: v for v in found.rows[column].unique()}))}
        wrapped = wrap(self.sae, self.lm.name, self.lm.hook, device=self.lm.device, dtype=self.lm.dtype,
                       context=self.asked.context)
        own = main.probe_training
        training = SimpleNamespace(Probe=own.Probe, prepare_probe_data=self._prepare, test_probe_gpu=self._test,
                                   train_probe_on_activations=self._train)
        with (in_place(dataset_info, dataset_metadata=dataset_info.dataset_metadata | columns,
                       chosen_classes_per_dataset=dataset_info.chosen_classes_per_dataset | classes),
              in_place(main, **self._fewer_passes()),
              in_place(main, tqdm=quiet(), COLUMN2_VALS_LOOKUP=main.COLUMN2_VALS_LOOKUP | values,
                       probe_training=training, get_dataset_activations=self._activations,
                       get_all_node_effects_for_one_sae=self._reseeded(main.get_all_node_effects_for_one_sae),
                       get_probe_test_accuracy=self._reseeded(main.get_probe_test_accuracy, self._tested),
                       HookedTransformer=SimpleNamespace(from_pretrained_no_processing=lambda *_a, **_o: None))):
            main.run_eval(self.config, [("workbook", wrapped)], str(self.lm.device), folder, force_rerun=True,
                          save_activations=False)

    def _fewer_passes(self) -> dict[str, Any]:
        """SAEBench's functions that encode and decode, each text once; none for an SAE that decodes otherwise."""
        if not LatentSums.applies(self.sae):
            return {}
        sums = LatentSums(self.sae)
        return {"ablated_precomputed_activations": sums.ablated, "get_effects_per_class_precomputed_acts": sums.effects}

    def _reseeded(self, function, around=None):
        """The function, drawing the same each time, so that a probe is tested on one set of texts before and after."""
        def call(*args, **options):
            model_side.reseed(self.seed, self.at, function.__name__)
            return around(function, *args, **options) if around else function(*args, **options)
        return call

    def _tested(self, own, probes, classes, *args, **options):
        """Accuracies of one state of the SAE; its probes' answers are noted under the names that SAEBench gives."""
        test, before = self.tests[-1], self.tests[-1].asked
        test.classes, test.noting = classes, True
        found = own(probes, classes, *args, **options)
        test.noting = False
        test.states.append(dict(zip(found, range(before, test.asked), strict=True)))
        return found

    def _prepare(self, acts, *args, **options):
        from sae_bench.evals.sparse_probing.probe_training import prepare_probe_data

        test = self.tests[-1]
        return (test.answers.preparing(prepare_probe_data, acts, *args, **options) if test.noting
                else prepare_probe_data(acts, *args, **options))

    def _test(self, inputs, labels, batch_size, probe):
        from sae_bench.evals.sparse_probing.probe_training import test_probe_gpu

        self.tests[-1].asked = 1 + self.tests[-1].answers.answered(per_text.right(probe, inputs, labels, batch_size))
        return test_probe_gpu(inputs, labels, batch_size, probe)

    def parts(self) -> list[tuple[per_text.Answers, per_text.Figures]]:
        """Answers by data set (or pair of labels), and what SAEBench makes of their accuracies."""
        make = _scr_of if self.name == "scr" else _tpp_of
        return [(test.answers, functools.partial(make, test, self.ablated)) for test in self.tests]

    def _activations(self, name: str, config, _model, _batch, _layer, _hook, _device, classes, first=None, second=None):
        from sae_bench.evals.scr_and_tpp import dataset_creation
        from sae_bench.sae_bench_utils import dataset_utils

        self.at = " ".join([name, *(first or ())])
        if name not in self.sets:
            both = dataset_creation.get_train_test_data(name, config.perform_scr, self.asked.train, self.asked.test,
                                                        self.seed, first, second)
            both = both if first else tuple(dataset_utils.filter_dataset(part, classes) for part in both)
        elif first:
            both = tuple(self._combined(name, part, count, first, second) for part, count in (
                ("train", self.asked.train), ("test", self.asked.test)))
        else:
            both = self.sets[name].sample(self.asked.train, self.asked.test, self.seed)
        self.texts[self.at] = {part: min(map(len, texts.values())) for part, texts in zip(("train", "test"), both)}
        self.tests.append(Tests(per_text.Answers(both[1])))
        found = self.side.activations(self.at, *both)
        self.l0s.append(mean_l0(self.sae, next(iter(found[1].values()))))
        return found

    def _combined(self, name: str, part: str, asked: int, first, second) -> dict[str, list[str]]:
        """SAEBench's six groups of texts for a pair of values; its keys are the names of professions and genders."""
        from sae_bench.evals.scr_and_tpp import dataset_creation

        found = self.sets[name]
        count = found.fits(tuple(first), part, asked)
        if count < FEWEST:
            raise ParameterError(f"labelled texts: '{name}' has {count} {part} texts of each combination of "
                                 f"{' and '.join(first)} with {' and '.join(second)}; at least {FEWEST} are needed")
        rows = found.rows[found.rows.part == part].sample(frac=1, random_state=self.seed)
        return dataset_creation.get_spurious_corr_data(rows, first, second, name, count, self.seed)

    def _train(self, train, test, **how):
        from sae_bench.evals.sparse_probing import probe_training

        def learn():
            model_side.reseed(self.seed, self.at, "probes")
            probes, accuracy = probe_training.train_probe_on_activations(train, test, **how)
            return {f"{key} {part}": tensor for key, probe in probes.items()
                    for part, tensor in probe.state_dict().items()}, accuracy

        tensors, accuracy = self.side.learnt(self.at, [self.name, self.seed, how], learn)
        probes = {}
        for key in accuracy:
            weight, bias = (tensors[f"{key} net.{part}"].to(self.lm.device) for part in ("weight", "bias"))
            probes[key] = probe_training.Probe(weight.shape[1], weight.dtype).to(weight.device)
            probes[key].load_state_dict({"net.weight": weight, "net.bias": bias})
        return probes, accuracy


def _states(test: Tests, ablated: list[int], accuracies: np.ndarray):
    """SAEBench's two tables of accuracies (W, M): by class, count and test, and those of the SAE as it is."""
    clean, *changed = [{name: accuracies[:, number] for name, number in state.items()} for state in test.states]
    held = iter(changed)
    return {one: {count: next(held) for count in ablated} for one in test.classes}, clean


def _tpp_of(test: Tests, ablated: list[int], accuracies: np.ndarray) -> dict[str, np.ndarray]:
    """TPP's metrics, by SAEBench's own arithmetic, which does as well with (W,) values as with one."""
    from sae_bench.evals.scr_and_tpp.main import create_tpp_plotting_dict

    return create_tpp_plotting_dict(*_states(test, ablated, accuracies))[0]


def _scr_of(test: Tests, ablated: list[int], accuracies: np.ndarray) -> dict[str, np.ndarray]:
    """SCR's metrics, by SAEBench's own code draw by draw: it chooses a direction by the accuracies."""
    from sae_bench.evals.scr_and_tpp.main import get_scr_plotting_dict

    with contextlib.redirect_stdout(io.StringIO()):
        found = [get_scr_plotting_dict(*_one(*_states(test, ablated, row[None]))) for row in accuracies]
    names = dict.fromkeys(name for one in found for name in one)
    return {name: np.array([one.get(name, np.nan) for one in found], dtype=float) for name in names}


def _one(changed, clean):
    """The two tables of one draw, with numbers in place of arrays of one."""
    return ({one: {count: {name: value[0] for name, value in state.items()} for count, state in by_count.items()}
             for one, by_count in changed.items()}, {name: value[0] for name, value in clean.items()})
