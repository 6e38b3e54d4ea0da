"""What an evaluation needs of the model alone, computed once: for the three passes of a batch, and for all SAEs.

Most of core's time is the model without the SAE. The residual stream at the hook and the stream before the
unembedding do not depend on the SAE, so they are kept on disk for the next one: the values are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sae_lib import runs
from sae_lib.data.language_model import parse_hook
from sae_lib.evaluation import kept_tensors
from sae_lib.evaluation.hooked_model import to_hooked
from sae_lib.evaluation.sharing import all_cores, alone
from sae_lib.params import digest
from sae_lib.runs import RunError

LIMIT = 2**29
"""Bytes of streams that are kept; a larger evaluation keeps none."""


class Rerun:
    """A HookedTransformer as SAEBench's core calls it.

    Core runs each batch as it is, with the SAE and with the activation removed. The blocks before the hook run once;
    where the changed stream is equal in every row (removed: all zero), the rest runs on one row. Everything that is
    not spelt out here is the model's own.
    """

    def __init__(self, model, hook: str, file: Path | None = None):
        self._model, self._hook, self._file = model, hook, file
        layer, site = parse_hook(hook)
        self._start = layer + (site == "hook_resid_post")
        self._kept: dict[str, Tensor] | None = (kept_tensors.read(file) or ({},))[0] if file else {}
        self._fresh = 0
        """Batches that were computed here."""
        self._residual: Tensor | None = None
        self.tokens: Tensor | None = None
        """(B, T) ids read last."""

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    @property
    def known(self) -> bool:
        """Whether streams of an earlier evaluation were found."""
        return bool(self._kept)

    @property
    def reused(self) -> bool:
        """Whether all that the model alone gives was already there."""
        return self._fresh == 0

    def streams(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The plain model's stream at the hook, and that before the unembedding, each (B, T, D)."""
        key = self._read_batch(tokens)
        if (self._kept or {}).get("final " + key) is None:
            seen: list[Tensor] = []
            handle = self._model.ln_final.register_forward_hook(lambda _m, _a, out: seen.append(out))
            try:
                self._model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(self._hook, self._keep_residual)])
            finally:
                handle.remove()
            self._keep({"hook " + key: self._residual, "final " + key: seen[0]})
            return self._residual, seen[0]
        self._residual, final = (self._kept[part + key].to(tokens.device) for part in ("hook ", "final "))
        return self._residual, final

    def changed(self, stream: Tensor) -> Tensor:
        """The stream before the unembedding (B, T, D) with ``stream`` at the hook; of one row where all are equal."""
        if bool((stream == stream[:1]).all()):
            stream = stream[:1]
        # Stops before the final norm, which is then applied as the model itself would.
        return self._model.ln_final(self._model(stream, start_at_layer=self._start,
                                                stop_at_layer=self._model.cfg.n_layers))

    def once(self, tokens: Tensor, names: tuple[str, ...], make: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        """What ``make()`` gives for a batch of tokens (B, T) under ``names``; kept beside its streams."""
        key = self._read_batch(tokens)
        if any((self._kept or {}).get(f"{name} {key}") is None for name in names):
            made = make()
            self._keep({f"{name} {key}": tensor for name, tensor in zip(names, made, strict=True)})
            return list(made)
        return [self._kept[f"{name} {key}"].to(tokens.device) for name in names]

    def __call__(self, tokens: Tensor, return_type: str, loss_per_token: bool):
        """Logits (B, T, V) and loss of the plain model."""
        return self._unembed(self.streams(tokens)[1], tokens)

    def run_with_hooks(self, tokens: Tensor, return_type: str, fwd_hooks: list, loss_per_token: bool):
        """Logits and loss with the stream at the hook replaced, for the batch that was read last."""
        (name, change), = fwd_hooks
        if tokens is not self.tokens or name != self._hook or return_type != "both" or not loss_per_token:
            raise RunError(f"SAEBench core asked for {name}, {return_type} out of turn; evaluation knows its 0.6.0")
        return self._unembed(self.changed(change(self._residual, hook=None)), tokens)

    def run_with_cache(self, tokens: Tensor, names_filter: list[str], **options):
        """The stream at the hook, as SAEBench reads it from a cache."""
        key = self._read_batch(tokens)
        if names_filter != [self._hook]:
            raise RunError(f"SAEBench core asked for {names_filter}, not {self._hook}; evaluation knows its 0.6.0")
        if (self._kept or {}).get("hook " + key) is None:
            _, cache = self._model.run_with_cache(tokens, names_filter=names_filter, **options)
            self._keep({"hook " + key: cache[self._hook]})
            return None, cache
        return None, {self._hook: self._kept["hook " + key].to(tokens.device)}

    def save(self) -> None:
        """Keep what was computed for the next SAE, unless it is too large."""
        if self._file and self._kept and self._fresh:
            kept_tensors.write(self._file, self._kept, {})

    def _read_batch(self, tokens: Tensor) -> str:
        self.tokens = tokens
        return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:24]

    def _keep_residual(self, activation: Tensor, hook) -> None:
        self._residual = activation

    def _keep(self, streams: dict[str, Tensor]) -> None:
        self._fresh += 1
        if self._kept is not None:
            self._kept |= {key: stream.cpu() for key, stream in streams.items()}
            if sum(stream.nbytes for stream in self._kept.values()) > LIMIT:
                self._kept = None

    def _unembed(self, final: Tensor, tokens: Tensor):
        from transformer_lens.utilities.activation_functions import apply_softcap

        logits = apply_softcap(self._model.unembed(final), self._model.cfg.output_logits_soft_cap)
        logits = logits.expand(len(tokens), -1, -1)
        return logits, self._model.loss_fn(logits, tokens, per_token=True)


@contextlib.contextmanager
def opened(lm, blocks: Tensor):
    """The Rerun of a loaded model on ``blocks`` (N, context), with what is kept of them; what is new is kept after.

    Where nothing was kept, one process computes it on all cores, and others wait.
    """
    file, hooked = file_of(lm, blocks), to_hooked(lm)
    with contextlib.ExitStack() as held:
        held.enter_context(alone(file, "streams of the model"))
        model = Rerun(hooked, lm.hook, file)
        if model.known:
            held.close()
        else:
            held.enter_context(all_cores())
        yield model
        model.save()


def file_of(lm, blocks: Tensor) -> Path:
    """Where the streams of a model for these blocks (N, context) are kept, named by all that they depend on.

    Beside the model's identity that is a sample of each weight: a model changed in memory is another one.
    """
    return runs.cache() / "evaluation" / f"{digest(identity(lm, blocks.numpy().tobytes()), 24)}.safetensors"


def identity(lm, text: bytes) -> list:
    """All that the activations of ``text`` in a model depend on: its weights, hook, precision, device and packages."""
    total = hashlib.sha256(text)
    for weight in lm.hf.parameters():
        flat = weight.detach().flatten()
        total.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "transformer-lens")]
    return [lm.identity, lm.hook, str(lm.dtype), lm.device.type, versions, total.hexdigest()]
