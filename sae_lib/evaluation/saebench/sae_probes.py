"""sae-probes' k-sparse probing of one of our SAEs: how well k latents of a text's last token tell two classes apart.

The benchmark of "Are Sparse Autoencoders Useful?" (Kantamneni et al., arXiv 2502.16681), through SAEBench. Splits,
choice of latents, probes and metrics are sae-probes' own code, its texts those in its package. Two departures: BOS is
given to every model, as in training, and all presets but ``paper`` take fewer texts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from sae_lib import intervals
from sae_lib.evaluation.reported import settings as reported
from sae_lib.evaluation.saebench import checking, model_side, per_text
from sae_lib.evaluation.saebench.adapter import check_sae, import_sae_bench, in_place, quiet, settings, wrap
from sae_lib.evaluation.saebench.sparse_probing import described, finished, mean_l0
from sae_lib.metrics.saebench_tasks import PREFIX
from sae_lib.params import ParameterError, nearest

MEASURES = ("test_accuracy", "test_auc", "test_f1")
SETS = ("96_spam_is", "154_athlete_sport_football", "24_headline_isiran", "119_us_state_TX", "87_glue_cola",
        "131_temp_cat_Typical Time", "105_click_bait", "126_art_type_book")
"""Short texts of eight kinds."""


class Preset(NamedTuple):
    """Data sets (None takes all 113), tokens of a text, and how many latents a probe reads.

    Of a data set's texts, and of those for training, there are so many at most; None leaves it to sae-probes: all, and
    1024. The rest but one is for testing.
    """

    data: tuple[str, ...] | None
    texts: int | None
    train: int | None
    context: int
    k_values: tuple[int, ...] = (1, 2, 5)


LEAST_TEST = 100
"""Texts that sae-probes leaves for testing at least: it trains on a data set's size less these."""
PRESETS = {"smoke": Preset(SETS[:2], 300, 200, 64), "default": Preset(SETS, 1024, 512, 128),
           "paper": Preset(None, None, None, 1024, (1, 2, 5, 10, 20, 50, 100))}


class Texts(NamedTuple):
    """A data set: texts and their classes, 0 or 1."""

    texts: list[str]
    labels: np.ndarray


def known() -> list[str]:
    """The names of sae-probes' binary data sets."""
    return _module("utils_data").get_numbered_binary_tags()


def read(name: str, most: int | None = None, seed: int = 42) -> Texts:
    """A data set of the installed sae-probes, or ``most`` of its texts, half of each class, in its order.

    Raises ParameterError for a name that it does not have.
    """
    if name not in known():
        raise ParameterError(f"sae_probes: data set '{name}' is not known{nearest(name, known())}; known are the "
                             f"{len(known())} binary ones of sae-probes")
    data = _module("utils_data")
    texts, labels = data.read_numbered_dataset_df(name).prompt.tolist(), data.get_yvals(name)
    kept = range(len(texts))
    if most is not None and most < len(texts):
        draw = random.Random(f"{name} {seed}")
        kept = sorted(place for label in (0, 1) for place in
                      draw.sample(np.flatnonzero(labels == label).tolist(), most // 2))
    return Texts([texts[place] for place in kept], labels[list(kept)])


def sae_probes(sae, lm, preset: str = "default", *, seed: int = 42, threads: int = 0, mode: str = "batch",
               data: tuple[str, ...] | None = None, output_folder: Path | None = None) -> dict[str, Any]:
    """Run sae-probes on ``sae`` (a SparseAutoencoder for raw activations) at ``lm.hook``.

    ``data`` names data sets of sae-probes; None takes the preset's. Returns a report as ``sparse_probing``'s; metrics
    have SAEBench's names after ``PREFIX``. Raises ParameterError for what cannot be evaluated, RunError with
    SAEBench's own words when it fails.
    """
    start = time.perf_counter()
    asked = reported.chosen(preset, PRESETS, "sae_probes", lm, lambda _settings: None)
    check_sae(sae, lm.name, lm.d_model)
    import_sae_bench()
    sets = {name: read(name, asked.texts, seed) for name in data or asked.data or known()}
    context = min(asked.context, lm.hf.config.max_position_embeddings)
    with settings(threads):
        work = Work(sae, lm, model_side.ModelSide(lm, context, mode), sets, asked, seed)
        raw = model_side.run("sae-probes", work.call, seed, work.config)
    found = raw["eval_result_metrics"]
    checking.data_sets("sae-probes", raw, list(sets))
    metrics = checking.figures("sae-probes", found["llm"] | found["sae"], [
        f"{probe}_{measure}" for probe in ("llm", *work.probes.values()) for measure in MEASURES])
    version = importlib.metadata.version("sae-probes")
    config = {"preset": preset, "context": context, "seed": seed, "k_values": list(asked.k_values),
              "sae_probes": version, "texts": work.texts}
    report = described("sae_probes", lm, sae, work.side, config, {
        name: f"{len(one.texts)} texts of sae-probes {version}" for name, one in sets.items()})
    report["config"]["k_values"] = list(work.probes)
    return finished(report, {PREFIX + name: value for name, value in metrics.items()}, raw,
                    sum(work.l0s.values()) / len(work.l0s), start, output_folder, work.within())


class Work:
    """One run of SAEBench's code, with activations and the model's own probes from ``side``."""

    def __init__(self, sae, lm, side, sets: dict[str, Texts], asked: Preset, seed: int):
        from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig

        self.sae, self.lm, self.side, self.sets, self.train, self.at = sae, lm, side, sets, asked.train, ""
        self.probes = {k: f"sae_top_{k}" for k in asked.k_values if k <= sae.d_sae}
        """By number of latents, of those that this SAE has, SAEBench's name of the probe."""
        self.heard: dict[str, per_text.Scored] = {}
        """By data set what its probes say of test texts."""
        self.texts: dict[str, dict[str, int]] = {}
        """By data set its training and test texts."""
        self.l0s: dict[str, float] = {}
        self.config = SparseProbingSaeProbesEvalConfig(
            model_name=lm.name, random_seed=seed, dataset_names=list(sets), ks=list(self.probes))

    def call(self, folder: str) -> None:
        """Run SAEBench's ``run_eval``, texts, activations and the model's own probes in place for its length."""
        from sae_bench.evals.sparse_probing_sae_probes import main

        data, baselines, evals, latents = map(_module, ("utils_data", "run_baselines", "run_sae_evals",
                                                        "generate_sae_activations"))
        most = np.inf if self.train is None else self.train + LEAST_TEST
        sizes = {name: min(len(one.texts), most) for name, one in self.sets.items()}
        wrapped = wrap(self.sae, self.lm.name, self.lm.hook, device=self.lm.device, dtype=self.lm.dtype,
                       context=self.side.context)
        there = {"ensure_dataset_activations": lambda **_options: None, "tqdm": quiet()}
        with (in_place(data, get_xvals=self._activations, get_yvals=lambda name: self.sets[name].labels,
                       get_train_test_indices=self._splitting(data.get_train_test_indices)),
              in_place(latents, DATASET_SIZES=sizes),
              in_place(evals, find_best_reg=self._hearing(evals.find_best_reg), **there),
              # What it saves by torch are pickled probes, which nothing reads.
              in_place(baselines, DATASET_SIZES=sizes, torch=SimpleNamespace(save=lambda *_args: None), **there,
                       METHODS=baselines.METHODS | {"logreg": self._learnt(baselines.METHODS["logreg"])}),
              in_place(main, tqdm=quiet())):
            main.run_eval(self.config, [("workbook", wrapped)], str(self.lm.device), folder, force_rerun=True)

    def within(self) -> dict[str, Any]:
        """Intervals of the means over data sets, whose test texts are drawn one by one, equal ones together."""
        drawn = per_text.means([intervals.spread(one.n, one.figures, strata=one.strata, seed=number)
                                for number, one in enumerate(self.heard.values())])
        return intervals.within(per_text.BY, {PREFIX + name: values for name, values in drawn.items()})

    def _activations(self, name: str, *_args):
        x = self.side.last_token(name, self.sets[name].texts, self.sets[name].labels.tolist())
        if name not in self.l0s:
            self.l0s[name] = mean_l0(self.sae, x.to(self.lm.device))
        self.at = name
        return x

    def _splitting(self, own):
        """sae-probes' split of a data set; which texts it tests on is noted."""
        def split(*args, **options):
            train, test = own(*args, **options)
            if self.at not in self.heard:  # the model's own probes come again, with the same split
                texts, labels = self.sets[self.at]
                self.heard[self.at] = per_text.Scored([texts[place] for place in test], labels[test])
                self.texts[self.at] = {"train": len(train), "test": len(test)}
            return train, test
        return split

    def _hearing(self, own):
        """sae-probes' training of a probe on ``k`` latents; what it says of the test texts is noted."""
        def train(*, X_train, X_test, **options):
            found = own(X_train=X_train, X_test=X_test, **options)
            probe = found.classifier
            self.heard[self.at].scored(self.probes[X_train.shape[1]], probe.predict(X_test),
                                       probe.predict_proba(X_test)[:, 1])
            return found
        return train

    def _learnt(self, own):
        """sae-probes' training of a probe on all channels of the model, whose figures are kept for the next SAE."""
        training = _module("utils_training")

        def learn(*args, seed: int):
            what = ["sae_probes", importlib.metadata.version("sae-probes"), seed]
            held = self.side.learnt(self.at, what, lambda: ({}, vars(own(*args, seed=seed).metrics)))[1]
            return training.BestClassifierResults(training.Metrics(**held), None, None)
        return learn


def _module(name: str):
    """A module of sae-probes; its package has functions by the names of some."""
    import_sae_bench()
    return importlib.import_module(f"sae_probes.{name}")
