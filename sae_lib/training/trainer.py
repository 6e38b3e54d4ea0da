"""The loop: batches of activations in, a trained SAE, its history and what training knows of it out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae_lib import presence, runs
from sae_lib.data.ahead import ahead
from sae_lib.data.store import generator
from sae_lib.memory import keep_freed_memory
from sae_lib.params import Train
from sae_lib.progress import Progress
from sae_lib.sae import architectures, kernels
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.context import Context
from sae_lib.sae.kernels import cpu
from sae_lib.training import checkpoint, measure, phases, snapshots, terms
from sae_lib.training.adam import Adam
from sae_lib.training.ingredients import Ingredient, configured
from sae_lib.training.schedules import learning_rate_factor


class Result(NamedTuple):
    """A finished (or cut) training."""

    sae: SparseAutoencoder
    """For activations as the model gives them; what was saved."""
    history: pd.DataFrame
    """One row per log step."""
    report: dict[str, Any]
    """What training.json holds."""


def train(p: Train, source, run: runs.Run, watch: Callable[[list[dict[str, float]]], None] | None = None) -> Result:
    """Train the variant that ``p`` names on ``source`` and write the run's folder.

    Goes on from a checkpoint of the same parameters where an earlier training left one. ``watch`` is given the history
    so far (a dict per log step) whenever it grows. Raises ParameterError before
    any work for what cannot be; a fault on the way is recorded as ``failed``.
    """
    with presence.alone(run.path, f"run '{run.name}'"), run.stage("02_train_variant"):
        trainer = Trainer(p, source, run.path)
        checkpoint.resume(trainer, run.path / "checkpoints")
        snapshots.settle(trainer)
        trainer.watch = watch
        trainer.fit(run.path / "checkpoints")
        sae = snapshots.save(trainer, run.path / snapshots.LAST)
        history = pd.DataFrame(trainer.rows)
        with runs.whole(run.path / "history.parquet") as temporary:
            history.to_parquet(temporary)
        report = trainer.report(sae)
        runs.write_json(run.path / "training.json", report)
        runs.write_json(run.path / "provenance.json", report["provenance"])
    return Result(sae, history, report)


class Trainer:
    """State of one training: weights, optimiser, ingredients, counters."""

    def __init__(self, p: Train, source, folder: Path | None = None):
        self.p, self.source, self.folder = p, source, folder
        if p.threads:
            torch.set_num_threads(p.threads)
        cpu.same_threads()
        keep_freed_memory()
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if p.device == "auto" else p.device
        # Each use of random numbers has its own stream from the one seed: an ingredient that draws numbers changes
        # neither the initial weights nor the order of the data, and runs of one seed stay paired.
        parts = configured(p)
        architecture = architectures.get(p.architecture)
        self.total_steps = p.samples // p.batch_size
        first = min(4096, source.n_train)
        sample = next(iter(source.batches(first, first, order="shuffled", seed=p.seed))).x * source.scale
        self.sae = SparseAutoencoder.initialise(p.d_sae, measure.geometric_median(sample),
                                                architecture.from_params(p, source.d_in),
                                                generator(p.seed, "weights"), p.initial_encoder).to(self.device)
        self.ingredients = [kind(config, source.d_in, p.d_sae, generator(p.seed, kind.name)) for kind, config in parts]
        self.sae.hooks = [part for part in self.ingredients if part.changes_forward]
        dense = any(part.needs & {"pre_acts", "dense"} for part in self.ingredients)
        self.sae.kernel = kernels.pick(self.device, architecture.sparse and not dense,
                                       kernels.precision_of(p.precision, self.device),
                                       density=self.sae.architecture.density(p.d_sae))
        self.sae.architecture.calibrate(self.sae, sample.to(self.device))
        self.lr = p.lr or architecture.default_lr(source.d_in)
        self.parameters = [part for part in self.sae.parameters() if part.requires_grad]
        for part in self.ingredients:
            part.state = {name: value.to(self.device) for name, value in part.state.items()}
            part.calibrate(self.sae, sample.to(self.device))
            self.parameters += [part.state[name].requires_grad_() for name in sorted(part.learnt)]
        self.pool = next((part for part in self.ingredients if part.pool > 1), None)
        """The ingredient that chooses each batch from a pool of several, if any does."""
        self.optimiser = Adam(self.parameters, unit=[self.sae.W_dec])
        self.silent = torch.zeros(p.d_sae, dtype=torch.int64, device=self.device)
        """(F,) samples since each latent fired."""
        self.rows: list[dict[str, float]] = []
        self.step, self.nonfinite, self.waited, self.busy = 0, None, 0.0, 0.0
        self.before, self.began = 0.0, time.perf_counter()
        self.phases: list[dict[str, Any]] = []
        """Decoder cosines and co-activation at the end of each third."""
        self.phase_ends = phases.ends(self.total_steps) if p.coactivation_window else {}
        self.snapshots: list[dict[str, Any]] = []
        """What is known of the SAEs kept on the way (``snapshots.entry``)."""
        self.watch: Callable[[list[dict[str, float]]], None] | None = None
        """Told of each row of the history."""
        self.resumed_at: list[int] = []
        """Steps at which the training went on from a checkpoint."""
        self.untrained = measure.heldout(self.sae.folded(source.scale), source.heldout(), source.scale)

    def seconds(self) -> float:
        """Time of training so far, earlier sessions counted as far as their checkpoint."""
        return self.before + time.perf_counter() - self.began

    def fit(self, checkpoints: Path | None = None) -> None:
        """Run the steps that are left, writing to ``checkpoints`` on the way.

        Ends early on a non-finite loss, a stop by hand, or ``stop_after_steps``.
        """
        p = self.p
        last = self.total_steps if p.stop_after_steps is None else min(self.total_steps, p.stop_after_steps)
        every = max(1, self.total_steps // p.log_points)
        drawn = p.batch_size * (self.pool.pool if self.pool else 1)
        batches = self.source.batches(drawn, last * drawn, order=p.order, seed=p.seed, start=self.step)
        if self.source.reads_ahead and torch.get_num_threads() > 1:  # a single core has nothing to spare
            batches = ahead(batches)
        snapshots.keep(self)
        try:
            with Progress(last * p.batch_size, f"training {p.run}", p.mode, "samples",
                          initial=self.step * p.batch_size) as bar:
                while self.step < last and not self.nonfinite:
                    began = time.perf_counter()
                    batch = next(batches)
                    ready = time.perf_counter()
                    self.one_step(batch, log=self.step % every == 0 or self.step == last - 1)
                    self.waited += ready - began
                    self.busy += time.perf_counter() - ready
                    snapshots.keep(self)
                    if self.step in self.phase_ends and not self.nonfinite:
                        self._end_phase(self.phase_ends[self.step])
                    bar.advance(p.batch_size, self._headline())
                    due = checkpoints and p.checkpoint_every and self.step % p.checkpoint_every == 0
                    if due and self.step < last and not self.nonfinite:
                        checkpoint.save(self, checkpoints)
        except KeyboardInterrupt:
            kept = "; its checkpoints are kept, and training again goes on from them" if checkpoints else ""
            print(f"stopped by hand after {self.step} of {self.total_steps} steps{kept}")

    def one_step(self, batch, log: bool = False) -> None:
        """Forward, terms, backward, projections, Adam, normalisation, counters; a history row where asked."""
        sae, p = self.sae, self.p
        ctx = Context(sae, batch.x.to(self.device) * self.source.scale, self.step, self.total_steps,
                      dead=self.silent >= p.aux_dead_after, document=batch.document, position=batch.position)
        if self.pool:
            self._choose(ctx)
        for part in self.ingredients:
            part.before_step(ctx)
        sae.run(ctx)
        losses = terms.loss_terms(ctx, self.ingredients)
        total = float(sum(term.detach() for term in losses.values()))
        if total != total or abs(total) == float("inf"):
            self.nonfinite = f"the loss became {total} at step {self.step}"
            return
        for parameter in self.parameters:
            parameter.grad = None
        own = sae.architecture.reconstructions
        apart = frozenset(part.name for part in self.ingredients if part.of_rows and ctx.rows is sae.W_dec)
        if log:
            shares = terms.backward_with_shares(losses, self.parameters, own, apart)
        else:
            shares = terms.backward(losses, apart)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        rates = [found for part in self.ingredients if (found := part.row_rates(ctx)) is not None]
        with torch.no_grad():
            for part in self.ingredients:
                part.on_gradients(sae, ctx)
        factor = learning_rate_factor(self.step, self.total_steps, p.warmup, p.lr_decay)
        norm = self.optimiser.step(self.lr * factor, p.grad_clip, math.prod(rates) if rates else None)
        with torch.no_grad():
            for part in self.ingredients:
                part.after_step(sae, ctx)
            sae.architecture.after_step(ctx)
            self.silent += len(ctx.x)
            self.silent[ctx.fired] = 0
            if ctx.reset is not None:
                self.optimiser.forget(ctx.reset)
                self.silent[ctx.reset] = 0
        if log:
            self._record(ctx, losses, shares, norm, self.lr * factor)
        self.step += 1

    def _choose(self, ctx: Context) -> None:
        """A batch from the pool, drawn with replacement by weight; its loss has the pool's mean as expectation."""
        weights = self.pool.sampling_weights(ctx.x, self.sae).double()
        shares = weights / weights.sum()
        chosen = torch.multinomial(shares.cpu(), self.p.batch_size, True, generator=self.pool.generator).to(self.device)
        ctx.importance = (1 / (len(ctx.x) * shares[chosen])).float()
        for name in ("x", "document", "position"):
            if (rows := getattr(ctx, name)) is not None:
                setattr(ctx, name, rows[chosen.to(rows.device)])

    def _record(self, ctx: Context, losses: dict[str, Tensor], shares: dict[str, float], norm: float, lr: float):
        row = {"step": self.step, "samples": (self.step + 1) * len(ctx.x)}
        row["loss"] = float(sum(term.detach() for term in losses.values()))
        row |= {f"loss/{name}": float(term.detach()) for name, term in losses.items()}
        row |= {f"share/{name}": share for name, share in shares.items()}
        row["explained_variance"] = 1 - row["loss/reconstruction"] / measure.batch_variance(ctx)
        row |= {"l0": ctx.codes.l0(), "dead_share": self.dead_share(self.step + 1), "lr": lr, "grad_norm": norm}
        row["samples_per_second"] = self.step * len(ctx.x) / (self.busy + self.waited) if self.step else math.nan
        row |= self.sae.architecture.log()
        for part in self.ingredients:
            row |= part.log(ctx)
        self.rows.append(row)
        if self.watch is not None:
            self.watch(self.rows)

    def _end_phase(self, name: str) -> None:
        sae, x = self.sae.folded(self.source.scale), self.source.heldout(self.p.coactivation_window).x
        self.phases.append(phases.measure(sae, x, name, self.step, self.folder and self.folder / "coactivation"))

    def _headline(self) -> str:
        if not self.rows:
            return ""
        last = self.rows[-1]
        return (f"loss {last['loss']:.4g}, explained variance {last['explained_variance']:.3f}, "
                f"L0 {last['l0']:.1f}, dead {last['dead_share']:.1%}")

    def idle(self) -> Tensor:
        """(F,) bool: latents that ingredients keep from firing (pruned, masked)."""
        idle = torch.zeros_like(self.silent, dtype=torch.bool)
        for part in self.ingredients:
            if (found := part.idle()) is not None:
                idle |= found.to(idle.device)
        return idle

    def dead_share(self, steps: int) -> float:
        """Latents without firing in the last ``dead_after`` samples, or in all of ``steps`` steps if fewer.

        Of those that may fire: latents that ingredients keep from it are counted apart, as ``idle_share``.
        """
        window = min(self.p.dead_after, steps * self.p.batch_size)
        dead = (self.silent >= window)[~self.idle()]
        return float(dead.double().mean()) if steps and len(dead) else 1.0

    def report(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """What training knows, measured on the saved SAE: the content of training.json."""
        rows, manifest = self.source.heldout(), self.source.manifest
        x = rows.x
        last, named = self.rows[-1] if self.rows else {}, {part.name for part in self.ingredients}
        knows = measure.weights(sae, x) | measure.heldout(sae, rows, self.source.scale, within=True)
        knows["nonfinite"] = self.nonfinite or knows["nonfinite"]
        return {"steps": self.step, "planned_steps": self.total_steps, "samples": self.step * self.p.batch_size,
                **knows, "dead_share": self.dead_share(self.step), "idle_share": float(self.idle().double().mean()),
                "measured": {part.name: found for part in self.ingredients if (found := part.measures(sae, x))},
                "explained_variance_untrained": self.untrained["explained_variance"],
                "final_loss": {k.removeprefix("loss/"): v for k, v in last.items() if k.startswith("loss/")},
                "terms": {name: terms.summary(values) | {"of": "ingredient" if name in named else "architecture"}
                          for name, values in self._shares().items()},
                "unfinished_schedules": self._unfinished(), "unused_parameters": unused_parameters(self.p),
                "phases": self.phases, "snapshots": snapshots.listed(self, knows),
                "lr": self.lr, "kernel": self.sae.kernel.name, "threads": torch.get_num_threads(),
                "d_in": sae.d_in, "d_sae": sae.d_sae, "hook": self.p.hook,
                "model_identity": manifest["model"]["identity"],
                "activations": {"name": self.source.name, "content_hash": self.source.content_hash},
                "seconds": self.seconds(), "resumed_at": self.resumed_at,
                "data_wait_share": self.waited / max(self.waited + self.busy, 1e-9),
                "ingredients": [part.describe() for part in self.ingredients],
                "provenance": runs.provenance(stage="02_train_variant", seed=self.p.seed, device=self.device,
                                              threads=torch.get_num_threads(),
                                              activations=self.source.content_hash)}

    def _shares(self) -> dict[str, list[float]]:
        """Each term's share at the log steps; an ingredient that gave no term at a step had share 0 there."""
        found = {key for row in self.rows for key in row if key.startswith("share/")}
        found |= {f"share/{part.name}" for part in self.ingredients if type(part).penalty is not Ingredient.penalty}
        return {name.removeprefix("share/"): [row.get(name, 0.0) for row in self.rows] for name in sorted(found)
                if self.rows}

    def _unfinished(self) -> list[str]:
        found = [f"{part.name}.{key}" for part in self.ingredients for key, schedule in part.schedules().items()
                 if schedule.unfinished(self.step, self.total_steps)]
        return found + (["warmup_steps"] if self.step < self.p.warmup else [])


def unused_parameters(p: Train) -> list[str]:
    """Parameters of other architectures that were set here, to no effect."""
    others = set().union(*(kind.uses for kind in architectures.REGISTRY.values()))
    others -= architectures.get(p.architecture).uses
    return sorted(name for name in others if getattr(p, name) != Train.model_fields[name].default)
