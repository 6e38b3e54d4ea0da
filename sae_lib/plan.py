"""What a study will cost before it starts: ``python -m sae_lib plan STUDY``.

Sizes follow from the parameters. Minutes follow from one timed batch of each kind, here and now; a machine that is
busy with other work, or a run whose latents die, takes longer.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from sae_lib import params, runs, studies

COLUMN_BYTES = 14
"""Bytes of a row beside its activations: token, document, block and position."""
MODEL_PASSES = 3.5
"""Passes of the model that core makes over its text, each counted whole: clean, with the SAE, ablated, to the hook."""


class Cost(NamedTuple):
    """One part of a study."""

    what: str
    tokens: int
    """Text tokens or training samples to process."""
    gigabytes: float
    minutes: float
    note: str


def plan(study: str) -> int:
    """Print the cost of every part of a study and of the whole; nothing is written but what 01 downloads anyway."""
    members = studies.expand(study)
    studies.check_ingredients(members)
    costs = _stores(members) + [_run(member) for member in members]
    for cost in costs:
        print(f"{cost.what}: {cost.tokens:,} {'tokens' if cost.what.startswith('store') else 'samples'}, "
              f"{cost.gigabytes:.2f} GB, {cost.minutes:.1f} min{cost.note}")
    print(f"{study}: {len(members)} runs, {sum(c.gigabytes for c in costs):.2f} GB, about "
          f"{sum(c.minutes for c in costs):.0f} minutes on all cores of this machine (04, nulls, pictures not counted)")
    return 0


def _stores(members) -> list[Cost]:
    asked = {}
    for member in members:
        p = params.check("extract", member.params, member.origin)
        asked.setdefault(params.activations_name(p), p)
    return [_store(name, p) for name, p in asked.items()]


def _store(name: str, p: params.Extract) -> Cost:
    """A store that is finished costs nothing; else one batch of its model is timed."""
    import torch

    from sae_lib.data import language_model

    language_model.check_layer(p.model, p.hook)
    width, tokens = language_model.describe(p.model).d_model, p.tokens + p.tokens // 20
    if (runs.home() / "activations" / name / "manifest.json").exists():
        return Cost(f"store {name}", tokens, 0.0, 0.0, " (there already)")
    model = language_model.load(p.model, hook=p.hook, dtype=p.dtype, device=p.device)
    batch = torch.full((32, p.context), model.bos_id)
    seconds = _timed(lambda: model.residual(batch))
    size = tokens * (width * (2 if model.dtype == torch.bfloat16 else 4) + COLUMN_BYTES) * (p.store == "disk")
    return Cost(f"store {name}", tokens, size / 1e9, seconds * tokens / batch.numel() / 60,
                "" if p.store == "disk" else " (streamed: each run pays it again)")


def _run(member) -> Cost:
    """One step of the variant on random activations, and one batch of the whole model for core."""
    import torch

    from sae_lib.data import language_model
    from sae_lib.training.trainer import Trainer

    p = params.check("train", member.params, member.origin)
    width = language_model.describe(p.model).d_model
    trainer = Trainer(p, _Random(width, p.batch_size))
    batch = next(trainer.source.batches(p.batch_size, p.batch_size))
    seconds = _timed(lambda: trainer.one_step(batch)) * trainer.total_steps
    model = language_model.load(p.model, hook=p.hook, dtype="float32", device=p.device, whole=True)
    tokens = torch.full((8, p.context), model.bos_id)
    seconds += _timed(lambda: model.hf(input_ids=tokens.to(model.device))) * MODEL_PASSES * 12
    size = 4 * p.d_sae * 2 * width / 1e9 * (1 + len(set(p.snapshots) - {1.0}))
    return Cost(f"run {member.name}", p.samples, size, seconds / 60, "")


def _timed(work, repeats: int = 3) -> float:
    """Shortest of a few calls, in seconds, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
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
        while True:
            yield self.batch._replace(x=self.batch.x[:batch_size])

    def heldout(self, limit=None):
        """The same rows."""
        return self.batch
