"""SAEs that learnt nothing, of the shape of one that did: what its figures are read beside.

All is drawn from the fixed SEED and from the store, so that every run of one model, layer, store, architecture, width
and k has the same ones. S sampled rows, D width, F latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.data.store import generator
from sae_lib.evaluation.null_names import LABELS
from sae_lib.evaluation.sharing import alone
from sae_lib.params import digest
from sae_lib.sae.architectures import Architecture
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.codes import Codes, Dense
from sae_lib.training.measure import geometric_median

SEED = 0
SAMPLE, ROWS, BATCH = 4096, 131_072, 8192
"""Rows that biases are set by; rows that principal components are of, at most, and how many are read at once."""


class Ground(NamedTuple):
    """What nulls take from a store: computed once for all SAEs trained on it."""

    sample: Tensor
    """(S, D) training rows, activations as the model gives them."""
    median: Tensor
    """(D,) their geometric median: the decoder's bias where training starts."""
    mean: Tensor
    """(D,) of the rows that components are of."""
    components: Tensor
    """(D, D) principal components in rows, the leading one first."""
    eigenvalues: Tensor
    """(D,) variance along each."""


class Signed(Dense):
    """Codes that may be negative: every entry but 0 is active."""

    def active(self) -> Tensor:
        """(B,) number of entries other than 0 of each token."""
        return (self.values != 0).sum(1)

    def fired(self) -> Tensor:
        """(F,) bool: which entries are other than 0 on any token."""
        return (self.values != 0).any(0)


class Linear(Architecture):
    """No selection: the code is the projection itself. Not registered, as nothing is trained with it."""

    name = "linear"

    def select(self, pre_acts: Tensor, ctx) -> Codes:
        """All of (B, F), negative ones too."""
        return Signed(pre_acts)


def ground(source) -> Ground:
    """Sample, mean and principal components of a source's training rows (``source.batches``)."""
    first = min(SAMPLE, source.n_train)
    sample = next(iter(source.batches(first, first, order="shuffled", seed=SEED))).x.float()
    size = min(BATCH, source.n_train)
    wanted = size * (min(ROWS, source.n_train) // size)
    shift, total, count = sample.mean(0).double(), 0, 0
    products = torch.zeros(sample.shape[1], sample.shape[1], dtype=torch.float64)
    for batch in source.batches(size, wanted, order="shuffled", seed=SEED):
        # Near its mean, a product in float32 loses nothing that counts.
        x = batch.x.float() - shift.float()
        products += (x.T @ x).double()
        total, count = total + x.double().sum(0), count + len(x)
    off = total / count
    eigenvalues, vectors = torch.linalg.eigh(products / count - torch.outer(off, off))
    components = vectors.flip(1).T.float()
    return Ground(sample, geometric_median(sample), (shift + off).float(),
                  torch.nn.functional.normalize(components, dim=1), eigenvalues.flip(0).clamp_min(0).float())


def ground_of(content_hash: str, asked: params.Train) -> Ground:
    """The ground of the store that a run was trained on, from the workbook's cache where it has it.

    ``content_hash`` is the store's. Raises ParameterError or RunError where the store must be read and cannot be.
    """
    file = runs.cache() / "evaluation" / f"ground-{digest([content_hash, SAMPLE, ROWS, BATCH, SEED], 24)}.safetensors"
    with alone(file, "principal components"):
        found = _read(file)
        if found is None:
            found = ground(activations.source(asked))
            with runs.whole(file) as temporary:
                save_file({name: part.contiguous() for name, part in found._asdict().items()}, temporary)
    return found


def _read(file) -> Ground | None:
    """The ground of a file; None where there is none, or a damaged one, which is computed again and replaced."""
    try:
        return Ground(**load_file(file))
    except (OSError, SafetensorError, TypeError):
        return None


def make(name: str, sae: SparseAutoencoder, l0: float, held: Ground) -> SparseAutoencoder:
    """The null ``name`` beside ``sae``, whose mean L0 is ``l0``.

    random and untrained: SAEs of its architecture, F and k as training starts, the first with an encoder that knows
    nothing of its decoder; ingredients are left out. Where no k says how many latents are active, thresholds (or
    biases) are set so that round(l0) are on the sample. pca: x_hat = mean + projection on the round(l0) leading
    components. residual: x_hat = x.
    """
    count, d_in = max(1, round(l0)), len(held.mean)
    if name in ("pca", "residual"):
        rows = torch.eye(d_in) if name == "residual" else held.components[:count]
        bias = torch.zeros(d_in) if name == "residual" else held.mean
        return SparseAutoencoder(rows.clone(), torch.zeros(len(rows)), rows.clone(), bias.clone(),
                                 Linear()).requires_grad_(False)
    kind = type(sae.architecture)
    shape = kind(**sae.architecture.config(), start_l0=count, target_l0=None, threshold_start=0.0)
    made = SparseAutoencoder.initialise(sae.d_sae, held.median, shape, generator(SEED, "weights"),
                                        "random" if name == "random" else "tied").requires_grad_(False)
    shape.calibrate(made, held.sample)
    if "threshold" in made.further and hasattr(shape, "k"):  # BatchTopK's, which training would move there
        pre_acts = made.kernel.pre_activations(held.sample, made).flatten()
        active = min(len(pre_acts), shape.k * len(held.sample))
        made.further["threshold"].fill_(pre_acts.kthvalue(len(pre_acts) - active + 1).values.clamp_min(0))
    return made


def described(name: str, made: SparseAutoencoder, sae: SparseAutoencoder) -> str:
    """A null in words, as a table's row names it."""
    if name == "pca":
        return f"{made.d_sae} principal component{'s' * (made.d_sae != 1)}"
    return LABELS[name] if name == "residual" else f"{LABELS[name]} ({sae.architecture.name}, {made.d_sae} latents)"
