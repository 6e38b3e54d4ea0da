"""Language models: loaded by alias, hub id or folder, and run to one layer. The one place that knows transformers.

A layer is named as in TransformerLens: ``blocks.11.hook_resid_post`` is the residual stream after block 11, which
transformers calls ``hidden_states[12]``; ``blocks.12.hook_resid_pre`` is the same place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_lib import params, runs
from sae_lib.data import assets, tiny_model
from sae_lib.params import ParameterError
from sae_lib.precision import has_bfloat16

HOOK = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_resid_pre)")
FASTER = 1.2
"""How many times faster bfloat16 must be on a CPU before ``dtype: auto`` takes it."""
PLANTED = "planted"
"""What stores of known features (``data.planted``) name as their model, though no model made them."""


class ModelInfo(NamedTuple):
    """What is known of a model before its weights are read."""

    identity: str
    """Names the very weights: a package's version, a hub commit, a hash of a folder's bytes."""
    d_model: int
    n_layers: int
    architecture: str
    """Class name in transformers, e.g. ``LlamaForCausalLM``."""


class LanguageModel(NamedTuple):
    """A causal language model and the place in it that is read."""

    name: str
    """As it was asked for."""
    identity: str
    tokenizer: Any
    hf: Any
    """The transformers model; cut after the hook's layer unless it was loaded whole."""
    d_model: int
    n_layers: int
    """Of the whole model."""
    hook: str
    dtype: torch.dtype
    device: torch.device
    bos_id: int
    special_ids: frozenset[int]
    """Tokens that carry no text: BOS, EOS, padding and the like; an unknown word is text."""
    whole: bool

    @torch.no_grad()
    def residual(self, tokens: torch.Tensor, cache=None) -> torch.Tensor:
        """Residual stream (B, T, D) at the hook for token ids (B, T), in the model's dtype.

        ``cache``, one of transformers' caches, holds what stands before the tokens, and these too afterwards.
        """
        base, seen = self.hf.base_model, []
        given = {"input_ids": tokens.to(self.device), "past_key_values": cache, "use_cache": cache is not None}
        if not self.whole:
            return base(**given).last_hidden_state
        layers, norm = _layers(base)[1], final_norm(base)
        follower = [*layers, norm][_depth(self.hook)]
        handle = follower.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
        try:
            base(**given)
        finally:
            handle.remove()
        return seen[0]


def parse_hook(hook: str) -> tuple[int, str]:
    """Layer number and site of a hook's name. Raises ParameterError for a site that cannot be read."""
    match = HOOK.fullmatch(hook)
    if not match:
        raise ParameterError(f"hook_name: '{hook}' cannot be read; use blocks.N.hook_resid_post or "
                             "blocks.N.hook_resid_pre with N the number of a block")
    return int(match[1]), match[2]


def check_layer(model: str, hook: str) -> None:
    """Raise ParameterError when the model lacks the hook's layer."""
    layer, _ = parse_hook(hook)
    layers = describe(model).n_layers
    if layer >= layers:
        raise ParameterError(f"layer: model '{model}' has {layers} layers (0 to {layers - 1}), not {layer}")


def import_transformers():
    """Import transformers, also beside a torchvision that does not load (PyPI's, next to a CPU-only torch).

    Nothing here reads pictures, so such a torchvision is answered for as absent while transformers looks for it;
    otherwise every model class fails with ``operator torchvision::nms does not exist``.
    """
    find_spec = importlib.util.find_spec
    if find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError):
            importlib.util.find_spec = lambda name, package=None: (
                None if name.partition(".")[0] == "torchvision" else find_spec(name, package))
    try:
        transformers = importlib.import_module("transformers")
        available = transformers.utils.import_utils.is_torchvision_available
        if importlib.util.find_spec is not find_spec:
            available.cache_clear()  # transformers may have been imported, and asked, elsewhere before
        available()  # cached by transformers from here on
    finally:
        importlib.util.find_spec = find_spec
    return transformers


def describe(model: str) -> ModelInfo:
    """A model's identity and sizes, from its config alone. Raises ParameterError when it is not to be found."""
    if model == "tiny":
        return ModelInfo(f"tiny-gemma2-v{tiny_model.VERSION}", tiny_model.D_MODEL, tiny_model.LAYERS,
                         "Gemma2ForCausalLM")
    if model == "smollm2":
        asset = assets.ASSETS["smollm2"]
        return ModelInfo(f"{asset.project}=={asset.version} SmolLM2-135M-Instruct.Q4_1", 576, 30, "LlamaForCausalLM")
    if model == PLANTED:
        raise ParameterError("model: 'planted' is a world of known features, no language model: there are no tokens to "
                             "read or to evaluate on; train on it with `activations: planted` and `layer: 0`")
    folder = params.local_path(model)
    config = _from_pretrained(import_transformers().AutoConfig, model, folder)
    identity = f"folder {_bytes_digest(folder)}" if folder else f"{model}@{getattr(config, '_commit_hash', None)}"
    text = config.get_text_config()
    return ModelInfo(identity, text.hidden_size, text.num_hidden_layers, (config.architectures or ["unknown"])[0])


def _bytes_digest(folder: Path) -> str:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return _digest_of(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.cache
def _digest_of(files: tuple[tuple[str, int, int], ...]) -> str:
    return params.digest([(Path(name).name, runs.sha256(Path(name))) for name, _, _ in files])


def folder_of(model: str) -> Path | None:
    """The folder to load a model from, made if it is an alias; None for a hub id."""
    makers: dict[str, tuple[str, Callable]] = {
        "tiny": (f"tiny-gemma2-v{tiny_model.VERSION}", tiny_model.write),
        "smollm2": (f"smollm2-{assets.ASSETS['smollm2'].version}", assets.write_smollm2)}
    if model not in makers:
        return params.local_path(model)
    name, make = makers[model]
    folder = runs.cache() / "models" / name
    if not folder.exists():
        transformers = import_transformers()
        with runs.whole(folder) as temporary, _quiet(transformers):
            temporary.mkdir()
            make(temporary, transformers)
    return folder


def load(model: str, *, hook: str, dtype: str = "auto", device: str = "auto", whole: bool = False) -> LanguageModel:
    """Load a model and its tokenizer to read it at ``hook``.

    ``whole=False`` keeps only the blocks up to the hook. ``dtype="auto"`` takes bfloat16 on a GPU, and on a CPU
    what a timed batch shows to be faster. Raises ParameterError naming model, layer or device.
    """
    info = describe(model)
    check_layer(model, hook)
    where = pick_device(device)
    transformers = import_transformers()
    folder = folder_of(model)
    asked = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    first = asked or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    # Gemma-2 softcaps its attention scores, which only the eager form computes.
    capped = {"attn_implementation": "eager"} if info.architecture.startswith("Gemma2") else {}
    tokenizer, bos = load_tokenizer(model)
    with _quiet(transformers):
        hf = _from_pretrained(transformers.AutoModelForCausalLM, model, folder, dtype=first, **capped)
    hf.requires_grad_(False).eval()
    if not whole:
        _truncate(hf.base_model, _depth(hook))
    hf.to(where)
    specials = set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        specials.discard(tokenizer.unk_token_id)
    loaded = LanguageModel(model, info.identity, tokenizer, hf, info.d_model, info.n_layers, hook, first, where, bos,
                           frozenset(specials | {bos}), whole)
    return loaded if asked or where.type == "cuda" else _faster_of_two(loaded)


def load_tokenizer(model: str) -> tuple[Any, int]:
    """A model's tokenizer and its BOS id (EOS where it has no BOS). Raises ParameterError when it has neither."""
    transformers = import_transformers()
    with _quiet(transformers):
        tokenizer = _from_pretrained(transformers.AutoTokenizer, model, folder_of(model))
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ParameterError(f"model: the tokenizer of '{model}' has neither a BOS nor an EOS to put before each block")
    return tokenizer, bos


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises ParameterError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ParameterError(f"device: '{device}' cannot be used here ({reason}); try auto or cpu") from None


def _faster_of_two(model: LanguageModel) -> LanguageModel:
    """The model in float32 or bfloat16, on a CPU: whichever it reads a batch faster in."""
    if not has_bfloat16("cpu"):
        return model
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.hf.config.get_text_config().vocab_size, (8, 128), generator=draw)
    float32 = _seconds(model, ids)
    model.hf.to(torch.bfloat16)
    if _seconds(model, ids) * FASTER < float32:
        return model._replace(dtype=torch.bfloat16)
    # Rounding to bfloat16 lost bits: read the weights again.
    return load(model.name, hook=model.hook, dtype="float32", device=str(model.device), whole=model.whole)


def _seconds(model: LanguageModel, ids: torch.Tensor) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        model.residual(ids)
        times.append(time.perf_counter() - began)
    return min(times)


def _depth(hook: str) -> int:
    """Blocks that run before the hook."""
    layer, site = parse_hook(hook)
    return layer + (site == "hook_resid_post")


def _layers(base) -> tuple[str, torch.nn.ModuleList]:
    name = next((n for n in ("layers", "h") if isinstance(getattr(base, n, None), torch.nn.ModuleList)), None)
    if name is None or _norm_name(base) is None:
        raise ParameterError(f"model: the layout of {type(base).__name__} is not known; models with .layers and .norm "
                             "are (Llama, Gemma, Qwen, Mistral, Pythia, GPT-2 and their kin)")
    return name, getattr(base, name)


def final_norm(base) -> torch.nn.Module:
    """The norm after the last block."""
    return getattr(base, _norm_name(base))


def _norm_name(base) -> str | None:
    return next((n for n in ("norm", "ln_f", "final_layer_norm") if hasattr(base, n)), None)


def _truncate(base, depth: int) -> None:
    """Keep the first ``depth`` blocks; the last hidden state is then the residual stream after them."""
    name, layers = _layers(base)
    setattr(base, name, layers[:depth])
    setattr(base, _norm_name(base), torch.nn.Identity())


def _from_pretrained(kind, model: str, folder: Path | None, **options):
    """``kind.from_pretrained`` of a folder or hub id, with the one error that a user can act on."""
    try:
        return kind.from_pretrained(folder or model, **options)
    except Exception as error:  # a damaged folder raises a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"the folder {folder} does not hold it whole" if folder else (
            "it is not a folder here, and the hub did not give it")
        raise ParameterError(f"model: '{model}' cannot be loaded: {what} ({reason}). "
                             "Known aliases: smollm2, tiny") from None


@contextlib.contextmanager
def _quiet(transformers):
    """Without progress bars and advice about loading."""
    logging, level = transformers.logging, transformers.logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
