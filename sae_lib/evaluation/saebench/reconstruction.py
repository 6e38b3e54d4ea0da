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
"""Logits that are held at once, about: 256 MB. With fewer, TransformerLens' copy of W_U at each call tells."""
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
        x, final = model.streams(batch_tokens)
        mean, lse, loss, _, ablated_loss, ablated_kl = model.once(
            batch_tokens, ALONE, lambda: _alone(model, batch_tokens, x, final))
        x_hat = sae.decode(sae.encode(x)).to(x.dtype)
        if ignore_tokens and exclude_special_tokens_from_reconstruction:
            special = torch.tensor([token for token in ignore_tokens if token is not None], device=x.device)
            x_hat = torch.where(torch.isin(batch_tokens, special)[..., None], x, x_hat)
        changed = model.changed(x_hat).expand_as(final)
        sae_lse, sae_loss, _ = _over_vocabulary(model, changed, batch_tokens)
        found = {}
        if compute_kl:
            found |= {"kl_div_with_sae": _kl(mean, lse, final, sae_lse, changed), "kl_div_with_ablation": ablated_kl}
        if compute_ce_loss:
            found |= {"ce_loss_with_sae": sae_loss, "ce_loss_without_sae": loss, "ce_loss_with_ablation": ablated_loss}
        return found
    return get_recons_loss


def _alone(model: Rerun, tokens: Tensor, x: Tensor, final: Tensor) -> tuple[Tensor, ...]:
    """ALONE of a batch: the plain model, and the model with the activation removed."""
    lse, loss, mean = _over_vocabulary(model, final, tokens, mean=True)
    removed = model.changed(torch.zeros_like(x))  # (1, T, D)
    ablated_lse, ablated_loss = _of_one_row(model, removed, tokens)
    return mean, lse, loss, ablated_lse, ablated_loss, _kl(mean, lse, final, ablated_lse, removed)


def _kl(mean: Tensor, lse: Tensor, final: Tensor, other_lse: Tensor, other: Tensor) -> Tensor:
    """(B, T) KL divergence of the plain model from one whose last stream is ``other`` (B, T, D)."""
    moved = (mean.double() * (final.double() - other.double())).sum(-1)
    return (moved + other_lse.double() - lse.double()).to(final.dtype)


def _over_vocabulary(model: Rerun, final: Tensor, tokens: Tensor, mean: bool = False):
    """Of streams (B, T, D): log-sum-exp of the logits (B, T), loss (B, T - 1), and mean unembedding (B, T, D) or None.

    The loss of a token is that of predicting the next.
    """
    rows, targets = final.reshape(-1, final.shape[-1]), _following(tokens).reshape(-1)
    size, parts = max(1, CHUNK // model.cfg.d_vocab), []
    for part, target in zip(rows.split(size), targets.split(size)):
        logits = model.unembed(part[None])[0]
        lse = logits.logsumexp(-1)
        loss = lse - logits.gather(1, target[:, None])[:, 0]
        parts.append((lse, loss, (logits - lse[:, None]).exp_() @ model.W_U.T if mean else lse))
    lse, loss, means = (torch.cat(some) for some in zip(*parts))
    return (lse.view(tokens.shape), loss.view(tokens.shape)[:, :-1].contiguous(),
            means.view(final.shape) if mean else None)


def _of_one_row(model: Rerun, final: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits (1, T) of a stream (1, T, D) that all rows share, and their losses (B, T - 1)."""
    lse, losses = [], []
    size = max(1, CHUNK // model.cfg.d_vocab)
    for part, target in zip(final[0].split(size), _following(tokens).T.split(size)):
        logits = model.unembed(part[None])[0]
        lse.append(logits.logsumexp(-1))
        losses.append(lse[-1][:, None] - logits.gather(1, target))
    return torch.cat(lse)[None], torch.cat(losses).T[:, :-1].contiguous()


def _following(tokens: Tensor) -> Tensor:
    """The token after each (B, T); the last has none, and what is said of it is cut off."""
    return torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
