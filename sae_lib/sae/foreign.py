"""SAEs made elsewhere: SAELens, dictionary_learning and sparsify folders as the workbook's SparseAutoencoder.

Every convention is the library's own forward pass written in ours, a = W_enc (x - b_dec) + b_enc with unit decoder
rows. Weights are read as data only: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lib import runs
from sae_lib.params import nearest
from sae_lib.runs import RunError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.row_norms import RowNorms

UNIT = 1e-5
"""Rows this near to unit norm are left bit for bit as they are."""


class Parts(NamedTuple):
    """A folder's content in one vocabulary."""

    W_enc: Tensor
    """(F, D)"""
    b_enc: Tensor
    """(F,)"""
    W_dec: Tensor
    """(F, D), rows of any norm"""
    b_dec: Tensor
    """(D,)"""
    architecture: str
    """topk, standard, jumprelu or gated."""
    k: int | None
    """Active latents per token (topk)."""
    centred: bool
    """Whether b_dec is taken from the input."""
    by_norm: bool
    """Whether TopK selects by pre-activation times decoder norm."""
    model: str | None
    """The model that the folder says it was trained on."""
    hook: str | None
    """The hook that the folder says it was trained on."""
    further: dict[str, Tensor] = {}
    """The architecture's own vectors (F,)."""


def load_foreign(folder: Path | str) -> SparseAutoencoder:
    """Read an SAE that another library saved; ``metadata`` says its format, model_name, hook_name and sha256.

    Latents and reconstructions are those of the library's own code, on activations as the model gives them. Decoder
    norms are folded into the code where that changes nothing else: ReLU, thresholds, gates, and TopK that selects by
    norm. Of a plain TopK with rows that are not of unit norm the selection would change; the norms are then kept apart
    (RowNorms). A row of norm 0, which decodes to nothing, becomes a latent that is never active.
    Raises RunError naming the file for a folder that is no such SAE, is damaged, or computes what we do not.
    """
    folder = Path(folder)
    name = next((name for name, (weights, _, _) in FORMATS.items() if (folder / weights).is_file()), None)
    if name is None:
        wanted = "; ".join(f"{weights} and {config} ({name})" for name, (weights, config, _) in FORMATS.items())
        raise RunError(f"{folder}: no SAE in it; expected a folder with one of these: {wanted}")
    weights, config, read = FORMATS[name]
    found = runs.read_json(folder / config)
    if not isinstance(found, dict):
        raise RunError(f"{folder / config}: expected a mapping, got a {type(found).__name__}")
    parts = read(folder / config, found, folder / weights)
    _check(parts, folder / weights)
    sae = _unit_rows(parts)
    sae.metadata = {"format": name, "model_name": parts.model, "hook_name": parts.hook,
                    "sha256": {file: runs.sha256(folder / file) for file in (config, weights)}}
    return sae.requires_grad_(False)


# -- the formats -------------------------------------------------------------------------------------------------

def _saelens(file: Path, cfg: dict[str, Any], weights: Path) -> Parts:
    """SAELens 3 to 6: before 6, TopK was an ``activation_fn`` of the architecture "standard"."""
    kwargs = cfg.get("activation_fn_kwargs")
    older = cfg.get("activation_fn", cfg.get("activation_fn_str")) == "topk" and isinstance(kwargs, dict)
    kind = "topk" if older else cfg.get("architecture", "standard")
    if kind not in LENS:
        ours = "; it was made by the workbook: name its run" if str(kind).startswith("workbook_") else ""
        raise RunError(f"{file}: architecture: '{kind}' of SAELens is not read here "
                       f"(known: {', '.join(LENS)}){ours or nearest(str(kind), LENS)}")
    for key, fine in (("normalize_activations", ("none", None, False)), ("reshape_activations", ("none", None)),
                      ("finetuning_scaling_factor", (False, None))):
        if cfg.get(key) not in fine:
            raise RunError(f"{file}: {key}: '{cfg[key]}' changes the activations on the way in; fold it into the "
                           "weights first (SAELens: fold_activation_norm_scaling_factor) and save with 'none'")
    held = _safetensors(weights)
    if "scaling_factor" in held and bool((held["scaling_factor"] == 1).all()):
        del held["scaling_factor"]
    form = architectures.get(kind)
    W_enc, b_enc, W_dec, b_dec, *own = _only(held, weights, "W_enc", form.lens_names.get("b_enc", "b_enc"), "W_dec",
                                             "b_dec", *form.vectors)
    said = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else cfg
    k = kwargs.get("k") if older else cfg.get("k", 100)  # SAELens' own default
    return Parts(W_enc.T, b_enc, W_dec, b_dec, kind, k if kind == "topk" else None,
                 cfg.get("apply_b_dec_to_input", True) is not False,
                 kind == "topk" and cfg.get("rescale_acts_by_decoder_norm", False) is True,
                 _word(said.get("model_name")), _word(said.get("hook_name")), dict(zip(form.vectors, own)))


def _dictionary_learning(file: Path, config: dict[str, Any], weights: Path) -> Parts:
    """AutoEncoder (ReLU, one bias both taken off and added), AutoEncoderNew (ReLU, no centring), AutoEncoderTopK."""
    trainer = config["trainer"] if isinstance(config.get("trainer"), dict) else {}
    kind, known = trainer.get("dict_class"), {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias",
                                              "AutoEncoderTopK": "b_dec"}
    if not isinstance(kind, str) or kind not in known:
        raise RunError(f"{file}: trainer.dict_class: '{kind}' of dictionary_learning is not read here "
                       f"(known: {', '.join(known)}){nearest(str(kind), known)}")
    held = _pickled(weights)
    topk = kind == "AutoEncoderTopK"
    k = held.pop("k", None)
    held.pop("threshold", None)  # used only where asked for; the forward pass selects by k
    k = trainer.get("k") if k is None else k.item() if k.numel() == 1 else -1
    if topk and trainer.get("k", k) != k:
        raise RunError(f"{file}: trainer.k: {trainer['k']}, but {weights.name} says k = {k}")
    W_enc, b_enc, W_dec, b_dec = _only(held, weights, "encoder.weight", "encoder.bias", "decoder.weight", known[kind])
    layer, site = trainer.get("layer"), trainer.get("submodule_name")
    plain = isinstance(layer, int) and (site is None or str(site).startswith("resid_post"))
    return Parts(W_enc, b_enc, W_dec.T, b_dec, "topk" if topk else "standard", k if topk else None,
                 kind != "AutoEncoderNew", False, _word(trainer.get("lm_name")),
                 f"blocks.{layer}.hook_resid_post" if plain else None)


def _sparsify(file: Path, cfg: dict[str, Any], weights: Path) -> Parts:
    """SparseCoder: TopK of the ReLU, input centred by b_dec."""
    if cfg.get("activation", "topk") != "topk":
        raise RunError(f"{file}: activation: '{cfg['activation']}' of sparsify is not read here (known: topk)")
    for key in ("transcode", "skip_connection", "signed"):
        if cfg.get(key):
            raise RunError(f"{file}: {key}: {cfg[key]}: not a sparse autoencoder of one place; only those are read")
    W_enc, b_enc, W_dec, b_dec = _only(_safetensors(weights), weights, "encoder.weight", "encoder.bias", "W_dec",
                                       "b_dec")
    return Parts(W_enc, b_enc, W_dec, b_dec, "topk", cfg.get("k", 32), True, False, None, None)


LENS = ("standard", "topk", "jumprelu", "gated")
"""Architectures of SAELens that are read here."""
FORMATS = {"SAELens": ("sae_weights.safetensors", "cfg.json", _saelens),
           "sparsify": ("sae.safetensors", "cfg.json", _sparsify),
           "dictionary_learning": ("ae.pt", "config.json", _dictionary_learning)}
"""By name: file of weights, file of the configuration, reader."""


# -- reading and checking ----------------------------------------------------------------------------------------

def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"{file}: not a whole safetensors file ({error}); get it again") from None


def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{file}: cannot be read as tensors alone ({reason}); nothing else is unpickled. Save it "
                       "with torch.save(ae.state_dict(), ...)") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise RunError(f"{file}: expected a state dict of tensors, got {type(found).__name__}; "
                       "save it with torch.save(ae.state_dict(), ...)")
    return found


def _only(held: dict[str, Tensor], file: Path, *names: str) -> list[Tensor]:
    """The named tensors as float32; others that are there would be part of what is computed."""
    missing, more = [n for n in names if n not in held], sorted({str(n) for n in held} - set(names))
    if missing or more:
        says = "; ".join(f"{what} {', '.join(those)}" for what, those in (("lacks", missing), ("also holds", more))
                         if those)
        raise RunError(f"{file}: {says}; expected {', '.join(names)}")
    for name in names:
        value = held[name]
        if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            raise RunError(f"{file}: {name}: expected plain numbers, got {value.dtype} ({value.layout})")
    return [held[name].float() for name in names]


def _check(parts: Parts, file: Path) -> None:
    """Shapes that fit each other, and a k that fits the shapes."""
    shapes = [tuple(t.shape) for t in parts[:4]]
    wrong = [name for name, vector in parts.further.items() if tuple(vector.shape) != shapes[1]]
    if wrong:
        raise RunError(f"{file}: {wrong[0]}: expected one number per latent, got the shape "
                       f"{tuple(parts.further[wrong[0]].shape)}")
    d_sae, d_in = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    if min(d_sae, d_in) < 1 or shapes != [(d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,)]:
        raise RunError(f"{file}: shapes do not fit each other: encoder {shapes[0]} and {shapes[1]}, decoder "
                       f"{shapes[2]} and {shapes[3]}")
    k = parts.k
    if parts.architecture == "topk" and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= d_sae):
        raise RunError(f"{file}: expected k from 1 to {d_sae}, the number of latents, got k = {k!r}")


def _unit_rows(parts: Parts) -> SparseAutoencoder:
    """Our form of the SAE: centred input, unit decoder rows."""
    W_enc, b_enc, W_dec, b_dec = (t.double() for t in parts[:4])
    own = {name: vector.double() for name, vector in parts.further.items()}
    if not parts.centred:
        moved = W_enc @ b_dec  # W (x - b_dec) + b' = W x + b
        b_enc = b_enc + moved
        if "b_mag" in own:
            own["b_mag"] = own["b_mag"] + own["r_mag"].exp() * moved
    norms, hooks = W_dec.norm(dim=1), []
    if not bool(((norms - 1).abs() <= UNIT).all()):
        empty = norms == 0
        W_dec = torch.where(empty[:, None], torch.eye(1, W_dec.shape[1], dtype=W_dec.dtype), W_dec)
        W_dec = W_dec / torch.where(empty, 1.0, norms)[:, None]
        form = architectures.get(parts.architecture)
        if parts.architecture != "topk" or parts.by_norm:
            W_enc, b_enc = W_enc * norms[:, None], b_enc * norms
            own |= {name: own[name] * norms for name in form.scales_as_input}
        else:
            hooks = [RowNorms(norms.float())]
    config = {"k": parts.k} if parts.architecture == "topk" else {}
    rows = [t.float().contiguous() for t in (W_enc, b_enc, W_dec, b_dec)]
    further = {name: vector.float() for name, vector in own.items()}
    sae = SparseAutoencoder(*rows, architectures.get(parts.architecture)(**config), further=further)
    sae.hooks = hooks
    return sae


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
