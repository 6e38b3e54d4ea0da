"""The workbook's own metrics: what they are, and the two that are computed here for all rooms."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import numpy as np

from sae_lib import __version__
from sae_lib.metrics.metric import Metric, listed

if TYPE_CHECKING:  # a table of metrics has no use for torch
    from torch import Tensor

VERSION = f"sae-workbook {__version__}"
HELD_OUT, TRAINER = "this workbook, held-out rows", "the trainer"
PLANTED = "this workbook, planted features"

METRICS = listed(
    Metric("explained_variance", "Explained variance", 1, "share", HELD_OUT, VERSION,
           "1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2; worse than the mean is below 0, without a floor",
           -inf, 1, 0, "predicting the mean"),
    Metric("mse", "Squared error", -1, "squared activation per token, E|x|^2 = d_in", HELD_OUT, VERSION,
           "mean over tokens of |s (x - x_hat)|^2, s the store's scale", 0, inf, None,
           "an SAE whose output is 0 scores d_in"),
    Metric("l0", "L0", 0, "active latents per token", HELD_OUT, VERSION,
           "mean over tokens of |{i: f_i > 0}|: a count, and no share of zeros", 0, inf, 0, "a dead SAE"),
    Metric("dead_share", "Dead latents", -1, "share of latents", "the trainer's counters", VERSION,
           "of the latents that may fire, those that did not in the last 1 M training samples (in all, if fewer)"),
    Metric("idle_share", "Idle latents", 0, "share of latents", TRAINER, VERSION,
           "latents that an ingredient keeps from firing (pruned, masked); dead latents are counted without them"),
    Metric("unused_share", "Unused latents", -1, "share of latents", HELD_OUT, VERSION,
           "latents that fire on no held-out token", 0, 1, 1, "a dead SAE"),
    Metric("norm_ratio", "Norm ratio", 0, "ratio", HELD_OUT, VERSION, "mean |x_hat| / |x|", 0, inf, 0,
           "an SAE whose output is 0"),
    Metric("mean_cos2", "Mean squared decoder cosine", -1, "cosine squared", "this workbook, weights", VERSION,
           "mean over pairs i != j of cos^2(W_dec_i, W_dec_j)", 0, 1, None, "random rows score about 1 / d_in"),
    Metric("seed_stability", "Stability across seeds", 1, "share of latents", "this workbook, decoders of two seeds",
           VERSION, "mean over pairs of seeds of 2 m / (n + n'), of n and n' latents that fire; m: decoder rows "
           "matched one to one (Hungarian; mutual nearest in wide SAEs) of cosine >= 0.7 (arXiv 2501.16615)", 0, 1, 0,
           "random rows"),
    Metric("loss_recovered", "Loss recovered", 1, "share", "this workbook, held-out text", VERSION,
           "as SAEBench's: (CE ablated - CE with the latents kept) / (CE ablated - CE without SAE); ablated: the "
           "activation is 0 everywhere; BOS, EOS and padding stay as they are", -inf, inf, 0,
           "a reconstruction as bad as none"),
    Metric("bound_tightness", "Tightness of the bound", 0, "ratio", HELD_OUT, VERSION,
           "|x - x_hat'| / (|x - x_hat| + sum_i |f_i - f'_i|); 1 is tight, and above 1 the bound does not hold",
           0, inf),
    Metric("mcc", "Mean correlation coefficient", 1, "|cosine|", PLANTED, VERSION,
           "mean over true features of |cos| with the decoder row matched one to one (Hungarian); 0 without one",
           0, 1, None, "random rows score about the largest of d_sae random cosines"),
    Metric("recovered", "Features recovered", 1, "share of features", PLANTED, VERSION,
           "true features whose nearest decoder row has a cosine of at least 0.9", 0, 1, 0, "random rows"),
    Metric("true_absorption", "True absorption", -1, "share of rows", PLANTED, VERSION,
           "mean over parents; of held-out rows where parent and child fire, those where the parent's latent is silent "
           "and a firing child's carries at least 0.4 of the parent's strength along its true direction", 0, 1, None,
           "a dead SAE has none, and no score"),
    Metric("true_absorption_of_parent", "True absorption, of the parent's rows", -1, "share of rows", PLANTED, VERSION,
           "the same rows as a share of all where the parent fires, as SAEBench counts", 0, 1, None,
           "a dead SAE has none, and no score"),
)


def explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """Share of the variance that a reconstruction explains: 1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2.

    ``x`` and ``x_hat`` are (N, D). The mean predictor scores 0, a worse one below 0. Sums are in float64.
    """
    x, x_hat = x.double(), x_hat.double()
    return 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def explained_variance_by_part(x_sum: np.ndarray, squares: np.ndarray, error: np.ndarray, rows: np.ndarray,
                               weights: np.ndarray) -> np.ndarray:
    """Explained variance (W,) of N parts counted as often as ``weights`` (W, N) say, from their moments.

    Of each part: sum of its activations (N, D), of their squared norms (N,), of the squared errors (N,), and how many
    activations (N,). With equal weights it is ``explained_variance`` of all; of no rows, or of equal ones, NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = weights @ squares - np.square(weights @ x_sum).sum(1) / (weights @ rows)
        return 1 - (weights @ error) / variance


def mean_cos2(rows: Tensor, block: int = 2048) -> float:
    """Mean over pairs i != j of cos^2 of ``rows`` (F, D), exact and blocked: never an F x F matrix.

    Uses sum_ij cos_ij^2 = ||U^T U||_F^2 with U the unit rows (D x D instead of F x F where D is smaller).
    """
    import torch

    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    n = len(unit)
    if n < 2:
        return 0.0
    if unit.shape[1] <= block:
        total = (unit.T @ unit).square().sum()
    else:
        total = sum((part @ unit.T).square().sum() for part in unit.split(block))
    diagonal = unit.square().sum(1).square().sum()
    return float((total - diagonal) / (n * (n - 1)))
