"""A loaded Hugging Face model as TransformerLens' HookedTransformer, which every SAEBench evaluation wants.

Weights come from the model in memory, through TransformerLens' own conversion and without any folding, so that
``blocks.L.hook_resid_post`` is the very activation that the store holds. Nothing is downloaded.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sae_lib.data.language_model import import_transformers
from sae_lib.params import ParameterError
from sae_lib.runs import RunError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest relative difference of the converted model's output; halves of a float are allowed 5e-2."""


def to_hooked(lm, n_layers: int | None = None):
    """Build a HookedTransformer with the weights, tokenizer and BOS of a loaded LanguageModel ``lm``.

    ``n_layers`` keeps the first so many blocks; a model cut there, or loaded cut, has its final norm and its
    unembedding replaced by the identity, so only hooks are of use. Raises ParameterError for an architecture or a
    configuration that is not converted exactly, RunError when the result does not compute what ``lm.hf`` does.
    """
    import_transformers()
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    architecture = type(lm.hf).__name__
    if architecture not in CONFIGS:
        raise ParameterError(f"model: {lm.name} is a {architecture}; evaluation knows {', '.join(CONFIGS)}")
    layers = lm.hf.model.layers
    count = len(layers) if n_layers is None else n_layers
    if not 1 <= count <= len(layers):
        raise ParameterError(f"n_layers = {count}: {lm.name} has {len(layers)} layers loaded")
    whole = count == len(layers) and not isinstance(lm.hf.model.norm, nn.Identity)

    fields = _shared_config(lm, count, architecture) | CONFIGS[architecture](lm.hf.config, count)
    cfg = HookedTransformerConfig(**fields, dtype=lm.dtype, device=str(lm.device), default_prepend_bos=True,
                                  init_weights=False)  # all are given below
    model = HookedTransformer(cfg, move_to_device=False)
    with torch.no_grad():
        weights = {name: weight.to(cfg.dtype)  # of Gemma's norms the conversion makes float32
                   for name, weight in _convert(architecture, _parts(lm.hf, layers[:count], whole), cfg).items()}
        # What load_and_process_state_dict does when it folds nothing, in one pass instead of one per tensor. The
        # weights stay where lm.hf has them, transposed views and all: no memory, and no copy in every layer's pass.
        model.load_state_dict(model.fill_missing_keys(weights), assign=True)
    if not whole:
        model.ln_final, model.unembed = nn.Identity(), nn.Identity()
    model.to(lm.device, print_details=False)
    model.eval().requires_grad_(False)
    _set_tokenizer(model, lm)
    _check(model, lm, count if not whole else None)
    return model


def _shared_config(lm, count: int, architecture: str) -> dict[str, Any]:
    """What both architectures have; ParameterError for what TransformerLens' conversion would leave out."""
    hf = lm.hf.config
    rope = getattr(hf, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ParameterError(f"model: {lm.name} has rotary embeddings of type '{kind}'; known are default, llama3")
    if getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        raise ParameterError(f"model: {lm.name} has attention or MLP biases, which {architecture} is converted without")
    heads, head = hf.num_attention_heads, getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    fields = {
        "n_layers": count, "d_model": hf.hidden_size, "d_head": head, "n_heads": heads, "d_mlp": hf.intermediate_size,
        "n_ctx": hf.max_position_embeddings, "d_vocab": hf.vocab_size, "eps": hf.rms_norm_eps,
        "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": head,
        "rotary_base": rope.get("rope_theta", 10000.0), "final_rms": True, "gated_mlp": True,
        "original_architecture": architecture, "model_name": lm.name,
    }
    if kind == "llama3":
        fields |= {"use_NTK_by_parts_rope": True, "NTK_by_parts_factor": rope["factor"],
                   "NTK_original_ctx_len": rope["original_max_position_embeddings"],
                   "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
                   "NTK_by_parts_high_freq_factor": rope["high_freq_factor"]}
    return fields


def _llama(hf, count: int) -> dict[str, Any]:
    grouped = hf.num_key_value_heads != hf.num_attention_heads
    return {"act_fn": hf.hidden_act, "n_key_value_heads": hf.num_key_value_heads if grouped else None,
            "rotary_adjacent_pairs": False}


def _gemma2(hf, count: int) -> dict[str, Any]:
    """Soft caps, the attention's own scale, and the alternation of sliding and full attention, from the config."""
    local = {"sliding_attention": "local", "full_attention": "global"}
    return {
        "act_fn": hf.hidden_activation, "n_key_value_heads": hf.num_key_value_heads,
        "use_attn_scale": True, "attn_scale": hf.query_pre_attn_scalar**0.5,
        "use_local_attn": True, "window_size": hf.sliding_window,
        "attn_types": [local[kind] for kind in hf.layer_types[:count]],
        "attn_scores_soft_cap": hf.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": hf.final_logit_softcapping or -1.0, "use_normalization_before_and_after": True,
    }


CONFIGS = {"LlamaForCausalLM": _llama, "Gemma2ForCausalLM": _gemma2}


def _parts(hf, layers, whole: bool) -> SimpleNamespace:
    """The modules that the conversion reads; a cut model gets stand-ins for norm and head, dropped afterwards."""
    if whole:
        return hf
    embed = hf.model.embed_tokens
    norm = SimpleNamespace(weight=torch.ones_like(embed.weight[0]))
    return SimpleNamespace(model=SimpleNamespace(embed_tokens=embed, layers=layers, norm=norm), lm_head=embed)


def _convert(architecture: str, parts, cfg) -> dict[str, torch.Tensor]:
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights, convert_llama_weights

    convert = {"LlamaForCausalLM": convert_llama_weights, "Gemma2ForCausalLM": convert_gemma_weights}[architecture]
    return convert(parts, cfg)


def _set_tokenizer(model, lm) -> None:
    """Give the model the tokenizer, with ``lm.bos_id`` as BOS, also where the tokenizer itself adds none.

    TransformerLens' ``set_tokenizer`` would load the tokenizer again by its name; a local one has none.
    """
    tokenizer = copy.deepcopy(lm.tokenizer)
    if tokenizer.bos_token_id != lm.bos_id:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(lm.bos_id)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.bos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0


@torch.no_grad()
def _check(model, lm, cut: int | None) -> None:
    """Compare one short block with the Hugging Face model: its logits, or the residual stream after block ``cut``."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, 16), generator=generator).to(lm.device)
    tokens[:, 0] = lm.bos_id
    if cut is None:
        theirs, ours = lm.hf(input_ids=tokens).logits, model(tokens)
    else:
        seen: list[torch.Tensor] = []
        handle = lm.hf.model.layers[cut - 1].register_forward_hook(
            lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        try:
            lm.hf.model(input_ids=tokens)
        finally:
            handle.remove()
        theirs, ours = seen[0], model(tokens, stop_at_layer=cut)
    difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    if not difference <= TOLERANCE.get(lm.dtype, 5e-2):
        raise RunError(f"{lm.name}: the model converted for evaluation computes something else than the loaded one "
                       f"(relative difference {difference:.1e} over 16 tokens)")
