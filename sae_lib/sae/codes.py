"""Sparse codes: which latents are active on each token, and how strongly.

Three forms with one interface: a fixed number per token (TopK), ragged rows (CSR: ReLU, BatchTopK) and dense.
Shapes: B tokens, F latents, K slots per token, N active entries in all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def offsets_of(active: Tensor) -> Tensor:
    """(B + 1,) int64: where each row's entries start and end, for a mask (B, F)."""
    return torch.cat([active.new_zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])


@dataclass(frozen=True)
class FixedK:
    """At most K active latents on each token: the fast form of TopK."""

    indices: Tensor
    """(B, K) int64 latent ids; a slot whose value is 0 is inactive."""
    values: Tensor
    """(B, K) non-negative latents; gradients flow through them."""
    n_latents: int

    def with_values(self, values: Tensor) -> FixedK:
        """The same latents with other values (B, K)."""
        return replace(self, values=values)

    def compact(self) -> FixedK:
        """Itself: a slot whose value is 0 is inactive."""
        return self

    def dense(self) -> Tensor:
        """(B, F) latents."""
        empty = self.values.new_zeros(len(self.values), self.n_latents)
        return empty.scatter_add(1, self.indices, self.values)

    def active(self) -> Tensor:
        """(B,) number of active latents of each token."""
        return (self.values.detach() > 0).sum(1)

    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.active().float().mean())

    def fired(self) -> Tensor:
        """(F,) bool: which latents are active on any token of the batch."""
        return _fired(self)

    def csr(self) -> CSR:
        """The ragged form, inactive slots left out."""
        active = self.values > 0
        offsets = offsets_of(active)
        return CSR(offsets, self.indices[active], self.values[active], self.n_latents)


@dataclass(frozen=True)
class CSR:
    """Any number of active latents on each token."""

    offsets: Tensor
    """(B + 1,) int64: token b owns entries offsets[b]:offsets[b + 1]."""
    indices: Tensor
    """(N,) int64 latent ids."""
    values: Tensor
    """(N,) positive latents; gradients flow through them."""
    n_latents: int

    def with_values(self, values: Tensor) -> CSR:
        """The same latents with other values (N,)."""
        return replace(self, values=values)

    def rows(self) -> Tensor:
        """(N,) int64: the token of each entry."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def dense(self) -> Tensor:
        """(B, F) latents."""
        empty = self.values.new_zeros(len(self.offsets) - 1, self.n_latents)
        return empty.index_put((self.rows(), self.indices), self.values, accumulate=True)

    def active(self) -> Tensor:
        """(B,) number of active latents of each token."""
        return self.compact().offsets.diff()

    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float((self.values.detach() > 0).sum()) / max(1, len(self.offsets) - 1)

    def fired(self) -> Tensor:
        """(F,) bool: which latents are active on any token of the batch."""
        return _fired(self)

    def csr(self) -> CSR:
        """Itself."""
        return self

    def compact(self) -> CSR:
        """Without entries that are 0."""
        active = self.values > 0
        if bool(active.all()):
            return self
        counts = torch.zeros(len(self.offsets) - 1, dtype=torch.int64, device=active.device)
        counts.index_add_(0, self.rows(), active.long())
        offsets = torch.cat([self.offsets[:1], counts.cumsum(0)])
        return CSR(offsets, self.indices[active], self.values[active], self.n_latents)


@dataclass(frozen=True)
class Dense:
    """All latents of each token: for codes so dense that sparse forms lose."""

    values: Tensor
    """(B, F) non-negative latents."""

    @property
    def n_latents(self) -> int:
        """F."""
        return self.values.shape[1]

    def with_values(self, values: Tensor) -> Dense:
        """Other values (B, F)."""
        return Dense(values)

    def compact(self) -> Dense:
        """Itself."""
        return self

    def dense(self) -> Tensor:
        """(B, F) latents."""
        return self.values

    def active(self) -> Tensor:
        """(B,) number of active latents of each token."""
        return (self.values.detach() > 0).sum(1)

    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.active().float().mean())

    def fired(self) -> Tensor:
        """(F,) bool: which latents are active on any token of the batch."""
        return (self.values.detach() > 0).any(0)

    def csr(self) -> CSR:
        """The ragged form."""
        active = self.values > 0
        offsets = offsets_of(active)
        return CSR(offsets, active.nonzero()[:, 1], self.values[active], self.n_latents)


def _fired(codes: FixedK | CSR) -> Tensor:
    values = codes.values.detach()
    if values.device.type == "cpu":
        from sae_lib.sae.kernels import cpu

        return cpu.fired(codes.indices, values, codes.n_latents)
    fired = torch.zeros(codes.n_latents, dtype=torch.bool, device=values.device)
    fired[codes.indices[values > 0]] = True
    return fired


Codes = FixedK | CSR | Dense
