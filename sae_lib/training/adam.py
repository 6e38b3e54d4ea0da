"""Adam (Kingma & Ba 2015) with what an SAE's step needs around it, in two passes over the weights.

First pass: the norm of the gradient, without the part of it along unit rows, which only changes their norm. Second
pass: clip, project, update, and bring unit rows back to norm 1. On another device than a CPU, torch's own operations.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Adam over ``parameters``; those in ``unit`` are matrices (F, D) whose rows have, and keep, norm 1."""

    def __init__(self, parameters: list[Tensor], unit: list[Tensor]):
        self.parameters, self.steps = parameters, 0
        self.unit = [any(p is u for u in unit) for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters]
        """Running means of the gradients."""
        self.second = [torch.zeros_like(p) for p in parameters]
        """Running means of their squares."""

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float, row_rates: Tensor | None = None) -> float:
        """One update from the parameters' ``grad``; the norm of all gradients before they were clipped to it.

        ``row_rates`` (F,): factors of the learning rate for the rows (or entries) of parameters that have F of them.
        """
        norm = sum(self._squares(p, unit) for p, unit in zip(self.parameters, self.unit)) ** 0.5
        self.steps += 1
        scale = min(1.0, grad_clip / (norm + 1e-6))
        for p, unit, first, second in zip(self.parameters, self.unit, self.first, self.second):
            corrected = lr / (1 - BETA1**self.steps), 1 / (1 - BETA2**self.steps)
            rates = row_rates if row_rates is not None and len(p) == len(row_rates) else None
            if p.device.type == "cpu":
                parts = _rows(p, p.grad, first, second)
                if rates is not None and p.dim() == 1:
                    parts = [part.T for part in parts]
                factors = np.ones(1, np.float32) if rates is None else rates.float().numpy()
                _update(*parts, *map(np.float32, (*corrected, scale)), unit, factors)
            else:
                _update_by_torch(p, first, second, *corrected, scale, unit, rates)
        return norm

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """Set the moments of ``latents`` (F,) bool to 0, in every parameter that has F rows (or entries)."""
        for p, first, second in zip(self.parameters, self.first, self.second):
            if len(p) == len(latents):
                first[latents], second[latents] = 0, 0

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        held = {f"{i}.{name}": part[i] for i in range(len(self.parameters))
                for name, part in (("first", self.first), ("second", self.second))}
        return held | {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""
        self.steps = int(state["steps"])
        for i in range(len(self.parameters)):
            self.first[i].copy_(state[f"{i}.first"])
            self.second[i].copy_(state[f"{i}.second"])

    def _squares(self, p: Tensor, unit: bool) -> float:
        """Squared norm of the gradient that will be used."""
        if p.device.type == "cpu":
            weights, grad = _rows(p, p.grad)
            squares = np.empty(len(weights))
            _projected_squares(weights, grad, unit, squares)
            return float(squares.sum())
        if unit:
            remove_parallel(p)
        return float(p.grad.double().square().sum())


def remove_parallel(rows: Tensor) -> None:
    """Take from the gradient of unit ``rows`` (F, D) its part along each row."""
    along = (rows.grad * rows.detach()).sum(1, keepdim=True)
    rows.grad.addcmul_(along, rows.detach(), value=-1)


def _rows(parameter: Tensor, grad: Tensor, *state: Tensor) -> list[np.ndarray]:
    """As matrices that numba works on, sharing memory; a vector is one row."""
    parts = parameter.detach(), grad.contiguous(), *state
    return [part.numpy() if part.dim() == 2 else part.numpy()[None] for part in parts]


def _update_by_torch(p, first, second, rate, second_scale, scale, unit, rates=None) -> None:
    grad = p.grad * scale
    first.lerp_(grad, 1 - BETA1)
    second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    moved = first if rates is None else first * rates.view(-1, *[1] * (p.dim() - 1))
    p.addcdiv_(moved, (second * second_scale).sqrt_().add_(EPSILON), value=-rate)
    if unit:
        torch.nn.functional.normalize(p, dim=1, out=p.data)


@njit(parallel=True, nogil=True, cache=True, fastmath=True)
def _projected_squares(weights, grad, unit, out):
    for f in prange(weights.shape[0]):
        w, g = weights[f], grad[f]
        total, along = np.float32(0), np.float32(0)
        if unit:
            for d in range(w.size):
                along += g[d] * w[d]
        for d in range(w.size):
            total += (g[d] - along * w[d]) ** 2
        out[f] = total


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def _update(weights, grad, first, second, rate, second_scale, scale, unit, factors):
    one, beta1, beta2, epsilon = np.float32(1), np.float32(BETA1), np.float32(BETA2), np.float32(EPSILON)
    for f in prange(weights.shape[0]):
        w, g, m, v = weights[f], grad[f], first[f], second[f]
        along, total = np.float32(0), np.float32(0)
        own = rate * (factors[f] if factors.size > 1 else factors[0])
        if unit:
            for d in range(w.size):
                along += g[d] * w[d]
        for d in range(w.size):
            used = (g[d] - along * w[d]) * scale
            m[d] = beta1 * m[d] + (one - beta1) * used
            v[d] = beta2 * v[d] + (one - beta2) * used * used
            w[d] -= own * m[d] / (np.sqrt(v[d] * second_scale) + epsilon)
            total += w[d] * w[d]
        if unit:
            short = one / max(np.sqrt(total), np.float32(1e-12))
            for d in range(w.size):
                w[d] *= short
