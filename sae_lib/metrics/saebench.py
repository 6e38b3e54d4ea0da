"""What SAEBench's core and first-letter absorption report.

Names that are ours for something else (explained variance, squared error, L0) are SAEBench's under ``core/``.
"""

from __future__ import annotations

from math import inf

from sae_lib.metrics.metric import Metric, listed

VERSION = "sae-bench 0.6.0"
EARLY = "sae-bench before 0.4.1"
CORE, ABSORPTION = "SAEBench core", "SAEBench absorption"
DEAD = "a dead SAE"


def _core(name: str, label: str, direction: int, unit: str, formula: str, lowest: float = 0.0, highest: float = 1.0,
          trivial: float | None = None, by: str = "", of_model: bool = False, version: str = VERSION) -> Metric:
    return Metric(name, label, direction, unit, CORE, version, formula, lowest, highest, trivial, by, of_model)


def _absorption(name: str, label: str, unit: str, formula: str, *ends: float, version: str = VERSION,
                source: str = ABSORPTION) -> Metric:
    return Metric(name, label, -1, unit, source, version, formula, *ends, f"{DEAD} (no score)")


def _planted(name: str, label: str, formula: str) -> Metric:
    """SAEBench's absorption with parents of a planted world for letters, and rows for words."""
    return _absorption(f"saebench_{name}", label, "share of rows", formula, 0, 1, 0,
                       source=f"{ABSORPTION}, on planted parents")


METRICS = listed(
    _core("ce_loss_score", "Cross-entropy recovered", 1, "share",
          "(CE ablated - CE with SAE) / (CE ablated - CE without SAE)", -inf, inf, 0,
          "a reconstruction as bad as none"),
    _core("kl_div_score", "KL recovered", 1, "share", "(KL ablated - KL with SAE) / KL ablated", -inf, 1, 0,
          "a reconstruction as bad as none"),
    _core("kl_div_with_sae", "KL divergence", -1, "nats per token",
          "KL(model || model with the reconstruction in place)", 0, inf),
    _core("cossim", "Cosine similarity", 1, "cosine", "mean cos(x, x_hat); no number where x_hat is 0", -1, 1),
    _core("frac_alive", "Alive latents", 1, "share of latents", "latents that fire on evaluated tokens", 0, 1, 0, DEAD),
    _core("l2_ratio", "L2 ratio", 0, "ratio", "mean |x_hat| / |x|", 0, inf, 0, DEAD),
    _core("kl_div_with_ablation", "KL divergence, ablated", 0, "nats per token",
          "KL(model || model with the activation at 0)", 0, inf, of_model=True),
    _core("ce_loss_with_sae", "Cross-entropy with SAE", -1, "nats per token",
          "cross-entropy with the reconstruction in place", 0, inf),
    _core("ce_loss_with_ablation", "Cross-entropy, ablated", 0, "nats per token",
          "cross-entropy with the activation at 0", 0, inf, of_model=True),
    _core("ce_loss_without_sae", "Cross-entropy without SAE", 0, "nats per token",
          "the model's own cross-entropy", 0, inf, of_model=True),
    _core("core/explained_variance", "Explained variance (SAEBench)", 1, "share",
          "mean over tokens of 1 - |x - x_hat|^2 / |x - mean of the batch|^2, as early versions have it; an output of "
          "0 is below 0, without a floor", -inf, 1, 0, "predicting the mean", version="sae-bench before 0.6.0"),
    _core("explained_variance_legacy", "Explained variance (SAEBench, legacy)", 1, "share",
          "mean over tokens of 1 - |x - x_hat|^2 / |x - mean of the batch|^2", -inf, 1, 0, "predicting the mean"),
    _core("core/mse", "Squared error (SAEBench)", -1, "squared activation per token, over tokens of a batch",
          "mean of |x - x_hat|^2 / tokens of a batch: depends on the batch's size and the activations' scale", 0, inf),
    _core("core/l0", "L0 (SAEBench)", 0, "active latents per token",
          "mean over evaluated tokens of |{i: f_i != 0}|: a count, and no share of zeros", 0, inf, 0, DEAD),
    _core("l1", "L1", 0, "summed activations per token", "mean over tokens of sum_i f_i", 0, inf, 0, DEAD),
    _core("l2_norm_in", "Norm of inputs", 0, "activation", "mean |x|", 0, inf, of_model=True),
    _core("l2_norm_out", "Norm of reconstructions", 0, "activation", "mean |x_hat|", 0, inf, 0, DEAD),
    _core("relative_reconstruction_bias", "Relative reconstruction bias", 0, "ratio",
          "mean |x_hat|^2 / mean x . x_hat; 1 is unbiased (arXiv 2404.16014, equation 10)", -inf, inf),
    *(_core(f"freq_over_{percent}_percent", f"Latents firing on over {percent} % of tokens", 0, "share of latents",
            f"latents of density > {percent / 100:g}", 0, 1, 0, DEAD) for percent in (1, 10)),
    *(_core(f"normalized_freq_over_{percent}_percent", f"Firing by latents over {percent} %", 0, "share of firing",
            f"densities > {percent / 100:g} summed, over the sum of all", 0, 1, 0, DEAD) for percent in (1, 10)),
    *(_core(f"average_max_{side}_cosine_sim", f"Nearest {side} cosine", 0, "cosine",
            f"mean over latents of the largest cosine with another's {side} weights", -1, 1)
      for side in ("encoder", "decoder")),
    *(_core(f"total_tokens_eval_{part}", f"Tokens evaluated ({words})", 0, "tokens", "how many were read", 0, inf,
            of_model=True)
      for part, words in (("reconstruction", "model"), ("sparsity_variance", "hook"))),
    _absorption("mean_full_absorption_score", "Full absorption", "share of words that the probe knows",
                "mean over letters; words where no split latent fires and one other latent, of cosine >= 0.025 with "
                "the letter's probe, carries >= 0.4 of the activation's projection on it", 0, 1, 0),
    _absorption("mean_absorption_fraction_score", "Absorption fraction", "share of projection",
                "mean over letters and words of a / (a + s): projections on the probe of up to three absorbers "
                "(cosine >= 0.1) and of the split latents; 0 where absorbers carry under 0.4 of the activation's",
                0, 1, 0),
    _absorption("mean_num_split_features", "Split latents", "latents per letter",
                "mean over letters; latents of a sparse probe while one more raises its F1 by more than 0.03", 1, inf,
                1),
    _absorption("mean_absorption_score", "Absorption (early SAEBench)", "share of words that the probe knows",
                "mean over letters of absorbed words / the probe's true positives; another metric than the fraction "
                "and the full absorption of later versions", 0, 1, 0, version=EARLY),
    _planted("full_absorption", "Full absorption of parents",
             "mean over parents; as full absorption, of the rows where the parent fires and its probe says so"),
    _planted("full_absorption_with_child", "Full absorption of parents, a child firing",
             "the same, of those rows where a child fires too"),
    _planted("absorption_fraction", "Absorption fraction of parents", "as the absorption fraction, mean over parents"),
)
