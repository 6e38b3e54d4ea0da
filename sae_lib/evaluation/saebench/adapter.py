"""What every SAEBench evaluation of our SAEs needs: the SAE in its form, its modules put right for a while."""

from __future__ import annotations

import contextlib
import importlib
import random
import warnings

import numpy as np
import torch

from sae_lib.data.language_model import import_transformers, parse_hook
from sae_lib.params import ParameterError

UNIT_NORM_TOLERANCE = 1e-4


def import_sae_bench() -> None:
    """Import what all evaluations of SAEBench share, transformers before it, without a second's work for nothing.

    Its list of SAEs on the hub, 1.5 MB of YAML, is parsed as it is imported, for a table that nothing reads.
    """
    import_transformers()
    directory = importlib.import_module("sae_lens.loading.pretrained_saes_directory")
    with in_place(directory, get_pretrained_saes_directory=dict):
        selection = importlib.import_module("sae_bench.sae_bench_utils.sae_selection_utils")
    selection.get_pretrained_saes_directory = directory.get_pretrained_saes_directory


def check_sae(sae, model: str, d_model: int) -> None:
    """Raise ParameterError for an SAE of another width than the model's, or with decoder rows not of unit norm."""
    if sae.d_in != d_model:
        raise ParameterError(f"the SAE is for width {sae.d_in}, {model} has {d_model}: not the model it was "
                             "trained on")
    off = (sae.W_dec.detach().float().norm(dim=1) - 1).abs()
    if not bool((off <= UNIT_NORM_TOLERANCE).all()):
        raise ParameterError(f"{int((~(off <= UNIT_NORM_TOLERANCE)).sum())} of {len(off)} decoder rows are not of unit "
                             f"norm (by up to {float(off.max()):.1e}); fold the norms into the code first")


def wrap(sae, model: str, hook: str, *, device, dtype: torch.dtype, context: int, seen=None):
    """Our SAE as SAEBench's BaseSAE: latents by our own code in float32, weights in its layout for its statistics.

    ``seen``, if given, is told of what passes: ``encoded(x)`` and ``decoded(latents, x_hat)``.
    """
    from sae_bench.custom_saes.base_sae import BaseSAE

    class Wrapped(BaseSAE):
        def __init__(self):
            super().__init__(sae.d_in, sae.d_sae, model, parse_hook(hook)[0], device, dtype, hook)
            with torch.no_grad():
                for name in ("b_enc", "W_dec", "b_dec"):
                    getattr(self, name).copy_(getattr(sae, name))
                self.W_enc.copy_(sae.W_enc.T)
            for name, part in sae.further.items():  # of a gated SAE it reads b_mag
                self.register_buffer(name, part.detach().clone())
            self.cfg.architecture = sae.architecture.name
            self.cfg.context_size = context
            self.cfg.device = str(device)
            self.seen = seen
            self.inner = [sae.to(device)]  # in a list: SAEBench's casts must not reach it

        def encode(self, x):
            if self.seen is not None:
                self.seen.encoded(x)
            return self.inner[0].encode(x.float().flatten(0, -2)).unflatten(0, x.shape[:-1])

        def decode(self, feature_acts):
            x_hat = self.inner[0].decode(feature_acts.flatten(0, -2)).unflatten(0, feature_acts.shape[:-1])
            if self.seen is not None:
                self.seen.decoded(feature_acts, x_hat)
            return x_hat.to(self.dtype)

        def forward(self, x):
            return self.decode(self.encode(x))

    return Wrapped()


@contextlib.contextmanager
def settings(threads: int):
    """Threads as asked, then everything that SAEBench may leave behind as it was."""
    grad, before = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(before)


@contextlib.contextmanager
def seeded(seed: int):
    """Seed torch, numpy and random, which SAEBench draws from without seeding; their states are put back."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def in_place(module, **names):
    """Rebind names of a module, and put them back whatever happens."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def quiet():
    """A tqdm that shows nothing: in a notebook SAEBench's bars would be widgets on the page."""
    from tqdm.std import tqdm

    class Quiet(tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options | {"disable": True})
    return Quiet
