"""How fast this machine is, in about a second: one product of a model's shape, and steps of a variant on random rows.

No language model is loaded, nothing is downloaded. Each kind is timed once, whatever number of runs share it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from sae_lib import params

ENOUGH = 0.15
"""Seconds of repeats after which a timing is taken; a single repeat is made anyway."""
OPERATIONS = 5e9
"""Of the product that is timed, about: some hundredths of a second."""
SAME_STEP = ("run", "seed", "samples", "threads", "mode", "overwrite", "role", "activations", "snapshots",
             "stop_after_steps", "log_points", "checkpoint_every", "coactivation_window", "dead_after", "lr",
             "lr_decay", "warmup_steps", "grad_clip", "order")
"""Parameters of training, beside extraction's, that leave the cost of a step as it is."""
UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "opt", "phi")
"""Models whose blocks have two matrices after attention; others have three."""


class Shape(NamedTuple):
    """What of a language model decides its cost."""

    d_model: int
    inner: int
    """Width inside a block."""
    blocks: int
    block: int
    """Weights of a block that multiply a token."""
    vocabulary: int

    def operations(self, context: int, depth: int | None = None) -> float:
        """Multiplications and additions for one token of a block of text through ``depth`` blocks, all by default."""
        return (self.blocks if depth is None else depth) * (2 * self.block + 2 * context * self.d_model)


ALIASES = {"tiny": Shape(64, 256, 2, 61_440, 1_700), "smollm2": Shape(576, 1536, 30, 3_538_944, 49_152),
           "planted": Shape(256, 256, 0, 0, 0)}
"""Models whose shape is known before they are there."""


def shape_of(model: str) -> Shape:
    """A model's shape. Raises ParameterError for a model of the hub whose config is not on this machine yet."""
    if model in ALIASES:
        return ALIASES[model]
    folder = params.local_path(model)
    file = folder / "config.json" if folder else _cached(model)
    try:
        return from_config(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        raise params.ParameterError(f"model: the sizes of '{model}' are not known before its config.json is on this "
                                    "machine") from None


def _cached(model: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return found if isinstance(found, str) else ""


def from_config(config: dict) -> Shape:
    """The shape that a config.json of transformers tells of."""
    text = config.get("text_config", config)

    def value(*names):
        return next((text[name] for name in names if text.get(name) is not None), None)
    width, heads = value("hidden_size", "n_embd"), value("num_attention_heads", "n_head")
    head = value("head_dim") or width // heads
    inner = value("intermediate_size", "n_inner") or 4 * width
    attention = 2 * width * head * (heads + (value("num_key_value_heads") or heads))
    matrices = 2 if text.get("model_type") in UNGATED else 3
    return Shape(width, inner, value("num_hidden_layers", "n_layer"), attention + matrices * width * inner,
                 value("vocab_size"))


class Speed:
    """What was timed on this machine, by kind: products on ``cores`` cores (0: all), steps on ``training`` of them.

    ``patience`` is how many seconds steps may be timed for in all.
    """

    def __init__(self, patience: float = float("inf"), cores: int = 0, training: int = 0):
        self.patience, self.cores = patience, cores or os.cpu_count() or 1
        self.training = training or self.cores
        self._products: dict[tuple, float] = {}
        self._steps: dict[str, float] = {}
        self._sizes: dict[str, float] = {}
        self.guessed: set[str] = set()
        """Kinds of step for which no time was left: guessed from the others by their size."""

    def product(self, shape: Shape, dtype: str, device: str) -> float:
        """Operations a second of a product of the model's width, in a precision; ``auto`` is the better of two."""
        if dtype == "auto":
            from sae_lib.precision import has_bfloat16

            kinds = ("float32", "bfloat16") if has_bfloat16(device) else ("float32",)
            return max(self.product(shape, one, device) for one in kinds)
        key = (shape.d_model, shape.inner, dtype, device)
        if key not in self._products:
            with _threads(self.cores):
                self._products[key] = _product(shape, dtype, device)
        return self._products[key]

    def step(self, p: params.Train, width: int) -> float:
        """Seconds of a step of the variant, in the middle of its training, no latent dead."""
        about = p.model_dump(exclude={*SAME_STEP, *params.Extract.model_fields} - {"device"})
        kind = params.digest([width, about])
        size = float(width) * p.d_sae * p.batch_size
        if kind not in self._steps:
            if self.patience <= 0 and self._steps:
                self.guessed.add(kind)
                return size * max(seconds / self._sizes[one] for one, seconds in self._steps.items())
            began = time.perf_counter()
            with _threads(self.training):
                self._steps[kind], self._sizes[kind] = _step(p, width), size
            self.patience -= time.perf_counter() - began
        return self._steps[kind]


@contextlib.contextmanager
def _threads(count: int):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _product(shape: Shape, dtype: str, device: str) -> float:
    import torch

    rows = int(min(4096, max(256, OPERATIONS / (2 * shape.d_model * shape.inner))))
    kind = getattr(torch, dtype)
    x = torch.ones(rows, shape.d_model, dtype=kind, device=device)
    weight = torch.ones(shape.inner, shape.d_model, dtype=kind, device=device)
    with torch.no_grad():
        seconds = timed(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * rows * shape.d_model * shape.inner / seconds


def _step(p: params.Train, width: int) -> float:
    from sae_lib.training.trainer import Trainer

    trainer = Trainer(p.model_copy(update={"threads": 0}), _Random(width, p.batch_size))
    drawn = p.batch_size * (trainer.pool.pool if trainer.pool else 1)
    batch = next(trainer.source.batches(drawn, drawn))
    trainer.step = trainer.total_steps // 2  # where schedules are under way
    return timed(lambda: trainer.one_step(batch), trainer.device)


def timed(work, device: str = "cpu") -> float:
    """Shortest of a few calls, in seconds, after one that warms up."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
    once()
    times = [once()]
    while sum(times) < ENOUGH:
        times.append(once())
    return min(times)


class _Random:
    """A source of random activations of a model's width: enough to time a step."""

    name = content_hash = "random"
    scale, reads_ahead = 1.0, False

    def __init__(self, width: int, rows: int):
        import torch

        from sae_lib.data.store import Batch

        x = torch.randn(max(rows, 256), width, generator=torch.Generator().manual_seed(0))
        places = torch.arange(len(x), dtype=torch.int32)
        self.batch = Batch(x, places, places, places, places)
        self.d_in, self.n_train, self.manifest = width, len(x), {"model": {"identity": "random"}}

    def batches(self, batch_size: int, samples: int, **_):
        """The same rows again and again."""
        repeats = -(-batch_size // len(self.batch.x))
        while True:
            yield self.batch._make(part.repeat(repeats, *[1] * (part.dim() - 1))[:batch_size] for part in self.batch)

    def heldout(self, limit=None):
        """The same rows."""
        return self.batch
