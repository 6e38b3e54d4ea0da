"""Standard: ReLU latents under an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

from torch import Tensor

from sae_lib.sae import architectures
from sae_lib.sae.architectures.sparsity_control import SparsityControl
from sae_lib.sae.codes import Codes, Dense
from sae_lib.sae.context import Context


@architectures.register
class Standard(SparsityControl, architectures.Architecture):
    """``l1 * sum_i f_i |W_dec_i|`` after a linear warm-up; ``target_l0`` moves l1 until L0 fits.

    The April 2024 update's form: the penalty counts the decoder's norms. Rows are of unit norm, and the gradient
    along them is projected away, so the norms are left out.
    """

    name = "standard"
    uses = frozenset({"l1", "l1_warmup", "target_l0", "start_l0"})
    sparse = True

    def select(self, pre_acts: Tensor, ctx: Context) -> Codes:
        """ReLU of (B, F)."""
        return Dense(pre_acts.relu())

    def encode(self, ctx: Context, kernel) -> Codes:
        """The same by a kernel: ragged where few are active."""
        return kernel.relu(ctx.x, ctx.sae)

    def losses(self, ctx: Context) -> dict[str, Tensor]:
        """The sparsity penalty, averaged over tokens."""
        if ctx.importance is None:  # dense codes need no entries
            return {"l1": self.weight(ctx.progress) * ctx.codes.values.sum() / len(ctx.x)}
        return {"l1": self.weight(ctx.progress) * ctx.mean_over_tokens(ctx.codes.csr().values)}
