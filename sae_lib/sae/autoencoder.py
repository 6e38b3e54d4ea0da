"""The sparse autoencoder: weights, encode, decode, save, load. Shapes: B tokens, D width, F latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_lib.params import nearest
from sae_lib.runs import RunError, read_json, whole
from sae_lib.sae import architectures
from sae_lib.sae.codes import Dense
from sae_lib.sae.context import Context
from sae_lib.sae.kernels.reference import Reference, reference

SAE_LENS_FORMAT = "6.54.12"
"""The version whose cfg.json we write: SAELens reads `metadata` whole only where it is 6 or newer."""


class SparseAutoencoder(nn.Module):
    """a = W_enc (x - b_dec) + b_enc;  f = select(a);  x_hat = f W_dec + b_dec."""

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
                 architecture: architectures.Architecture, input_scale: float = 1.0,
                 further: dict[str, Tensor] | None = None):
        super().__init__()
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        """(F, D) and (F,)"""
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        """(F, D), rows of unit norm, and (D,)"""
        self.architecture = architecture
        further = architecture.further(len(W_dec)) if further is None else further
        self.further = nn.ParameterDict({name: nn.Parameter(part, requires_grad=name in architecture.learnt)
                                         for name, part in further.items()})
        """Vectors (F,) of the architecture's own, a threshold for one."""
        self.input_scale = input_scale
        """Activations are multiplied by it on the way in; 1 where the scale is folded into the weights."""
        self.hooks: list = []
        """Ingredients that change the forward pass, in order."""
        self.kernel = reference
        self.metadata: dict[str, Any] = {}

    @classmethod
    def initialise(cls, d_sae: int, b_dec: Tensor, architecture, generator: torch.Generator,
                   encoder: str = "tied") -> SparseAutoencoder:
        """Random unit decoder rows, ``b_dec`` (D,) as given, ``b_enc`` zero.

        The encoder is the decoder's copy (``tied``), or independent unit rows (``random``: a null baseline).
        """
        rows = nn.functional.normalize(torch.randn(d_sae, len(b_dec), generator=generator), dim=1)
        others = nn.functional.normalize(torch.randn(d_sae, len(b_dec), generator=generator), dim=1)
        return cls(others if encoder == "random" else rows.clone(), torch.zeros(d_sae), rows, b_dec.clone(),
                   architecture)

    @property
    def d_in(self) -> int:
        """D"""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """F"""
        return self.W_dec.shape[0]

    def run(self, ctx: Context) -> Context:
        """One forward pass: fills pre-activations (dense path only), codes, rows and reconstruction."""
        self.to_codes(ctx)
        ctx.decoded, ctx.rows = ctx.codes, self.W_dec
        for hook in self.hooks:
            ctx.decoded = hook.decoder_codes(ctx.decoded, ctx)
            ctx.rows = hook.decoder_rows(ctx.rows, ctx.codes, ctx)
        ctx.reconstruction = self.architecture.decode(ctx, self.kernel) + self.b_dec
        return ctx

    def to_codes(self, ctx: Context) -> Context:
        """The first half of ``run``: fills pre-activations (dense path only) and codes."""
        if isinstance(self.kernel, Reference):
            ctx.pre_acts = self.kernel.pre_activations(ctx.x, self)
            for hook in self.hooks:
                ctx.pre_acts = hook.before_selection(ctx.pre_acts, ctx)
            ctx.codes = self.architecture.select(ctx.pre_acts, ctx)
        else:
            ctx.codes = self.architecture.encode(ctx, self.kernel)
        ctx.selected = ctx.codes
        for hook in self.hooks:
            ctx.codes = hook.transform(ctx.codes, ctx)
        if self.hooks and not (ctx.training and self.architecture.silent_entries):
            ctx.codes = ctx.codes.compact()
        return ctx

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, F) of activations (B, D) as the model gives them."""
        return self.to_codes(Context(self, x * self.input_scale)).codes.dense() / self.input_scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, F) latents to (B, D) activations."""
        codes = decoded = Dense(latents * self.input_scale)
        ctx = Context(self, latents, codes=codes, rows=self.W_dec)
        for hook in self.hooks:
            decoded = hook.decoder_codes(decoded, ctx)
            ctx.rows = hook.decoder_rows(ctx.rows, codes, ctx)
        if decoded is not codes:
            latents = decoded.dense() / self.input_scale
        return latents @ ctx.rows + self.b_dec / self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction (B, D) of activations (B, D) as the model gives them."""
        return self.run(Context(self, x * self.input_scale)).reconstruction / self.input_scale

    def folded(self, scale: float) -> SparseAutoencoder:
        """The same SAE for activations before scaling: x_hat(x) = x_hat_scaled(scale * x) / scale.

        Every selection is positively homogeneous, so dividing the biases (and thresholds) is enough; latents come in
        the model's units. Where an ingredient changes the forward pass the scale is kept as ``input_scale`` instead.
        """
        parts = [p.detach().clone() for p in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)]
        further = {name: part.detach().clone() for name, part in self.further.items()}
        if not self.hooks:
            parts[1], parts[3] = parts[1] / scale, parts[3] / scale
            further |= {name: further[name] / scale for name in self.architecture.scales_as_input}
        other = SparseAutoencoder(*parts, self.architecture, scale if self.hooks else 1.0, further)
        other.hooks, other.metadata, other.kernel = self.hooks, self.metadata, self.kernel
        return other

    def save(self, folder: Path) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` in SAELens' format, whole or not at all.

        Ingredients that change the forward pass make the architecture ``workbook_<name>``, which SAELens
        refuses: it never loads as a plain SAE that would compute something else. An architecture that after training
        computes what another one does (BatchTopK: JumpReLU) is written as that one.
        """
        name, config = self.architecture.name, self.architecture.config()
        ours = {"architecture": name, "config": config, "input_scale": self.input_scale,
                "ingredients": [hook.describe() for hook in self.hooks]}
        lens, extra = self.architecture.lens or name, {} if self.architecture.lens else config
        cfg = {"architecture": f"workbook_{name}" if self.hooks else lens, "d_in": self.d_in, "d_sae": self.d_sae,
               "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
               "reshape_activations": "none", "rescale_acts_by_decoder_norm": False, **extra,
               "metadata": {"sae_lens_version": SAE_LENS_FORMAT, **self.metadata, "workbook": ours}}
        weights = {"W_enc": self.W_enc.T, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec, **self.further}
        weights = {self.architecture.lens_names.get(key, key): part for key, part in weights.items()}
        state = {f"{hook.name}.{key}": value for hook in self.hooks for key, value in hook.state_dict().items()}
        with whole(Path(folder)) as temporary:
            temporary.mkdir()
            (temporary / "cfg.json").write_text(json.dumps(cfg, indent=1))
            save_file({key: w.detach().float().cpu().contiguous() for key, w in weights.items()},
                      temporary / "sae_weights.safetensors")
            if state:
                save_file({key: value.contiguous() for key, value in state.items()},
                          temporary / "ingredients.safetensors")

    @classmethod
    def load(cls, folder: Path, make_hooks=None) -> SparseAutoencoder:
        """Read an SAE that ``save`` wrote (or SAELens, for the same architectures).

        ``make_hooks(descriptions, state, d_in, d_sae)`` rebuilds ingredients that change the forward pass.
        Raises RunError naming the file for a missing, damaged or unknown SAE.
        """
        folder = Path(folder)
        cfg = read_json(folder / "cfg.json")
        try:
            ours = cfg.get("metadata", {}).get("workbook", {})
            name, scale = ours.get("architecture", cfg.get("architecture")), ours.get("input_scale", 1.0)
            if not isinstance(name, str) or name not in architectures.REGISTRY:
                raise RunError(f"{folder / 'cfg.json'}: architecture: '{name}' is not known"
                               f"{nearest(str(name), architectures.REGISTRY)}")
            kind = architectures.get(name)
            parts, further = _weights(folder / "sae_weights.safetensors", kind)
            config = ours.get("config") or {key: cfg[key] for key in kind.uses if key in cfg}
            if not 0 < float(scale) < float("inf") or type(config.get("k", 1)) is not int or (
                    "k" in kind.uses and not 1 <= config["k"] <= len(parts[0])):
                raise ValueError(f"k = {config.get('k')}, input_scale = {scale} with {len(parts[0])} latents")
            sae = cls(*parts, kind(**config), scale, further)
            sae.metadata = {key: value for key, value in cfg.get("metadata", {}).items() if key != "workbook"}
            if ours.get("ingredients"):
                if make_hooks is None:
                    raise RunError(f"{folder}: ingredients change this SAE's forward pass; load it with "
                                   "training.load_sae")
                extra = folder / "ingredients.safetensors"
                sae.hooks = make_hooks(ours["ingredients"], load_file(extra) if extra.exists() else {}, sae.d_in,
                                       sae.d_sae)
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise RunError(f"{folder / 'cfg.json'}: damaged, or not of this SAE ({type(error).__name__}: {error})"
                           ) from None
        return sae.requires_grad_(False)


def _weights(file: Path, kind) -> tuple[list[Tensor], dict[str, Tensor]]:
    """W_enc (F, D), b_enc, W_dec, b_dec and the architecture's own vectors, of a file whose tensors fit each other."""
    try:
        held = load_file(file)
        held = {name: held[kind.lens_names.get(name, name)] for name in
                ("W_enc", "b_enc", "W_dec", "b_dec", *kind.vectors)}
        parts = [held.pop("W_enc").T.contiguous(), held.pop("b_enc"), held.pop("W_dec"), held.pop("b_dec")]
        shapes = [tuple(part.shape) for part in (*parts, *held.values())]
        d_sae, d_in = shapes[0]
        if shapes != [(d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,), *[(d_sae,)] * len(held)] or not d_sae * d_in:
            raise ValueError(f"shapes {shapes} do not fit each other")
        if any(not part.is_floating_point() for part in (*parts, *held.values())):
            raise ValueError(f"{', '.join(str(part.dtype) for part in parts)} are not all floating-point numbers")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"{file}: cannot be read ({error})") from None
    return [part.float() for part in parts], {name: part.float() for name, part in held.items()}
