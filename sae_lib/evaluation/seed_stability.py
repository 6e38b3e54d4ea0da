"""Do two seeds of a variant find the same latents? Decoder rows of one matched one to one with those of another.

After Paulo and Belrose 2025 (arXiv 2501.16615), where SAEs of one text that differ in their seed alone share a part of
their latents; by decoder rows only, as encoders of some architectures are not rows alone. D wide, F and G latents.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from scipy import special
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lib import params, runs
from sae_lib.data import language_model
from sae_lib.evaluation import matching, results

SAME = 0.7
"""Cosine of two decoder rows from which on they are one latent."""
LARGEST = 4096
"""Latents that are matched by Hungarian; of more, all cosines would have to be held."""
LEVEL = 0.95


class Likeness(NamedTuple):
    """Latents of two SAEs."""

    share: float
    """2 m / (F + G), m pairs matched one to one of a cosine of SAME or more."""
    best: np.ndarray
    """(F + G,) cosine of each latent of either with the nearest of the other."""
    by: str
    """How they were matched."""


class Stability(NamedTuple):
    """One variant over its seeds."""

    variant: str
    seeds: int
    share: float
    """Mean over pairs of seeds (the metric ``seed_stability``)."""
    interval: tuple[float, float] | None
    """Jackknife over seeds, from three seeds on."""
    best: np.ndarray
    """Cosines with the nearest, over all pairs of seeds."""
    random: Likeness
    """The same of random rows, as many and as wide."""
    by: str
    note: str
    """Latents left out, and runs that could not be read."""


def likeness(first: Tensor, second: Tensor) -> Likeness:
    """How alike two dictionaries of unit rows (F, D) and (G, D) are; at most ROWS x G cosines at once over LARGEST.

    Raises RunError where D differs.
    """
    forward, backward = matching.nearest(first, second)
    ahead, back = (first * second[forward]).sum(1), (second * first[backward]).sum(1)
    if max(len(first), len(second)) <= LARGEST:
        cosines = (first @ second.T).cpu().numpy()
        matched, by = cosines[linear_sum_assignment(cosines, maximize=True)], "Hungarian"
    else:
        mutual = backward[forward] == torch.arange(len(first), device=first.device)
        matched, by = ahead[mutual].cpu().numpy(), "mutual nearest"
    share = 2 * float((matched >= SAME).sum()) / max(1, len(first) + len(second))
    return Likeness(share, torch.cat([ahead, back]).clamp(-1, 1).cpu().numpy(), by)


def random_likeness(n_latents: int, d_in: int, device: torch.device | str = "cpu") -> Likeness:
    """The likeness of two dictionaries of random directions (n_latents, d_in)."""
    draw = torch.Generator().manual_seed(0)
    return likeness(*(torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=draw), dim=1).to(device)
                      for _ in range(2)))


def stability(table: pd.DataFrame, baseline: str | None, device: str = "cpu") -> list[Stability]:
    """Every variant of a table of runs that has at least two seeds that are results and compare with their baseline.

    Cosines are computed on ``device`` (cpu, cuda or auto).
    """
    found, random = [], {}
    place = language_model.pick_device(device)
    for variant, held in results.single(table, baseline).groupby("variant", sort=False):
        if len(held) >= 2:
            rows, notes = _decoders(list(held.run))
            if len(rows) >= 2:
                found.append(_of_variant(variant, [one.to(place) for one in rows], notes, random))
    return found


def _of_variant(variant: str, rows: list[Tensor], notes: list[str], random: dict[tuple[int, int], Likeness]):
    pairs = {(i, j): likeness(rows[i], rows[j]) for i, j in itertools.combinations(range(len(rows)), 2)}
    shape = max(len(one) for one in rows), rows[0].shape[1]
    if shape not in random:
        random[shape] = random_likeness(*shape, rows[0].device)
    share, interval = jackknife({pair: one.share for pair, one in pairs.items()}, len(rows))
    return Stability(variant, len(rows), share, interval, np.concatenate([one.best for one in pairs.values()]),
                     random[shape], next(iter(pairs.values())).by, "; ".join(notes))


def jackknife(values: dict[tuple[int, int], float], seeds: int) -> tuple[float, tuple[float, float] | None]:
    """Mean over pairs of seeds, and its t interval by the jackknife over seeds, as pairs of seeds are not independent.

    Variance (n - 1) / n * sum (mean without a seed - their mean)^2 (Tukey 1958), n - 1 degrees of freedom; None for
    fewer than three seeds. Ends are cut to 0 and 1.
    """
    mean = float(np.mean(list(values.values())))
    if seeds < 3:
        return mean, None
    without = np.array([np.mean([value for pair, value in values.items() if seed not in pair])
                        for seed in range(seeds)])
    error = np.sqrt((seeds - 1) / seeds * np.square(without - without.mean()).sum())
    reach = float(special.stdtrit(seeds - 1, (1 + LEVEL) / 2) * error)
    return mean, (max(0.0, mean - reach), min(1.0, mean + reach))


def _decoders(names: list[str]) -> tuple[list[Tensor], list[str]]:
    """Unit decoder rows of each run's latents that fire, and what a reader should know of them."""
    from sae_lib.training.ingredients import load_sae

    rows, notes, silent, all_ = [], [], 0, 0
    for name in names:
        try:
            run = runs.Run(name)
            weights = load_sae(run.path / "sae").W_dec.detach().float()
            fires = _fires(run, len(weights))
        except (runs.RunError, params.ParameterError, SafetensorError, OSError, KeyError, TypeError,
                ValueError) as error:
            notes.append(f"{name} left out: {error}")
            continue
        if fires is None:
            notes.append(f"{name}: not known which latents fire, all are taken")
            fires = torch.ones(len(weights), dtype=torch.bool)
        silent, all_ = silent + int((~fires).sum()), all_ + len(fires)
        rows.append(torch.nn.functional.normalize(weights[fires], dim=1))
    if silent:
        notes.insert(0, f"{silent} of {all_} latents fire on no evaluated token and are left out")
    return [one for one in rows if len(one)], notes


def _fires(run: runs.Run, n_latents: int) -> Tensor | None:
    """(F,) which latents fire on held-out tokens, by what 02 kept or else 03 measured; None without either."""
    file = run.path / "latents/latents.parquet"
    if file.exists():
        counts = runs.read_table(file, ["latent", "firings"]).sort_values("latent").firings.to_numpy()
    else:
        details = run.json("evals/core.json", {}).get("raw", {}).get("eval_result_details") or []
        counts = np.array([one["feature_density"] for one in sorted(details, key=lambda one: one["index"])])
    return torch.from_numpy(counts > 0) if len(counts) == n_latents else None
