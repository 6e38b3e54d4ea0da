"""The evaluating model is the one that was read: TransformerLens' copy computes what transformers does."""

import functools

import pytest
import torch

from sae_lib import params
from sae_lib.data import activations, language_model
from sae_lib.evaluation import hooked_model, rerun
from sae_lib.params import ParameterError
from sae_lib.runs import RunError

CONTEXT, WINDOW, LAYERS = 40, 8, 3
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 10.0, "attn_implementation": "eager"}


def write_model(folder, kind):
    """A random model of three layers with uneven norms, and a tokenizer of words that adds no BOS."""
    transformers = language_model.import_transformers()
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    if kind == "llama":
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_theta=50_000.0))
    elif kind == "gemma2":
        hf = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **GEMMA))
    else:
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
        hf.get_input_embeddings().weight[1] *= 20  # BOS stands out, as an attention sink does
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                                     unk_token="<unk>")
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Load one of the random models, whole or cut, in float32."""
    @functools.cache
    def folder(kind):
        return write_model(tmp_path_factory.mktemp(kind), kind)

    return lambda kind, layer=1, whole=True, dtype="float32": language_model.load(
        folder(kind), hook=f"blocks.{layer}.hook_resid_post", dtype=dtype, device="cpu", whole=whole)


@pytest.fixture
def tokens():
    ids = torch.randint(3, 64, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return ids


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logits_and_residual_stream_are_transformers_own(loaded, tokens, kind):
    lm = loaded(kind)
    model = hooked_model.to_hooked(lm)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, lm.hf(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    for layer in range(LAYERS):
        name = f"blocks.{layer}.hook_resid_post"
        for whole in (True, False):  # 01 reads the cut model
            assert relative(cache[name], loaded(kind, layer, whole).residual(tokens)) < 1e-4, (layer, whole)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_half_of_a_float_stays_it_throughout(loaded, tokens, kind):
    lm = loaded(kind, dtype="bfloat16")
    model = hooked_model.to_hooked(lm)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert relative(model(tokens).float(), lm.hf(input_ids=tokens).logits.float()) < 5e-2


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_weights_are_the_loaded_models_own_and_no_pass_copies_them(loaded, kind):
    lm = loaded(kind)
    model = hooked_model.to_hooked(lm)
    theirs, ours = lm.hf.model.layers[1], model.blocks[1]
    for weight, own in ((ours.mlp.W_in, theirs.mlp.up_proj), (ours.mlp.W_gate, theirs.mlp.gate_proj),
                        (ours.mlp.W_out, theirs.mlp.down_proj), (model.unembed.W_U, lm.hf.lm_head)):
        # TransformerLens multiplies by weight.T.contiguous() in each pass.
        assert weight.T.contiguous().data_ptr() == own.weight.data_ptr()
        assert not weight.requires_grad


def test_the_sliding_window_is_felt(loaded, tokens):
    """The comparison above would not see a missing window if the sequence fitted into it."""
    model = hooked_model.to_hooked(loaded("gemma2"))
    assert [block.attn.attn_type for block in model.blocks] == ["local", "global", "local"]
    other = tokens.clone()
    other[:, 1] = (tokens[:, 1] - 3 + 1) % 61 + 3
    after = [m(t, stop_at_layer=1)[:, 1 + WINDOW:] for m in (model,) for t in (tokens, other)]
    assert torch.equal(*after)


@pytest.fixture
def store_of(tmp_path_factory, tiny_store):
    """A store that 01 wrote: of the alias tiny (a Gemma-2), or of a random Llama's folder and a text file."""
    def make(kind):
        if kind == "tiny":
            return "tiny", tiny_store
        folder = write_model(tmp_path_factory.mktemp("stored"), kind)
        text = tmp_path_factory.mktemp("text") / "text.txt"
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(60, (400, 30), generator=draw).tolist()
        text.write_text("\n\n".join(" ".join(f"w{i}" for i in line) for line in words))
        p = params.check("extract", {"model": folder, "layer": 1, "corpus": str(text), "tokens": 4000, "context": 32,
                                     "dtype": "float32", "spelling_share": 0.0, "mode": "batch", "device": "cpu"})
        return folder, activations.extract(p)
    return make


@pytest.mark.parametrize("kind", ["tiny", "llama", "gemma2"])
def test_it_equals_what_01_stored(store_of, kind):
    name, store = store_of(kind)
    lm = language_model.load(name, hook="blocks.1.hook_resid_post", dtype="float32", device="cpu", whole=True)
    model = hooked_model.to_hooked(lm)
    stored = store.heldout()
    blocks = torch.as_tensor(store.heldout_blocks(20))
    residual = model(blocks, stop_at_layer=2)
    number = stored.block.long() - int(stored.block.min())
    rows = number < len(blocks)
    position = stored.position.long()[rows]
    assert rows.sum() > 50
    assert torch.equal(blocks[number[rows], position], stored.token.long()[rows])
    assert relative(residual[number[rows], position], stored.x[rows]) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_cut_model_gives_the_same_residual_stream(loaded, tokens, kind):
    whole, cut = loaded(kind), loaded(kind, whole=False)
    expected = whole.residual(tokens)
    for lm, count in ((whole, 2), (cut, None)):
        model = hooked_model.to_hooked(lm, count)
        assert model.cfg.n_layers == 2
        assert relative(model(tokens, stop_at_layer=2), expected) < 1e-4


def test_bos_is_put_first_where_the_tokenizer_adds_none(loaded):
    lm = loaded("llama")
    pad = lm.tokenizer.pad_token
    model = hooked_model.to_hooked(lm)
    assert model.to_tokens("w0 w1").tolist() == [[1, 4, 5]]
    assert model.to_tokens("w0 w1", prepend_bos=False).tolist() == [[4, 5]]
    assert model.tokenizer.pad_token_id is not None
    assert lm.tokenizer.pad_token == pad


def test_bos_is_put_first_once_where_the_tokenizer_adds_it(tiny_model):
    ids = hooked_model.to_hooked(tiny_model).to_tokens("the first letter")[0].tolist()
    assert ids[0] == tiny_model.bos_id
    assert ids.count(tiny_model.bos_id) == 1


def test_another_architecture_is_refused_by_name(loaded):
    with pytest.raises(ParameterError, match="GPT2LMHeadModel.*LlamaForCausalLM, Gemma2ForCausalLM"):
        hooked_model.to_hooked(loaded("gpt2"))
    with pytest.raises(ParameterError, match="has 3 layers"):
        hooked_model.to_hooked(loaded("llama"), 4)


def test_a_configuration_that_is_not_converted_is_refused(loaded):
    lm = loaded("llama")
    lm.hf.config.rope_parameters = {**lm.hf.config.rope_parameters, "rope_type": "yarn"}
    with pytest.raises(ParameterError, match="yarn"):
        hooked_model.to_hooked(lm)


def test_a_model_that_computes_something_else_is_noticed(loaded, monkeypatch):
    right = hooked_model.CONFIGS["Gemma2ForCausalLM"]
    monkeypatch.setitem(hooked_model.CONFIGS, "Gemma2ForCausalLM",
                        lambda hf, n: right(hf, n) | {"attn_scores_soft_cap": -1.0})
    with pytest.raises(RunError, match="computes something else"):
        hooked_model.to_hooked(loaded("gemma2"))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_rerunning_from_the_hook_gives_the_plain_models_values(loaded, tokens, tmp_path, kind):
    lm = loaded(kind)
    plain = hooked_model.to_hooked(lm)
    options = {"return_type": "both", "loss_per_token": True}
    for turn in ("first", "second"):
        model = rerun.Rerun(hooked_model.to_hooked(lm), lm.hook, tmp_path / "streams.safetensors")
        for ours, theirs in zip(model(tokens, **options), plain(tokens, **options)):
            assert torch.equal(ours, theirs)
        for change in (lambda x, hook: 0.7 * x + 1, lambda x, hook: torch.zeros_like(x)):
            hooks = [(lm.hook, change)]
            for ours, theirs in zip(model.run_with_hooks(tokens, fwd_hooks=hooks, **options),
                                    plain.run_with_hooks(tokens, fwd_hooks=hooks, **options)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        read = {"names_filter": [lm.hook], "stop_at_layer": 2}
        other = tokens.flip(0).contiguous()
        streams = [m.run_with_cache(other, **read)[1][lm.hook] for m in (model, plain)]
        assert torch.equal(*streams)
        with pytest.raises(RunError, match="out of turn"):
            model.run_with_hooks(tokens.clone(), fwd_hooks=hooks, **options)
        assert model.reused == (turn == "second")
        model.save()


def test_streams_are_kept_by_all_that_they_depend_on(loaded, tokens, workbook_home):
    lm = loaded("llama")
    file = rerun.file_of(lm, tokens)
    assert file == rerun.file_of(loaded("llama"), tokens) and file.is_relative_to(workbook_home)
    lm.hf.model.layers[2].mlp.up_proj.weight.data *= 1.001
    others = [rerun.file_of(lm, tokens), rerun.file_of(loaded("llama"), tokens.flip(0)),
              rerun.file_of(loaded("llama", layer=0), tokens)]
    assert file not in others and len(set(others)) == 3


def test_streams_that_are_damaged_or_too_large_are_not_used(loaded, tokens, tmp_path, monkeypatch):
    file = tmp_path / "streams.safetensors"
    file.write_bytes(b"half")
    lm = loaded("llama")
    monkeypatch.setattr(rerun, "LIMIT", 10)
    model = rerun.Rerun(hooked_model.to_hooked(lm), lm.hook, file)
    for _ in range(2):
        model(tokens, return_type="both", loss_per_token=True)
    model.save()
    assert file.read_bytes() == b"half" and not model.reused
