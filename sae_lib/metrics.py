"""Every metric by name: direction, unit, source and formula; the ones that are ours are defined here, once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """What a reader must know before comparing two figures."""

    name: str
    """Key in the JSON files and tables."""
    label: str
    """Name on axes and in tables."""
    direction: int
    """+1: higher is better; -1: lower is better; 0: neither, to be matched or read."""
    unit: str
    source: str
    formula: str

    @property
    def reading(self) -> str:
        """The direction in words."""
        return {1: "higher is better", -1: "lower is better", 0: "no direction"}[self.direction]


METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("explained_variance", "Explained variance", 1, "share", "this workbook, held-out rows",
           "1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2; predicting the mean scores 0"),
    Metric("mse", "Squared error", -1, "squared activation per token, E|x|^2 = d_in", "this workbook, held-out rows",
           "mean over tokens of |s (x - x_hat)|^2, s the store's scale"),
    Metric("l0", "L0", 0, "active latents per token", "this workbook, held-out rows",
           "mean over tokens of |{i: f_i > 0}|"),
    Metric("dead_share", "Dead latents", -1, "share of latents", "the trainer's counters",
           "of the latents that may fire, those that did not in the last 1 M training samples (in all, if fewer)"),
    Metric("idle_share", "Idle latents", 0, "share of latents", "the trainer",
           "latents that an ingredient keeps from firing (pruned, masked); dead latents are counted without them"),
    Metric("unused_share", "Unused latents", -1, "share of latents", "this workbook, held-out rows",
           "latents that fire on no held-out token"),
    Metric("norm_ratio", "Norm ratio", 0, "ratio", "this workbook, held-out rows", "mean |x_hat| / |x|"),
    Metric("mean_cos2", "Mean squared decoder cosine", -1, "cosine squared", "this workbook, weights",
           "mean over pairs i != j of cos^2(W_dec_i, W_dec_j)"),
    Metric("ce_loss_score", "Cross-entropy recovered", 1, "share", "SAEBench core",
           "(CE ablated - CE with SAE) / (CE ablated - CE without SAE)"),
    Metric("loss_recovered", "Loss recovered", 1, "share", "this workbook, held-out text",
           "as SAEBench's: (CE ablated - CE with the latents kept) / (CE ablated - CE without SAE); ablated: the "
           "activation is 0 everywhere; BOS, EOS and padding stay as they are"),
    Metric("bound_tightness", "Tightness of the bound", 0, "ratio", "this workbook, held-out rows",
           "|x - x_hat'| / (|x - x_hat| + sum_i |f_i - f'_i|); 1 is tight, and above 1 the bound does not hold"),
    Metric("kl_div_score", "KL recovered", 1, "share", "SAEBench core", "(KL ablated - KL with SAE) / KL ablated"),
    Metric("kl_div_with_sae", "KL divergence", -1, "nats per token", "SAEBench core",
           "KL(model || model with the reconstruction in place)"),
    Metric("cossim", "Cosine similarity", 1, "cosine", "SAEBench core", "mean cos(x, x_hat)"),
    Metric("frac_alive", "Alive latents", 1, "share of latents", "SAEBench core",
           "latents that fire on evaluated tokens"),
    Metric("l2_ratio", "L2 ratio", 0, "ratio", "SAEBench core", "mean |x_hat| / |x|"),
    Metric("mean_full_absorption_score", "Full absorption", -1, "share of words that the probe knows",
           "SAEBench absorption", "mean over letters; words where no split latent fires and one other latent, of "
           "cosine >= 0.025 with the letter's probe, carries >= 0.4 of the activation's projection on it"),
    Metric("mean_absorption_fraction_score", "Absorption fraction", -1, "share of projection", "SAEBench absorption",
           "mean over letters and words of a / (a + s): projections on the probe of up to three absorbers (cosine >= "
           "0.1) and of the split latents; 0 where absorbers carry under 0.4 of the activation's"),
    Metric("mean_num_split_features", "Split latents", -1, "latents per letter", "SAEBench absorption",
           "mean over letters; latents of a sparse probe while one more raises its F1 by more than 0.03"),
    Metric("mcc", "Mean correlation coefficient", 1, "|cosine|", "this workbook, planted features",
           "mean over true features of |cos| with the decoder row matched one to one (Hungarian); 0 without one"),
    Metric("recovered", "Features recovered", 1, "share of features", "this workbook, planted features",
           "true features whose nearest decoder row has a cosine of at least 0.9"),
    Metric("true_absorption", "True absorption", -1, "share of rows", "this workbook, planted features",
           "mean over parents; of held-out rows where parent and child fire, those where the parent's latent is silent "
           "and a firing child's carries at least 0.4 of the parent's strength along its true direction"),
)}


def explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """Share of the variance that a reconstruction explains: 1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2.

    ``x`` and ``x_hat`` are (N, D). The mean predictor scores 0, a worse one below 0. Sums are in float64.
    """
    x, x_hat = x.double(), x_hat.double()
    return 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def mean_cos2(rows: Tensor, block: int = 2048) -> float:
    """Mean over pairs i != j of cos^2 of ``rows`` (F, D), exact and blocked: never an F x F matrix.

    Uses sum_ij cos_ij^2 = ||U^T U||_F^2 with U the unit rows (D x D instead of F x F where D is smaller).
    """
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
