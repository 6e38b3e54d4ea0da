"""Gated: one path says which latents are active, another how strongly (Rajamanoharan et al. 2024, "Improving
Dictionary Learning with Gated Sparse Autoencoders").

    gate_i = W_enc_i (x - b_dec) + b_enc_i;   f_i = 1[gate_i > 0] * ReLU(exp(r_mag_i) (gate_i - b_enc_i) + b_mag_i)

The L1 penalty counts ReLU(gate), which also reconstructs x through a frozen decoder (eq. 8): so the gate is trained,
and the magnitudes do not shrink. What the gate closes has no part in any term, so all of it stays sparse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.architectures.sparsity_control import SparsityControl
from sae_lib.sae.codes import Codes, Dense
from sae_lib.sae.context import Context


@architectures.register
class Gated(SparsityControl, architectures.Architecture):
    """``b_enc`` is the gate's bias; ``r_mag`` and ``b_mag`` (F,) belong to the magnitudes."""

    name = "gated"
    vectors = ("r_mag", "b_mag")
    uses = frozenset({"l1", "l1_warmup", "target_l0", "start_l0"})
    sparse = True
    learnt = frozenset({"r_mag", "b_mag"})
    scales_as_input = frozenset({"b_mag"})
    reconstructions = frozenset({"gate_reconstruction"})
    lens_names = {"b_enc": "b_gate"}

    def further(self, d_sae: int) -> dict[str, Tensor]:
        """Magnitudes that equal the gate."""
        return {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}

    def select(self, pre_acts: Tensor, ctx: Context) -> Codes:
        """Magnitudes of (B, F) gates, where those are open."""
        return self._magnitudes(Dense(pre_acts.relu()), ctx)

    def encode(self, ctx: Context, kernel) -> Codes:
        """The same by a kernel: ragged where few are open."""
        return self._magnitudes(kernel.relu(ctx.x, ctx.sae), ctx)

    def _magnitudes(self, gate: Codes, ctx: Context) -> Codes:
        ctx.own["gate"] = gate
        bias, r_mag, b_mag = (part if isinstance(gate, Dense) else part[gate.indices] for part in
                              (ctx.sae.b_enc, ctx.sae.further["r_mag"], ctx.sae.further["b_mag"]))
        magnitude = torch.addcmul(b_mag, gate.values - bias, r_mag.exp()).relu()
        return gate.with_values(magnitude * (gate.values > 0))

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """The L1 penalty of the gate, and its reconstruction through the decoder as it is."""
        sae, gate = ctx.sae, ctx.own["gate"]
        x_hat = sae.kernel.decode(gate, sae.W_dec.detach()) + sae.b_dec.detach()
        return {"l1": self.weight(ctx.progress) * gate.values.sum() / len(ctx.x),
                "gate_reconstruction": architectures.squared_error(ctx.x, x_hat)}
