"""Pair statistics in plain F x F matrices: the reference, and what the packed form is measured against.

One step of windowed co-activation (study 2). With n_ij the tokens of the open window on which latents i and j are both
active and t its tokens, c_ij = n_ij / t. A window closes after exactly ``window`` tokens, also inside a batch, and then
c_avg <- (1 - alpha) c_avg + alpha c with alpha_ij = min(0.1, n_ij / 1000), n_ij > 0; and n is set to 0.
The weights of a step are read as the last window that closes in its batch is full, before its reset; where none closes,
from the open window with all of the batch in it: w_ij = c_ij (1 + gamma |c_ij - c_avg_ij| / max(c_ij, c_avg_ij)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.training.coactivation.rule import ALPHA_LIMIT, ALPHA_SCALE, Rule


class DensePairs:
    """The state of the windows and a step's weights, on (B, F) latents; float32 matrices of 4 F^2 bytes each."""

    def __init__(self, n_latents: int, rule: Rule, device: str | torch.device = "cpu", dtype=torch.float32):
        self.rule, self.tokens, self.windows = rule, 0, 0
        self.counts = torch.zeros(n_latents, n_latents, dtype=dtype, device=device)
        self.average = torch.zeros_like(self.counts)
        self.stability: Tensor | None = None
        """(F,) at the last closing: mean over partners of 1 - |c - c_avg| / max, weighted by their count."""

    def weights(self, latents: Tensor) -> Tensor:
        """Count the tokens of (B, F) latents and give the step's weights (F, F); no gradient."""
        rule, mask = self.rule, (latents.detach() > 0).to(self.counts.dtype)
        read, start = None, 0
        if rule.after_reset:
            return self._weights_after_reset(mask)
        while start < len(mask):
            end = min(len(mask), start + rule.window - self.tokens)
            self.counts += mask[start:end].T @ mask[start:end]
            self.tokens += end - start
            if self.tokens == rule.window:
                read = self._read()
                self._close()
            start = end
        return self._read() if read is None else read

    def _weights_after_reset(self, mask: Tensor) -> Tensor:
        """The study's code: windows close at a batch's end alone, and are reset before the weights are read."""
        batch = mask.T @ mask
        self.counts += batch
        self.tokens += len(mask)
        if self.tokens < self.rule.window:
            return self._read()
        self._close()
        return batch / len(mask)

    def _read(self) -> Tensor:
        share = self.counts / self.tokens
        largest = torch.maximum(share, self.average)
        return share * (1 + self.rule.gamma * (share - self.average).abs() / largest.clamp_min(1e-30))

    def _close(self) -> None:
        rule, seen = self.rule, self.counts > 0
        share = self.counts / self.tokens
        change = (share - self.average).abs() / torch.maximum(share, self.average).clamp_min(1e-30)
        known = self.counts.clone().fill_diagonal_(0)
        self.stability = ((1 - change) * known).sum(1) / known.sum(1).clamp_min(1e-30)
        if rule.latent_rate:
            rate = (self.counts.diagonal() / self.tokens / ALPHA_SCALE).clamp_max(ALPHA_LIMIT)
            alpha = (rate[:, None] + rate[None]) / 2
        else:
            alpha = (self.counts / ALPHA_SCALE).clamp_max(ALPHA_LIMIT)
        alpha = torch.where(seen, alpha, torch.full_like(alpha, 1 / ALPHA_SCALE if rule.decay_absent else 0.0))
        self.average += alpha * (share - self.average)
        self.counts.zero_()
        self.tokens, self.windows = 0, self.windows + 1


def consecutive_weights(latents: Tensor, follows: Tensor, beta: float) -> Tensor:
    """Run 0's weights (F, F): intersections of the batch's masks times (1 + beta * consecutive score), per token.

    The score of a pair is the share of its co-activations whose token before co-activates it too; ``follows`` (B,) bool
    says where the row before is the token before. w = (n + beta m) / B, m the consecutive co-activations.
    """
    mask = (latents.detach() > 0).to(latents.dtype)
    both = mask[1:] * mask[:-1] * follows[1:, None].to(mask.dtype)
    return (mask.T @ mask + beta * both.T @ both) / len(mask)


def pair_term(weights: Tensor, latents: Tensor, power: int, diagonal: bool) -> Tensor:
    """sum over i != j (or all) of w_ij |G_ij|^power, G = f^T f / B for (B, F) latents; differentiable in them."""
    gram = latents.T @ latents / len(latents)
    weights = weights if diagonal else weights.clone().fill_diagonal_(0)
    return (weights * gram.abs().pow(power)).sum()
