"""Bit-packed activity: on which of the last N tokens each latent was active, one bit per token and latent."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sae_lib.sae.codes import CSR

M1, M2, M4, H01 = (np.uint64(v) for v in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F,
                                          0x0101010101010101))


class Activity:
    """A ring of the last ``window`` tokens (a multiple of 64): F * window / 8 bytes, 8.4 MB for 4096 and 16384.

    A dense boolean form takes eight times as much. Kept on the CPU.
    """

    def __init__(self, n_latents: int, window: int):
        if window < 64 or window % 64:
            raise ValueError(f"a window of {window} tokens is not a multiple of 64")
        self.window, self.seen = window, 0
        """``seen``: tokens recorded so far."""
        self.bits = torch.zeros(n_latents, window // 64, dtype=torch.int64)
        """(F, window / 64), as unsigned words: bit t % 64 of word t // 64 belongs to the ring's token t."""

    @property
    def bytes(self) -> int:
        """Memory of the bits."""
        return self.bits.numel() * 8

    def record(self, codes: CSR) -> None:
        """The next tokens; only entries over 0 are active. Of more than ``window`` tokens the last stay."""
        offsets = codes.offsets.cpu().numpy()
        first = max(0, len(offsets) - 1 - self.window)
        self.seen += first
        _record(self.bits.numpy().view(np.uint64), offsets[first:], codes.indices.cpu().numpy(),
                codes.values.detach().cpu().numpy(), self.seen % self.window)
        self.seen += len(offsets) - 1 - first

    def counts(self) -> Tensor:
        """(F,) int64: on how many of the tokens in the ring each latent was active, by popcount."""
        out = np.empty(len(self.bits), np.int64)
        _counts(self.bits.numpy().view(np.uint64), out)
        return torch.from_numpy(out)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"bits": self.bits, "seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""
        self.bits.copy_(state["bits"])
        self.seen = int(state["seen"])


@njit(parallel=True, nogil=True, cache=True)
def _record(bits, offsets, indices, values, start):
    batch, ring = len(offsets) - 1, bits.shape[1] * 64
    for f in prange(bits.shape[0]):  # the places of the new tokens are emptied a word at a time
        token = 0
        while token < batch:
            at = (start + token) % ring
            low = at % 64
            many = min(64 - low, batch - token)
            span = (~np.uint64(0) >> np.uint64(64 - many)) << np.uint64(low)
            bits[f, at // 64] &= ~span
            token += many
    for token in range(batch):
        at = (start + token) % ring
        bit = np.uint64(1) << np.uint64(at % 64)
        for k in range(offsets[token], offsets[token + 1]):
            if values[k] > 0:
                bits[indices[k], at // 64] |= bit


@njit(parallel=True, nogil=True, cache=True)
def _counts(bits, out):
    for f in prange(bits.shape[0]):
        total = np.uint64(0)
        for w in range(bits.shape[1]):
            v = bits[f, w]
            v -= (v >> np.uint64(1)) & M1
            v = (v & M2) + ((v >> np.uint64(2)) & M2)
            v = (v + (v >> np.uint64(4))) & M4
            total += (v * H01) >> np.uint64(56)
        out[f] = total
