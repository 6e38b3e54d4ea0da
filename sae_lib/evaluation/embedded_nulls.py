"""Figures of null baselines that come with the workbook: the embedded default's rest on model, text and shape alone.

Measuring them takes as long as evaluating an SAE or two.

``python benchmarks/embedded_nulls.py STUDY`` measures them anew, or with ``--check`` compares some with what is here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from sae_lib import params, runs
from sae_lib.params import digest
from sae_lib.sae.autoencoder import SparseAutoencoder

FILE = Path(__file__).with_name("embedded_nulls.json")
"""Each entry by its key: metrics, note, interval, and the places where it is used."""
SHIPPED = "measured beforehand; it comes with the workbook"


def key(asked: params.Train, name: str, made: SparseAutoencoder, evaluation: str, comparable: str) -> str:
    """Names all that the figure of the null ``name``, ``made`` beside a run of parameters ``asked``, depends on.

    ``comparable`` tells evaluations apart that do not compare. The store's precision is left out: it moves a null's
    figures less than their intervals are wide. Empty for a store from elsewhere, whose text is not known.
    """
    if asked.activations != "auto":
        return ""
    shape = [made.architecture.name, made.architecture.config(), made.d_sae]
    return digest([_text(asked), asked.hook, name, shape, evaluation, comparable], 24)


def _text(asked: params.Train) -> dict[str, Any]:
    """The parameters that a store's rows depend on, but their precision."""
    return {name: getattr(asked, name) for name in params.EXTRACT_INPUTS if name != "dtype"}


def place(asked: params.Train, name: str, evaluation: str, settings: params.Evaluate | params.Letters) -> str:
    """What of a key is known before anything is trained: tells a plan whether the null will have to be measured."""
    shape = [asked.activations, asked.hook, asked.architecture, asked.d_sae, asked.k, asked.target_l0]
    names = ("absorption_preset", "absorption_words_per_letter", "absorption_seeds") if isinstance(
        settings, params.Letters) else ("eval_preset",)
    return digest([_text(asked), shape, name, evaluation, [getattr(settings, one) for one in names]], 24)


def covered(asked: params.Train, name: str, evaluation: str, settings: params.Evaluate | params.Letters) -> bool:
    """Whether the null's figure in core or absorption came with the workbook."""
    return place(asked, name, evaluation, settings) in _places()


def find(entry: str) -> dict[str, Any] | None:
    """The figures of that key; None where none came with the workbook."""
    return _all().get(entry)


@functools.cache
def _all() -> dict[str, dict[str, Any]]:
    return runs.read_json(FILE) if FILE.exists() else {}


@functools.cache
def _places() -> set[str]:
    return {one for entry in _all().values() for one in entry["places"]}
