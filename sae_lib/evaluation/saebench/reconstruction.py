"""Cross-entropy and KL with an SAE in place, without the plain model's logits: SAEBench core's slowest part.

SAEBench compares three (B, T, V) tensors of logits. Logits are linear in the stream h before the unembedding, W_U, so

    KL(p || q) = sum_v p_v (l^p_v - l^q_v) + lse(l^q) - lse(l^p) = m . (h_p - h_q) + lse(l^q) - lse(l^p),

with m = sum_v p_v W_U[:, v] a vector of the model's alone. What the model gives alone is kept for the next SAE, whose
logits are met a few rows at a time. Equal to SAEBench's ``get_recons_loss`` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae_lib.evaluation.rerun import Rerun

CHUNK = 2**26
"""Logits that are held at once, about: 256 MB."""
ALONE = ("mean", "lse", "loss", "ablated lse", "ablated loss", "ablated kl")


def applies(model: Rerun, dtype: str) -> bool:
    """Whether logits are linear in the stream, and precise enough for their order of summation not to matter."""
    return dtype == "float32" and model.cfg.output_logits_soft_cap <= 0


def recons_loss(model: Rerun) -> Callable:
    """A function in place of SAEBench's ``get_recons_loss``: the same values per token, (B, T) or (B, T - 1)."""
    @torch.no_grad()
    def get_recons_loss(sae, _model, batch_tokens: Tensor, _store, compute_kl: bool, compute_ce_loss: bool,
                        ignore_tokens=frozenset(), exclude_special_tokens_from_reconstruction: bool = False,
                        model_kwargs=None) -> dict[str, Tensor]:
        """As SAEBench's, of the batch ``batch_tokens`` (B, T); ``exclude_special...`` leaves ignored tokens alone."""
        x, final = model.streams(batch_tokens)
        mean, lse, loss, _, ablated_loss, ablated_kl = model.once(
            batch_tokens, ALONE, lambda: _alone(model, batch_tokens, x, final))
        x_hat = sae.decode(sae.encode(x)).to(x.dtype)
        if ignore_tokens and exclude_special_tokens_from_reconstruction:
            special = torch.tensor([token for token in ignore_tokens if token is not None], device=x.device)
            x_hat = torch.where(torch.isin(batch_tokens, special)[..., None], x, x_hat)
        changed = model.changed(x_hat).expand_as(final)
        sae_lse, sae_loss, _ = _by_token(model, changed, batch_tokens)
        found = {}
        if compute_kl:
            found |= {"kl_div_with_sae": _kl(mean, lse, final, sae_lse, changed), "kl_div_with_ablation": ablated_kl}
        if compute_ce_loss:
            found |= {"ce_loss_with_sae": sae_loss, "ce_loss_without_sae": loss, "ce_loss_with_ablation": ablated_loss}
        return found
    return get_recons_loss


def _alone(model: Rerun, tokens: Tensor, x: Tensor, final: Tensor) -> tuple[Tensor, ...]:
    """ALONE of a batch: the plain model, and the model with the activation removed."""
    lse, loss, mean = _by_token(model, final, tokens, mean=True)
    removed = model.changed(torch.zeros_like(x))  # (1, T, D)
    ablated_lse, ablated_loss, _ = _over_vocabulary(model, removed[0], _following(tokens).T)
    return (mean, lse, loss, ablated_lse[None], ablated_loss.T[:, :-1].contiguous(),
            _kl(mean, lse, final, ablated_lse[None], removed))


def _kl(mean: Tensor, lse: Tensor, final: Tensor, other_lse: Tensor, other: Tensor) -> Tensor:
    """(B, T) KL divergence of the plain model from one whose last stream is ``other`` (B, T, D)."""
    moved = (mean.double() * (final.double() - other.double())).sum(-1)
    return (moved + other_lse.double() - lse.double()).to(final.dtype)


def _over_vocabulary(model: Rerun, rows: Tensor, targets: Tensor, mean: bool = False):
    """Of streams (R, D): log-sum-exp of the logits (R,), losses (R, K) of ``targets`` (R, K), mean unembedding or None.

    The mean unembedding is (R, D).
    """
    size, parts = max(1, CHUNK // model.cfg.d_vocab), []
    for part, target in zip(rows.split(size), targets.split(size)):
        logits = model.unembed(part[None])[0]
        lse = logits.logsumexp(-1)
        loss = lse[:, None] - logits.gather(1, target)
        parts.append((lse, loss, (logits - lse[:, None]).exp_() @ model.W_U.T if mean else lse))
    lse, losses, means = (torch.cat(some) for some in zip(*parts))
    return lse, losses, means if mean else None


def _by_token(model: Rerun, final: Tensor, tokens: Tensor, mean: bool = False):
    """Of streams (B, T, D): log-sum-exp (B, T), loss of predicting the next token (B, T - 1), mean unembedding."""
    lse, losses, means = _over_vocabulary(model, final.flatten(0, 1), _following(tokens).reshape(-1, 1), mean)
    return (lse.view(tokens.shape), losses.view(tokens.shape)[:, :-1].contiguous(),
            means.view(final.shape) if mean else None)


def _following(tokens: Tensor) -> Tensor:
    """The token after each (B, T); the last has none, and what is said of it is cut off."""
    return torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
