"""What can go wrong around the workbook: each is one clear error, in time, and leaves nothing half-written.

Faults of one module's own are tested beside it: parameters (test_params), stores (test_activations), corpora
(test_corpus), downloads (test_language_model), runs of other parameters (test_trainer), checkpoints (test_resume).
"""

import errno
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sae_lib import params, runs
from sae_lib.data import activations, assets, language_model, sources
from sae_lib.evaluation import results, validity
from sae_lib.params import ParameterError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.training.ingredients import load_sae

# -- the disk ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_named_and_nothing_is_half_written(fault, tmp_path):
    def fill(path):
        path.write_text("half")
        raise fault

    says = "a.bin: no space left on the disk.*SAE_WORKBOOK_HOME"
    with pytest.raises(runs.RunError, match=says), runs.whole(tmp_path / "a.bin") as temporary:
        fill(temporary)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_extracting_loses_no_finished_shard(tiny, elsewhere, monkeypatch):
    done, save = [], activations.save_tensors

    def full(tensors, path):
        if len(done) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        done.append(path)
        save(tensors, path)

    monkeypatch.setattr(activations, "save_tensors", full)
    with pytest.raises(runs.RunError, match="no space left on the disk"):
        activations.extract(tiny())
    (partial,) = (elsewhere / "activations").glob("*.partial")
    assert len(list(partial.glob("*-0000*.safetensors"))) == 3 and not list(partial.glob(".*.tmp"))
    assert not (activations.folder(tiny()) / "manifest.json").exists()


def test_links_out_of_the_tree_are_refused(elsewhere, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "params.yaml").write_text("k: 1\n")
    (elsewhere / "runs/study").mkdir(parents=True)
    (elsewhere / "runs/linked").symlink_to(outside)
    (elsewhere / "runs/study/linked").symlink_to(outside)
    inside = elsewhere / "runs/half"
    inside.mkdir()
    (inside / "sae").symlink_to(outside)
    for name in ("linked", "linked/a", "study/linked", "half"):
        with pytest.raises(ParameterError, match="run: .* is a link out of .*runs"):
            runs.Run(name)
    assert "is a link out of" in results.collect(["study/linked"]).reasons[0]
    (elsewhere / "runs/plain").mkdir()
    (elsewhere / "runs/again").symlink_to(elsewhere / "runs/plain")
    assert runs.Run("again").path.is_dir()


def test_runs_itself_may_be_a_link_to_a_larger_disk(elsewhere, tmp_path_factory):
    (elsewhere / "runs").symlink_to(tmp_path_factory.mktemp("large"))
    assert runs.write_json(runs.Run("a").path / "x.json", {}).exists()


# -- text --------------------------------------------------------------------------------------------------------

def parquet(path, damage):
    pd.DataFrame({"text": [f"some words {i}" * 50 for i in range(3000)]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    path.write_bytes(damage(content))


@pytest.mark.parametrize("name, make, says", [
    ("a.txt", lambda f: f.write_text(""), None),
    ("a.jsonl", lambda f: f.write_text("\n\n"), None),
    ("a.parquet", lambda f: pd.DataFrame({"text": []}, dtype=str).to_parquet(f), None),
    ("a", lambda f: f.mkdir(), "holds no text that can be read; wanted .txt, .jsonl, .parquet"),
    ("a.csv", lambda f: f.write_text("text\nhello\n"), "holds no text that can be read"),
    ("a.jsonl", lambda f: f.write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n'), "a.jsonl cannot be read .*utf-8"),
    ("a.jsonl", lambda f: f.write_text('"words"\n'), "corpus_column: .* a str, not an object"),
    ("a.parquet", lambda f: parquet(f, lambda b: b[:len(b) // 2]), "a.parquet is not a whole parquet file"),
    ("a.parquet", lambda f: parquet(f, lambda b: b[:60] + bytes(400) + b[460:]), "a.parquet is not a whole parquet"),
    ("a", lambda f: (f.mkdir(), (f / "dataset_info.json").write_text("{")), "not a whole data set that save_to_disk"),
])
def test_text_that_cannot_be_read_names_its_file(name, make, says, tiny, tmp_path):
    make(tmp_path / name)
    if says is None:
        assert list(sources.documents(str(tmp_path / name), tiny())) == []
        with pytest.raises(ParameterError, match="corpus: '.*a.* holds no text for training"):
            activations.extract(tiny(corpus=str(tmp_path / name)))
    else:
        with pytest.raises(ParameterError, match=says):
            list(sources.documents(str(tmp_path / name), tiny()))


def test_a_file_kept_from_us_is_named(tiny, tmp_path, monkeypatch):
    file = tmp_path / "kept.txt"
    file.write_text("words")
    opened = Path.open

    def refused(path, *args, **options):
        if path.name == "kept.txt":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ParameterError, match="kept.txt cannot be read .*Permission denied"):
        list(sources.documents(str(file), tiny()))
    with pytest.raises(ParameterError, match="kept.txt: cannot be read .Permission denied"):
        params.activations_name(tiny(corpus=str(file)))


# -- models and downloads ----------------------------------------------------------------------------------------

@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(language_model.folder_of("tiny"), tmp_path / "model")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [
    lambda f: cut(f / "model.safetensors"),
    lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"x": torch.ones(2)})),
    lambda f: (f / "model.safetensors").unlink(),
    lambda f: (f / "config.json").write_text("{"),
    lambda f: (f / "config.json").write_text('{"model_type": "no such"}'),
    lambda f: (f / "config.json").unlink(),
    lambda f: (f / "tokenizer.json").write_text('{"version"'),
])
def test_a_damaged_model_folder_is_one_clear_error(damage, folder):
    damage(folder)
    with pytest.raises(ParameterError, match="model: '.*model' cannot be loaded: the folder .* does not hold it whole"):
        language_model.load(str(folder), hook="blocks.0.hook_resid_post", dtype="float32", device="cpu")


def test_a_layer_that_a_folder_s_model_lacks_stops_before_work(folder, tiny, elsewhere):
    with pytest.raises(ParameterError, match="layer: model '.*' has 2 layers .0 to 1., not 9"):
        activations.extract(tiny(model=str(folder), layer=9))
    assert not (elsewhere / "activations").exists()


def test_a_model_of_the_hub_without_a_network_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ParameterError, match="model: 'nobody/nothing' cannot be loaded: it is not a folder here, and"):
        language_model.describe("nobody/nothing")


def test_a_cached_download_that_was_cut_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path))
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("data/en/NewsArticles.zip", b"words " * 1000)
    file = tmp_path / "wheels" / assets.ASSETS["news"].file
    file.parent.mkdir()
    for content in (held.getvalue()[:60], held.getvalue().replace(held.getvalue()[60:70], bytes(10))):
        file.write_bytes(content)
        with pytest.raises(assets.AssetError, match="'news': .* is damaged .*delete it"):
            assets.member("news", "NewsArticles.zip")


# -- runs and SAEs -----------------------------------------------------------------------------------------------

@pytest.fixture
def sae(tmp_path):
    g = torch.Generator().manual_seed(0)
    made = SparseAutoencoder.initialise(16, torch.zeros(8), architectures.get("topk")(k=3), g)
    made.save(tmp_path / "sae")
    return tmp_path / "sae"


def weights(folder, **changes):
    held = {"W_enc": torch.ones(8, 16), "b_enc": torch.ones(16), "W_dec": torch.ones(16, 8), "b_dec": torch.ones(8)}
    save_file({key: value for key, value in (held | changes).items() if value is not None},
              folder / "sae_weights.safetensors")


def config(folder, **changes):
    file = folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def described(folder, entry):
    held = json.loads((folder / "cfg.json").read_text())
    held["metadata"]["workbook"]["ingredients"] = [entry]
    (folder / "cfg.json").write_text(json.dumps(held))


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "sae_weights.safetensors").write_bytes(pickle.dumps([1])), "sae_weights.safetensors: cannot be"),
    (lambda f: torch.save({"W_enc": 1}, f / "sae_weights.safetensors"), "sae_weights.safetensors: cannot be read"),
    (lambda f: cut(f / "sae_weights.safetensors"), "sae_weights.safetensors: cannot be read"),
    (lambda f: weights(f, W_enc=torch.ones(16, 8)), r"shapes .* do not fit each other"),
    (lambda f: weights(f, b_enc=None), "'b_enc'"),
    (lambda f: weights(f, b_dec=torch.ones(8, dtype=torch.int64)), "floating-point"),
    (lambda f: (f / "cfg.json").write_text("[]"), "cfg.json: damaged"),
    (lambda f: (f / "cfg.json").write_text("[" * 100_000), "cfg.json: damaged JSON"),
    (lambda f: (f / "cfg.json").unlink(), "cfg.json: cannot be read"),
    (lambda f: config(f, metadata=None), "cfg.json: damaged"),
    (lambda f: config(f, metadata={}, k=17), "k = 17, input_scale = 1.0 with 16 latents"),
    (lambda f: config(f, metadata={}, k="3"), "k = 3"),
    (lambda f: config(f, metadata={}, architecture=["topk"]), "is not known"),
    (lambda f: described(f, {"name": "nothing"}), "cfg.json: damaged"),
    (lambda f: described(f, {"name": "row_norms"}), "cfg.json: damaged"),
])
def test_a_damaged_sae_names_its_file(damage, says, sae):
    damage(sae)
    with pytest.raises(runs.RunError, match=says) as error:
        load_sae(sae)
    assert str(sae) in str(error.value)


@pytest.mark.parametrize("name, text, says", [
    ("params.yaml", "k: [\n", "params.yaml: not valid YAML"),
    ("params.yaml", "- k\n", "params.yaml: expected a mapping of names"),
    ("params.yaml", "1: 2\n", "params.yaml: 1: names are words"),
    ("params.yaml", "when: 2001-99-99\n", "params.yaml: not valid YAML"),
    ("training.json", '{"steps": 1', "training.json: damaged JSON"),
    ("training.json", "[1]", "training.json: expected a mapping, got a list"),
    ("training.json", '{"steps": 1}', "training.json, .* is damaged"),
])
def test_a_run_s_damaged_file_is_named(name, text, says, elsewhere):
    run = runs.Run("a")
    runs.write_text(run.path / "params.yaml", "k: 3\n")
    runs.write_json(run.path / "training.json", {"steps": 1})
    (run.path / name).write_text(text)
    with pytest.raises(runs.RunError, match=says):
        validity.update(run)
