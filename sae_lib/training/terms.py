"""Loss terms of one step, their gradients, and each term's share beside the reconstruction's."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae.architectures import squared_error
from sae_lib.sae.context import Context
from sae_lib.training.limits import DOMINATING, INERT


def loss_terms(ctx: Context, ingredients) -> dict[str, Tensor]:
    """Every term by name, reconstruction first; their sum is the loss."""
    terms = {"reconstruction": squared_error(ctx.x, ctx.reconstruction, ctx.importance),
             **ctx.sae.architecture.losses(ctx)}
    for part in ingredients:
        term = part.penalty(ctx)
        if term is not None:
            terms[part.name] = term
    return terms


def backward(terms: dict[str, Tensor], apart: frozenset[str] = frozenset()) -> None:
    """Accumulate the gradient of the sum of all terms.

    Terms that share nothing with the others stand ``apart``: a sparse gradient is then added in place, where summing it
    with a dense one first would cost a pass over all weights.
    """
    sum(term for name, term in terms.items() if name not in apart).backward()
    for name in apart & set(terms):
        terms[name].backward()


def backward_with_shares(terms: dict[str, Tensor], parameters: list[Tensor],
                         reconstructions: frozenset[str] = frozenset(),
                         apart: frozenset[str] = frozenset()) -> dict[str, float]:
    """The same gradient, and each term's share of it.

    share = |g_term| / |g_reconstruction|, both over the weights that the term acts on (rows or entries where its
    gradient is not zero). A term whose gradient is 0 has share 0. ``reconstructions`` names terms of the architecture
    that reconstruct too: their gradients count with the reconstruction's, and they have no share. Where nothing else is
    trained, this is ``backward``.
    """
    others = [name for name in terms if name not in ("reconstruction", *reconstructions)]
    if not others:
        backward(terms, apart)
        return {}
    reference = _gradients(sum(term for name, term in terms.items() if name not in others), parameters)
    found = {name: _gradients(terms[name], parameters) for name in others}
    for parameter, *parts in zip(parameters, reference, *found.values()):
        parameter.grad = sum(parts)
    return {name: _share(parts, reference) for name, parts in found.items()}


def _gradients(term: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters)]


def _share(parts: list[Tensor], reference: list[Tensor]) -> float:
    own = sum(float(g.square().sum()) for g in parts)
    beside = sum(float((r * (g != 0)).square().sum()) for g, r in zip(parts, reference))
    if own == 0:
        return 0.0
    return (own / beside) ** 0.5 if beside else float("inf")


def summary(shares: list[float]) -> dict[str, float]:
    """How a term stood over the log steps: its median share, and the part of steps inert or dominating."""
    values = torch.tensor(shares, dtype=torch.float64)
    return {"median_share": float(values.median()), "inert_share": float((values < INERT).double().mean()),
            "dominating_share": float((values > DOMINATING).double().mean())}
