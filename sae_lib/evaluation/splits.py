"""How a letter's feature is split: its latents beside the probe and each other, the words that it loses, wider SAEs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from sae_lib import runs
from sae_lib.evaluation.latents import Latents
from sae_lib.evaluation.letters import PROBES


class Splits(NamedTuple):
    """What 04 left in a run's folder."""

    run: runs.Run
    letters: pd.DataFrame
    words: pd.DataFrame


class Split(NamedTuple):
    """One letter of one seed."""

    latents: np.ndarray
    """(n,) in the order in which the sparse probe takes them."""
    f1: np.ndarray
    """(n,) of the probe with so many of them."""
    count: int
    """How many are split latents: one more raised F1 by over 0.03."""
    probe_f1: float
    probe_cosine: np.ndarray
    """(n,) of their decoder rows with the model's own probe; NaN where it was not kept."""
    cosines: np.ndarray
    """(n, n) of their decoder rows."""


def read(run: runs.Run) -> Splits:
    """The letters' and words' tables. Raises RunError where 04 did not run, or could measure nothing."""
    try:
        found = [runs.read_table(run.path / f"evals/absorption_{name}.parquet") for name in ("letters", "words")]
    except runs.RunError:
        raise runs.RunError(f"run '{run.name}': no letters in {run.path / 'evals'}; run 04_letter_absorption, which "
                            "measures no SAE whose weights are not finite") from None
    if not found[0].f1_by_k.notna().any():
        why = "; ".join(dict.fromkeys(text for text in found[0].reason if text))
        raise runs.RunError(f"run '{run.name}': no letter was probed ({why[:120]})")
    return Splits(run, *found)


def split(found: Splits, letter: str, seed: int, rows: torch.Tensor) -> Split:
    """A letter's latents; ``rows`` (F, D) are unit decoder rows. Raises RunError for a letter that was not probed."""
    own = found.letters[(found.letters.letter == letter) & (found.letters.seed == seed)]
    if own.empty or not isinstance(own.f1_by_k.iloc[0], (list, np.ndarray)):
        reason = own.reason.iloc[0] if len(own) else "it is no letter of this seed"
        raise runs.RunError(f"letter '{letter}' was not probed: {reason}")
    row = own.iloc[0]
    latents = np.array(list(dict.fromkeys(n for taken in row.latents_by_k for n in taken)))
    chosen = rows[torch.from_numpy(latents)]
    probe = _probe(found.run, seed, letter)
    cosine = np.full(len(latents), np.nan)
    if probe is not None and len(probe) == rows.shape[1]:
        cosine = (chosen @ torch.nn.functional.normalize(probe, dim=0)).numpy()
    return Split(latents, np.array(list(row.f1_by_k)), len(row.split_latents), float(row.probe_f1), cosine,
                 (chosen @ chosen.T).numpy())


def _probe(run: runs.Run, seed: int, letter: str) -> torch.Tensor | None:
    try:
        with safe_open(run.path / "evals" / PROBES, "pt") as held:
            return held.get_tensor(f"seed{seed}.{letter}")
    except (OSError, SafetensorError):
        return None


def silent_words(found: Splits, letter: str, seed: int) -> pd.DataFrame:
    """Words of a letter on which its main latent is silent: the word, what carries the letter instead, how far.

    ``latent`` projects most of the letter; ``absorbed`` says whether SAEBench counts the word as fully absorbed.
    """
    own = found.words[(found.words.letter == letter) & (found.words.seed == seed)]
    own = own[np.array([len(acts) > 0 and acts[0] == 0 for acts in own.split_activations], dtype=bool)]
    return pd.DataFrame({"word": own.word.str.strip(), "latent": own.top_latent.astype(int),
                         "cosine with the probe": own.top_cosine.astype(float),
                         "projection": own.top_projection.astype(float),
                         "absorbed": np.where(own.full_absorption.fillna(False).astype(bool), "yes", "no"),
                         "other split latents": [" ".join(str(n) for n, act in zip(ids, acts) if act > 0) or "silent"
                                                 for ids, acts in zip(own.split_latents, own.split_activations)]},
                        ).sort_values(["absorbed", "latent", "word"], ascending=[False, True, True])


def in_another(latent: int, rows: torch.Tensor, held: Latents, other_rows: torch.Tensor, other: Latents,
               count: int = 8) -> tuple[pd.DataFrame, float | None]:
    """A latent's nearest in another SAE of the same model: cosine, and where the two fire, if over the same tokens.

    ``covers`` is the share of the latent's tokens on which the other fires, ``within`` the share of the other's tokens
    on which the latent does; the number is the share of the latent's tokens on which any of them fires.
    Raises RunError where the widths of the model differ.
    """
    if rows.shape[1] != other_rows.shape[1]:
        raise runs.RunError(f"decoder rows have {rows.shape[1]} and {other_rows.shape[1]} dimensions: not of one model")
    cosines = (other_rows @ rows[latent]).numpy()
    best = np.argsort(-cosines, kind="stable")[:count]
    table = pd.DataFrame({"latent": best, "cosine": cosines[best], "covers": np.nan, "within": np.nan})
    places = ["document", "block", "position"]
    if len(held.tokens) != len(other.tokens) or not (held.tokens[places].to_numpy() ==
                                                     other.tokens[places].to_numpy()).all():
        return table, None
    own = held.codes[:, [latent]].toarray().ravel() > 0
    theirs = other.codes[:, best].toarray() > 0
    both = (theirs & own[:, None]).sum(0)
    table["covers"] = both / max(own.sum(), 1)
    table["within"] = both / np.maximum(theirs.sum(0), 1)
    return table, float((theirs.any(1) & own).sum() / max(own.sum(), 1))
