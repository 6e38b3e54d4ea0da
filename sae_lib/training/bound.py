"""The compression bound (study 4), for decoder rows of unit norm and codes f' = c f, c the factor of a mask:

|x - x_hat'| <= |x - x_hat| + |sum_i (f_i - f'_i) W_i| <= |x - x_hat| + sum_i |f_i - f'_i|

Two triangle inequalities: their truth says that the mask and the decoder are what they are said to be, and the result
is their tightness, measured / bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.training.compression import masks

TOLERANCE, TOKENS, BLOCK = 1e-5, 4096, 512
"""Relative; evenly spread tokens that other ratios are tried on; how many are looked at at a time."""
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
REASONS = {"layer_norm": "latents are normalised before the mask, so that f is not a code of x alone at one scale",
           "mixing": "latents are mixed after the mask, so that f' is not c f"}


def report(sae: SparseAutoencoder, x: Tensor, mask: Tensor, skip: float, of: str) -> dict[str, Any]:
    """The bound for the SAE whose ingredient ``of`` declares ``mask`` and ``skip``; or why it does not apply to it."""
    others = [hook.name for hook in sae.hooks if hook.name != of]
    for name in others:
        return {"applicable": False, "reason": f"{name}: " + REASONS.get(name, "it changes the forward pass too")}
    return {"applicable": True, **check(sae, x, mask, skip)}


@torch.no_grad()
def check(sae: SparseAutoencoder, x: Tensor, mask: Tensor, skip: float) -> dict[str, Any]:
    """Check the bound on activations ``x`` (N, D) as the model gives them.

    ``mask`` (F,) or (L, F) and ``skip`` are what is declared. f and x_hat' come from the SAE's own forward pass, in
    float64; f' is computed here. ``holds`` asks four things, each to 1e-5: rows of unit norm, x_hat' the decoded f',
    and both inequalities on every token. ``by_ratio`` has the tightness for the most important latents alone
    (by mean activation on some of the tokens), without a skip.
    """
    sae = _double(sae)
    x = x.to(sae.W_dec)
    some = torch.zeros(len(x), dtype=torch.bool)
    some[:: max(1, len(x) // TOKENS)] = True
    factor = masks.factor(mask.to(sae.W_dec), skip)
    norms = sae.W_dec.norm(dim=1)
    sides, apart, codes = [], [], []
    for part, tried in zip(x.split(BLOCK), some.split(BLOCK)):
        ctx = sae.run(Context(sae, part * sae.input_scale))
        f = ctx.own["unmasked"].dense()
        f_masked = f * factor
        x_hat, x_hat_masked = f @ sae.W_dec + sae.b_dec, f_masked @ sae.W_dec + sae.b_dec
        error, lost = (ctx.x - x_hat).norm(dim=1), ((f - f_masked) @ sae.W_dec).norm(dim=1)
        sides.append(torch.stack([(ctx.x - ctx.reconstruction).norm(dim=1), error + lost,
                                  error + (f - f_masked).abs().sum(1)]))
        apart.append((ctx.reconstruction - x_hat_masked).norm(dim=1) / x_hat_masked.norm(dim=1).clamp_min(1e-30))
        codes.append(f[tried].float())
    measured, middle, bound = torch.cat(sides, 1)
    found = {"row_norm_error": float((norms - 1).abs().max()), "mask_error": float(torch.cat(apart).max()),
             "decoded": _violations(measured, middle), "summed": _violations(middle, bound)}
    holds = found["row_norm_error"] <= TOLERANCE and found["mask_error"] <= TOLERANCE
    return {"holds": holds and not found["decoded"]["violations"] and not found["summed"]["violations"],
            "tokens": len(x), **found, "tightness": _tightness(measured, bound),
            "tightness_decoded": _tightness(measured, middle),
            "by_ratio": _by_ratio(sae, x[some], torch.cat(codes))}


def _violations(left: Tensor, right: Tensor) -> dict[str, Any]:
    """Tokens on which left <= right fails, and by how much of right at worst (0 where it never does)."""
    excess = (left - right) / right.clamp_min(1e-30)
    return {"violations": int((excess > TOLERANCE).sum()), "worst": max(0.0, float(excess.max()))}


def _tightness(measured: Tensor, bound: Tensor) -> dict[str, float]:
    """1 where the bound is reached; ``worst`` is the token on which it says least."""
    ratio = measured / bound.clamp_min(1e-30)
    return {"mean": float(ratio.mean()), "worst": float(ratio.min())}


def _by_ratio(sae, x: Tensor, codes: Tensor) -> list[dict[str, float]]:
    """Tightness with a hard mask of each of ``RATIOS``; the latents between two ratios are decoded once."""
    order = codes.mean(0).argsort(descending=True)
    left = x * sae.input_scale - sae.b_dec
    ends = [masks.kept(ratio, sae.d_sae) for ratio in RATIOS]
    errors, sums, start = [], [], 0
    for end in ends:
        latents = order[start:end]
        some = codes[:, latents].to(x.dtype)
        left = left - some @ sae.W_dec[latents]
        errors.append(left.norm(dim=1))
        sums.append(some.sum(1) + (sums[-1] if sums else 0))
        start = end
    found = []
    for ratio, measured, kept in zip(RATIOS, errors, sums):
        bound = errors[-1] + (sums[-1] - kept).clamp_min(0)
        found.append({"ratio": ratio, **_tightness(measured, bound), "measured": float(measured.mean()),
                      "bound": float(bound.mean())})
    return found


def _double(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE in float64 and without sparse kernels: rounding cannot look like a violation."""
    parts = [part.detach().double() for part in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    further = {name: part.detach().double() for name, part in sae.further.items()}
    other = SparseAutoencoder(*parts, sae.architecture, sae.input_scale, further)
    other.hooks = sae.hooks
    return other
