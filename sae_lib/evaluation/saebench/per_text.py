"""What SAEBench's probes say of each test text, as they pass by: what intervals are drawn from.

SAEBench keeps a probe's accuracy and forgets the texts. Its probes are asked again on the rows that it tested them on,
and its draws of texts are repeated with their numbers. Texts of a data set are drawn together for all its probes,
within the classes that they are in: data sets, classes and probes are fixed. N texts, M probes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from sae_lib import intervals
from sae_lib.evaluation.saebench.adapter import in_place

BY = "bootstrap over test texts within their classes; data sets, classes and probes are fixed"


class Answers:
    """The probes' answers on one data set's test texts by class."""

    def __init__(self, texts: dict[str, list[str]]):
        number = {text: place for place, text in enumerate(dict.fromkeys(t for own in texts.values() for t in own))}
        self._numbers = {label: torch.tensor([number[t] for t in own], dtype=torch.float64)[:, None]
                         for label, own in texts.items()}
        self.number = number
        """Place of each text."""
        self.n = len(number)
        """Texts; one that is in several classes counts once, and is drawn for all."""
        self._correct: list[np.ndarray] = []
        self._asked: list[np.ndarray] = []
        self._rows: np.ndarray | None = None

    @property
    def strata(self) -> list[np.ndarray]:
        """Places of texts that are in the same classes."""
        held: dict[int, tuple[str, ...]] = {}
        for label, numbers in self._numbers.items():
            for place in numbers.flatten().long().tolist():
                held[place] = (*held.get(place, ()), label)
        groups: dict[tuple[str, ...], list[int]] = {}
        for place, labels in sorted(held.items()):
            groups.setdefault(labels, []).append(place)
        return [np.array(places) for places in groups.values()]

    def preparing(self, own: Callable, acts: dict[str, Tensor], *args, **options):
        """SAEBench's ``prepare_probe_data`` of test activations by class; the texts that it chose are noted.

        It is called a second time from the same random state, on the texts' numbers in place of activations.
        """
        state = torch.get_rng_state()
        numbers, _ = own({label: self._numbers[label] for label in acts}, *args, **options)
        torch.set_rng_state(state)
        self._rows = numbers[:, 0].long().numpy()
        return own(acts, *args, **options)

    def answered(self, correct: Tensor | np.ndarray) -> int:
        """Note for the texts prepared last whether (n,) a probe was right; the probe's number."""
        for held, weight in ((self._correct, np.asarray(correct, dtype=float)), (self._asked, None)):
            held.append(np.bincount(self._rows, weight, minlength=self.n).astype(float))
        return len(self._correct) - 1

    def accuracies(self, weights: np.ndarray) -> np.ndarray:
        """(W, M) accuracy of each probe with texts counted as often as ``weights`` (W, N) say."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ np.stack(self._correct, 1)) / (weights @ np.stack(self._asked, 1))


class Scored(Answers):
    """The scores of sae-probes' binary probes on one data set's test texts, which stand in an order of their own."""

    def __init__(self, texts: list[str], labels: np.ndarray):
        super().__init__({str(label): [text for text, own in zip(texts, labels, strict=True) if own == label]
                          for label in np.unique(labels)})
        self._places, self._labels = np.array([self.number[text] for text in texts]), np.asarray(labels) == 1
        self._held: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def scored(self, name: str, predicted: np.ndarray, scores: np.ndarray) -> None:
        """Note what probe ``name`` says of each test text: its class (n,), and a score (n,) that is higher for class 1.
        """
        self._held[name] = np.asarray(predicted) == 1, np.asarray(scores)

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(W,) accuracy, AUC and F1 of each probe with texts counted as often as ``weights`` (W, N) say.

        They are scikit-learn's, with sample weights; F1 is the mean of both classes', weighted by their size.
        """
        found, rows = {}, weights[:, self._places]
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, (predicted, scores) in self._held.items():
                found[f"{name}_test_accuracy"] = rows @ (predicted == self._labels) / rows.sum(1)
                found[f"{name}_test_auc"] = _auc(rows, self._labels, scores)
                found[f"{name}_test_f1"] = sum(
                    rows @ own * 2 * (rows @ (own & said)) / np.maximum(rows @ own + rows @ said, 1e-12)
                    for own, said in ((self._labels, predicted), (~self._labels, ~predicted))) / rows.sum(1)
        return found


def _auc(weights: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(W,) share of pairs of the two classes in which class 1 has the higher score; of ties, half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    own, other = (np.add.reduceat(weights[:, order] * of[order], starts, axis=1) for of in (labels, ~labels))
    return (own * (other.cumsum(1) - other / 2)).sum(1) / (own.sum(1) * other.sum(1))


@contextlib.contextmanager
def listening(answers: Answers, test: dict[str, Tensor]) -> Iterator[None]:
    """While SAEBench trains sparse probes: their answers on the activations ``test``, by class, are noted."""
    from sae_bench.evals.sparse_probing import probe_training as own

    def prepare(acts, *args, **options):
        real = before.prepare_probe_data
        return answers.preparing(real, acts, *args, **options) if acts is test else real(acts, *args, **options)

    def by_sklearn(train_x, train_y, test_x, test_y, **options):
        probe, accuracy = before.train_sklearn_probe(train_x, train_y, test_x, test_y, **options)
        answers.answered(probe.predict(test_x.float().cpu().numpy()) == test_y.cpu().numpy())
        return probe, accuracy

    def by_torch(train_x, train_y, test_x, test_y, **options):
        probe, accuracy = before.train_probe_gpu(train_x, train_y, test_x, test_y, **options)
        answers.answered(right(probe, test_x, test_y, options["batch_size"]))
        return probe, accuracy

    names = {"prepare_probe_data": prepare, "train_sklearn_probe": by_sklearn, "train_probe_gpu": by_torch}
    before = SimpleNamespace(**{name: getattr(own, name) for name in names})
    with in_place(own, **names):
        yield


def right(probe, inputs: Tensor, labels: Tensor, batch: int) -> Tensor:
    """(n,) whether SAEBench's own probe puts each row in its class; in batches, as there."""
    with torch.no_grad():
        found = [(probe(inputs[i:i + batch]) > 0.0).long() == labels[i:i + batch] for i in range(0, len(labels), batch)]
    return torch.cat(found).cpu()


Figures = Callable[[np.ndarray], dict[str, np.ndarray]]
"""What SAEBench makes of accuracies (W, M): (W,) values of each metric."""


def point(parts: list[tuple[Answers, Figures]]) -> dict[str, float]:
    """Each metric, the mean over data sets, with every text counted once: SAEBench's own value."""
    found = means([figures(answers.accuracies(np.ones((1, answers.n)))) for answers, figures in parts])
    return {name: float(values[0]) for name, values in found.items()}


def within(parts: list[tuple[Answers, Figures]]) -> dict[str, object]:
    """A report's ``within_this_sae`` for the means over data sets, whose texts are drawn one by one."""
    return intervals.within(BY, means([
        intervals.spread(answers.n, lambda weights, a=answers, f=figures: f(a.accuracies(weights)),
                         strata=answers.strata, seed=number) for number, (answers, figures) in enumerate(parts)]))


def means(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over the data sets that have a metric, draw by draw, as SAEBench averages; NaN where none has."""
    means = {}
    for name in dict.fromkeys(name for one in found for name in one):
        held = np.stack([one[name] for one in found if name in one])
        known = np.isfinite(held)
        with np.errstate(invalid="ignore"):
            means[name] = np.where(known, held, 0).sum(0) / known.sum(0)
    return means
