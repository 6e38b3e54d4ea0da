"""The other libraries' own training steps, as their users would call them: name -> a function of the step's number.

They are installed without their dependencies into a folder of the benchmarks' own; what of those a step needs is
there too. SAELens is the workbook's own dependency.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / ".peers"
PACKAGES = ["dictionary-learning==0.1.0", "eai-sparsify==1.3.3", "natsort", "simple-parsing", "docstring-parser",
            "einops", "schedulefree"]


def install() -> None:
    """Put the peers where they can be imported from."""
    if not FOLDER.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER),
                        *PACKAGES], check=True)
    sys.path.append(str(FOLDER))
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if not torch.cuda.is_available() else "0")
    for name in ("nnsight",):  # a step needs none of it
        sys.modules.setdefault(name, types.ModuleType(name)).LanguageModel = object
    package = types.ModuleType("dictionary_learning")  # its own __init__ imports much more than a step needs
    package.__path__ = [str(FOLDER / "dictionary_learning")]
    sys.modules.setdefault("dictionary_learning", package)


def precision(bf16: bool, device: str):
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()


def dictionary_learning(D: int, F: int, k: int, x: torch.Tensor, bf16: bool) -> Callable[[int], None]:
    """Its TopK trainer's ``update``."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    device = x.device.type
    trainer = TopKTrainer(steps=10_000, activation_dim=D, dict_size=F, k=k, layer=0, lm_name="x", device=device, seed=0)

    def step(number: int) -> None:
        with precision(bf16, device):
            trainer.update(number + 1, x)
    return step


def sae_lens(D: int, F: int, k: int, x: torch.Tensor, bf16: bool, sparse: bool) -> Callable[[int], None]:
    """The forward pass, backward and Adam of its trainer."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    device = x.device.type
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=k, use_sparse_activations=sparse, device=device,
                                                dtype="float32"))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step(number: int) -> None:
        with precision(bf16, device):
            out = sae.training_forward_pass(step_input=TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=number, is_logging_step=False))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    return step


def sparsify(D: int, F: int, k: int, x: torch.Tensor, bf16: bool) -> Callable[[int], None]:
    """What its trainer does of a step: forward, backward, projection, Adam, unit rows."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

    device = x.device.type
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=k), device=device)
    adam = torch.optim.Adam(coder.parameters(), lr=1e-4)

    def step(number: int) -> None:
        with precision(bf16, device):
            loss = coder(x).fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
    return step


def all_of(D: int, F: int, k: int, x: torch.Tensor) -> Iterator[tuple[str, Callable[[], Callable[[int], None]]]]:
    """Name and maker of every peer in every setting."""
    for bf16 in (False, True):
        word = "bfloat16 autocast" if bf16 else "float32"
        yield f"dictionary_learning, {word}", lambda bf16=bf16: dictionary_learning(D, F, k, x, bf16)
        for sparse in (False, True):
            name = f"SAELens{' sparse' * sparse}, {word}"
            yield name, lambda bf16=bf16, sparse=sparse: sae_lens(D, F, k, x, bf16, sparse)
        yield f"sparsify, {word}", lambda bf16=bf16: sparsify(D, F, k, x, bf16)
