"""The settings that the studies' records report, as presets of an evaluation: read from the records, never copied.

Study 1 is ``reported_000``, study 2 ``reported_001``, after the places of their first records; the unlearning of the
two differs. The data are SAEBench's own, of the hub; what is not as reported, each report says
(``config.not_as_reported``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sae_lib import params
from sae_lib.evaluation.reported.records import MODEL, read
from sae_lib.params import ParameterError

PRESETS = {"reported_000": "progressive-orthogonality", "reported_001": "temporal-coactivation"}
"""Preset: the study whose records hold its settings."""
HERE = ("model_name", "llm_dtype", "llm_batch_size", "sae_batch_size")
"""Settings that the model and the machine at hand decide: they are compared with the record, and not taken from it."""


def of(preset: str, evaluation: str) -> dict[str, Any]:
    """The ``eval_config`` that the preset's study reports of an evaluation, by SAEBench's name.

    Raises ParameterError where its records hold none, or several that differ.
    """
    study = PRESETS[preset]
    held = [record.settings for record in read().records if record.study == study]
    found = [settings[evaluation] for settings in held if evaluation in settings]
    if not found or any(one != found[0] for one in found):
        known = sorted({name for settings in held for name in settings})
        what = "several configurations" if found else "no configuration"
        raise ParameterError(f"eval_preset: '{preset}': the records of {study} hold {what} of {evaluation}; they hold "
                             f"one of {', '.join(known)}. Choose smoke, default or paper for it")
    return found[0]


def chosen(preset: str, presets: dict[str, Any], evaluation: str, lm, make: Callable[[dict[str, Any]], Any]) -> Any:
    """The preset of ``presets`` by name, or what ``make`` makes of reported settings.

    Raises ParameterError for an unknown name, and for a reported preset with another model than its own: on other
    texts and another model the same numbers would not be those settings.
    """
    if preset not in PRESETS:
        if preset not in presets:
            raise ParameterError(f"eval_preset: '{preset}' is not known; known are {', '.join([*presets, *PRESETS])}")
        return presets[preset]
    settings = of(preset, evaluation)
    kind = type(lm.hf).__name__
    fits = kind == "Gemma2ForCausalLM" if lm.name != "tiny" and params.local_path(lm.name) else lm.name in (
        settings["model_name"], MODEL)
    if not fits:
        raise ParameterError(f"eval_preset: '{preset}' is what was run on {settings['model_name']}; model '{lm.name}' "
                             f"({kind}) is another. Evaluate that model (or a local folder of it), or choose paper")
    return make(settings)


def given(settings: dict[str, Any], *, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings as keywords of SAEBench's configuration, without those of ``HERE`` and ``but``."""
    return {key: value for key, value in settings.items() if key not in HERE + but}


def differences(preset: str, evaluation: str, raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For SAEBench's own JSON: each setting that is not the reported one, as it was reported and as it is here."""
    if preset not in PRESETS:
        return {}
    found = raw["eval_config"]
    return {key: {"reported": value, "here": found.get(key)} for key, value in of(preset, evaluation).items()
            if found.get(key) != value}


def dtype(preset: str) -> str:
    """The model's precision in an evaluation: the reported one, else float32."""
    return of(preset, "sparse_probing")["llm_dtype"] if preset in PRESETS else "float32"
