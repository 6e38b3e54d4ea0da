"""Distributions that a mean hides: active latents per token, how often latents fire, how well a projection does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sae_lib import params, runs

RAREST = -5.0
"""log10 of the density under which latents are counted together; those that never fire have a bar of their own."""


class Sparsity(NamedTuple):
    """Of one run, on held-out tokens."""

    l0: np.ndarray
    """(largest L0 + 1,) share of the tokens with so many active latents."""
    edges: np.ndarray
    """log10 of density, bins of a third of a decade."""
    density: np.ndarray
    """Share of the latents in each bin."""
    never: float
    """Share of the latents that fire on no token."""


def sparsity(name: str) -> Sparsity | None:
    """Of a run's kept latents; None where it keeps none that can be read."""
    from sae_lib.evaluation import latents  # and torch, which a table is without

    run = runs.Run(name)
    if not (run.path / "latents/about.json").exists():
        return None
    try:
        found = latents.read(run)
    except (runs.RunError, params.ParameterError):
        return None
    tokens, n_latents = found.codes.shape
    counts = np.bincount(np.bincount(found.codes.indices, minlength=tokens))
    fired = np.diff(found.codes.indptr)
    edges = np.arange(RAREST, 1e-9, 1 / 3)
    edges = np.append(edges[edges < -1e-9], 0.0)
    logs = np.log10(np.maximum(fired[fired > 0], 1) / max(1, tokens)).clip(RAREST, 0)
    return Sparsity(counts / max(1, tokens), edges, np.histogram(logs, edges)[0] / max(1, n_latents),
                    float((fired == 0).mean()) if n_latents else 0.0)


def projection(name: str) -> dict[str, Any] | None:
    """What the ingredient jl_similarity measured at the end of a run's training; None where there was none."""
    try:
        report = runs.Run(name).json("training.json", {})
        found = report.get("measured", {}).get("jl_similarity")
        thresholds = [entry["threshold"] for entry in report.get("ingredients", []) if entry["name"] == "contrastive"]
    except (runs.RunError, AttributeError, KeyError, TypeError):
        return None
    if not isinstance(found, dict) or not {"distortion", "cosine_noise", "eps", "dims", "of"} <= set(found):
        return None
    last = thresholds[0]["start"] if thresholds and thresholds[0]["kind"] == "constant" else \
        thresholds[0]["end"] if thresholds else None
    return found | {"threshold": last}
