"""The other libraries' own training: a step as their users would call it, and a whole training by their own settings.

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
from typing import NamedTuple

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


# -- whole trainings ---------------------------------------------------------------------------------------------

class Trained(NamedTuple):
    """A peer's SAE, for activations as the model gives them."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    """Latents (B, F) of activations (B, D)."""
    decode: Callable[[torch.Tensor], torch.Tensor]
    """Activations (B, D) of latents (B, F)."""
    settings: dict[str, object]
    """What the library chose, or its documents recommend."""


class Task(NamedTuple):
    """What every library is given."""

    batches: Iterator[torch.Tensor]
    """Activations (B, D) as the model gives them, the same ones in the same order."""
    D: int
    F: int
    k: int
    batch: int
    steps: int
    seed: int
    mean_square: float
    """Of a training row's norm."""
    mean_norm: float
    """Of a training row."""


def shortened(warmup: int, steps: int) -> int:
    """A warm-up that would take most of a short run, or outlast it, takes a tenth of it instead."""
    return min(warmup, steps // 10)


def trained_by_dictionary_learning(task: Task) -> Trained:
    """TopKTrainer as its demo sets it: rows of mean square norm 1, rate by width, decay over the last fifth."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    scale, decay = task.mean_square ** -0.5, int(0.8 * task.steps)
    trainer = TopKTrainer(steps=task.steps, activation_dim=task.D, dict_size=task.F, k=task.k, layer=0, lm_name="x",
                          device="cpu", seed=task.seed, warmup_steps=shortened(1000, task.steps), decay_start=decay)
    for number, x in enumerate(task.batches):
        trainer.update(number, x * scale)
    trainer.ae.scale_biases(1 / scale)
    return Trained(trainer.ae.encode, trainer.ae.decode, {
        "optimiser": "Adam", "lr": trainer.lr, "warmup_steps": trainer.warmup_steps, "decay_start": decay,
        "mean square norm": 1.0, "auxk_alpha": trainer.auxk_alpha, "dead_after": trainer.dead_feature_threshold})


def trained_by_sparsify(task: Task) -> Trained:
    """What its Trainer does with its defaults: SignSGD with momentum, schedule-free, on activations as they come."""
    with contextlib.redirect_stdout(io.StringIO()):
        from schedulefree import ScheduleFreeWrapper
        from sparsify.config import SparseCoderConfig, TrainConfig
        from sparsify.sign_sgd import SignSGD
        from sparsify.sparse_coder import SparseCoder

    torch.manual_seed(task.seed)
    config = TrainConfig(SparseCoderConfig(num_latents=task.F, k=task.k))
    if (config.optimizer, config.lr, config.auxk_alpha) != ("signum", None, 0.0):
        raise ValueError(f"sparsify's defaults are others than its trainer's that are done here: {config}")
    coder = SparseCoder(task.D, config.sae, device="cpu", dtype=torch.float32)
    lr = 5e-3 / (task.F / 2**14) ** 0.5
    optimiser = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=lr), momentum=0.95)
    optimiser.train()
    for number, x in enumerate(task.batches):
        if number == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
    optimiser.eval()

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = coder.encode(x)
        return x.new_zeros(len(x), task.F).scatter_(1, found.top_indices, found.top_acts)

    return Trained(encode, lambda latents: latents @ coder.W_dec + coder.b_dec, {
        "optimiser": "schedule-free SignSGD, momentum 0.95", "lr": lr, "auxk_alpha": config.auxk_alpha})


def trained_by_sae_lens(task: Task) -> Trained:
    """Its SAETrainer and TopK, both with their defaults, on activations of mean norm sqrt(D), as its guide trains."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(task.seed)
    scale = task.D ** 0.5 / task.mean_norm
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=task.D, d_sae=task.F, k=task.k, device="cpu", dtype="float32"))
    config = SAETrainerConfig(total_training_samples=task.steps * task.batch, train_batch_size_samples=task.batch)
    config.lr_end = config.lr / 10  # as its runner's configuration does; a constant rate has no use for it
    trainer = SAETrainer(config, sae, data_provider=(x * scale for x in task.batches))
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.fit()
    return Trained(lambda x: sae.encode(x * scale), lambda latents: sae.decode(latents) / scale, {
        "optimiser": "Adam", "lr": config.lr, "warmup_steps": config.lr_warm_up_steps, "mean norm": "sqrt(D)",
        "decay_steps": config.lr_decay_steps, "aux_loss_coefficient": sae.cfg.aux_loss_coefficient,
        "dead_after": config.dead_feature_window * task.batch})


TRAINED = {"dictionary_learning": trained_by_dictionary_learning, "sparsify": trained_by_sparsify,
           "SAELens": trained_by_sae_lens}
"""By library: a whole training with its own settings."""
