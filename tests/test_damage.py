"""Damage drawn at random to parameters, manifests, SAE folders and result JSON.

Each kind of damage is harmless, or one ParameterError or RunError that names the file (a run of 05: one row that names
it). Any other exception fails, and hypothesis shows the smallest damage that raises it. A kind is what is done, and at
what place (key or file); the last test counts those that were drawn.
"""

import copy
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lib import params, runs, studies
from sae_lib.data import activations, page
from sae_lib.data.store import open_store
from sae_lib.evaluation import compare, results, validity
from sae_lib.params import ParameterError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.foreign import load_foreign
from sae_lib.training.ingredients import load_sae
from sae_lib.views import figures

KINDS: set[tuple] = set()
"""(what was damaged, where in it, how), as drawn."""
FEW = settings(max_examples=150, deadline=None, database=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# -- how things are damaged --------------------------------------------------------------------------------------

VALUES = {"null": None, "true": True, "nought": 0, "negative": -1, "huge": 10**400, "large": 2**63, "half": 0.5,
          "nan": math.nan, "infinite": math.inf, "empty text": "", "word": "nothing", "number as text": "64",
          "path": "../../../etc/passwd", "shell": "$(touch x); `ls`", "nul": "a\0b", "long": "x" * 300,
          "list": [1, "a"], "empty list": [], "mapping": {"a": 1}, "nested": [[[{}]]]}
BYTES = {
    "empty": lambda b, r: b"", "cut": lambda b, r: b[:r.randrange(len(b))], "doubled": lambda b, r: b + b,
    "flipped": lambda b, r: _at(b, r, bytes([b[r.randrange(len(b))] ^ 1 << r.randrange(8)])),
    "zeroed": lambda b, r: _at(b, r, bytes(r.randrange(1, 64))), "garbled": lambda b, r: _at(b, r, r.randbytes(16)),
    "header": lambda b, r: r.randbytes(8) + b[8:], "junk": lambda b, r: r.randbytes(200),
    "pickle": lambda b, r: b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "text": lambda b, r: b"version https://git-lfs.github.com/spec/v1\n", "reversed": lambda b, r: b[::-1],
    "utf-16": lambda b, r: b.decode("latin-1").encode("utf-16"), "deep": lambda b, r: b"[" * 10_000,
}


def _at(content, draw, patch):
    place = draw.randrange(max(len(content) - len(patch), 1))
    return content[:place] + patch + content[place + len(patch):]


def places(value, path=()):
    """Every key and index within plain values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def altered(what, value, draw):
    """A copy of plain values with one of them replaced, taken out, or its key misspelt; the kind is noted."""
    value, path = copy.deepcopy(value), draw.draw(st.sampled_from(list(places(value))))
    how = draw.draw(st.sampled_from([*VALUES, "gone", "misspelt"]))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if how == "gone" or (how == "misspelt" and isinstance(holder, list)):
        del holder[path[-1]]
    elif how == "misspelt":
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
    else:
        holder[path[-1]] = copy.deepcopy(VALUES[how])
    KINDS.add((what, ".".join("#" if isinstance(part, int) else part for part in path), how))
    return value


def damage_file(what, file, draw):
    """Damage a file: its bytes, or one value of its JSON."""
    if file.suffix == ".json" and draw.draw(st.booleans()):
        file.write_text(json.dumps(altered(f"{what} {file.name}", json.loads(file.read_text()), draw)))
        return
    how, seed = draw.draw(st.sampled_from(list(BYTES))), draw.draw(st.integers(0, 2**16))
    file.write_bytes(BYTES[how](file.read_bytes(), random.Random(seed)))
    KINDS.add((what, file.name, how))


def harmless_or_named(work, *names):
    """Whether the work went well; a known error must name one of ``names`` and stay short enough to read."""
    try:
        work()
        return True
    except (ParameterError, runs.RunError) as error:
        assert any(name in str(error) for name in names), f"names none of {names}: {error}"
        assert len(str(error)) < 8000
        return False


# -- parameters --------------------------------------------------------------------------------------------------

@FEW
@given(draw=st.data())
def test_parameters(draw, tmp_path, monkeypatch):
    """Any value of any name: as a file that is read, checked, named and planned with."""
    stage = draw.draw(st.sampled_from(sorted(params.STAGES)))
    plain = {key: field.get_default(call_default_factory=True)
             for key, field in params.STAGES[stage].model_fields.items()}
    plain |= {key: {"a": 1.0} for key in ("corpus",) if key in plain}
    values = altered(f"parameters of {stage}", plain, draw)
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))

    def work():
        p = params.check(stage, params.load_yaml(file), str(file))
        runs.Run(p.run)
        if isinstance(p, params.Extract):
            params.activations_name(p)
        json.dumps(runs._plain(p.model_dump()))

    harmless_or_named(work, "values.yaml", "run: ")


@settings(FEW, max_examples=80)
@given(draw=st.data())
def test_studies(draw, tmp_path, monkeypatch):
    """A study's files, damaged in values or bytes."""
    monkeypatch.setattr(runs, "project", lambda: tmp_path)
    for name, value in {"models/m": {"model": "tiny", "layer": 0}, "variants/v": {"k": 8, "d_sae": 64, "ingredients": [
            {"name": "progressive_orthogonality", "weight": 0.1, "threshold": {"kind": "linear", "start": 0.1}}]},
            "studies/s": {"models": ["m"], "variants": ["v"], "seeds": [1, 2], "sweep": {"k": [4, 8]},
                          "shared": {"lr": 0.1}, "baseline": "v"}}.items():
        runs.write_text(tmp_path / f"params/{name}.yaml", json.dumps(value))
    name = draw.draw(st.sampled_from(["models/m", "variants/v", "studies/s"]))
    file = tmp_path / f"params/{name}.yaml"
    if draw.draw(st.booleans()):
        file.write_text(json.dumps(altered(name, json.loads(file.read_text()), draw)))
    else:
        damage_file(name, file, draw)

    def work():
        members = studies.expand("s")
        studies.check_ingredients(members)

    harmless_or_named(work, f"{name}.yaml", "params/models", "params/variants", "studies: ", "run: ")


# -- stores ------------------------------------------------------------------------------------------------------

@FEW
@given(draw=st.data())
def test_stores(draw, tiny_store, tmp_path_factory):
    """A store's files: opening, hashing and reading it."""
    folder = tmp_path_factory.mktemp("damaged") / tiny_store.name
    shutil.copytree(tiny_store.path, folder)
    name = draw.draw(st.sampled_from(["manifest.json"] * 4 + ["train-00001.safetensors", "blocks.safetensors",
                                                              "heldout-00000.safetensors", "heldout.jsonl"]))
    damage_file("store", folder / name, draw)

    def work():
        store = open_store(folder)
        store.verify()
        rows = next(iter(store.batches(64, 64)))
        assert rows.x.shape == (64, store.d_in) and math.isfinite(store.scale)
        store.heldout()
        store.heldout_blocks(2)
        store.heldout_texts()
        activations.open_named(str(folder))
        for shown in (page.facts, page.counts, page.examples, figures.norm_histogram):
            shown(store.manifest)

    harmless_or_named(work, str(folder), "hook_name", "manifest.json: damaged")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Activations computed elsewhere."""
    folder = tmp_path_factory.mktemp("rows")
    x = np.random.default_rng(0).normal(size=(640, 64)).astype(np.float32)
    np.save(folder / "a.npy", x)
    from safetensors.numpy import save_file

    save_file({"x": x}, folder / "b.safetensors")
    (folder / "texts.jsonl").write_text('{"text": "words"}\n' * 5)
    (folder / "manifest.json").write_text(json.dumps({
        "model": "tiny", "hook": "blocks.1.hook_resid_post", "d_in": 64, "context": 32, "heldout_share": 0.1,
        "tensor": "x", "heldout_texts": "texts.jsonl",
        "files": ["a.npy", {"file": "b.safetensors", "sha256": runs.sha256(folder / "b.safetensors")}]}))
    return folder


@FEW
@given(draw=st.data())
def test_activations_computed_elsewhere(draw, rows, tmp_path_factory, monkeypatch):
    """The manifest and files of anybody's making."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path_factory.mktemp("damaged") / "rows"
    shutil.copytree(rows, folder)
    damage_file("rows", folder / draw.draw(st.sampled_from(["manifest.json"] * 3 + ["a.npy", "b.safetensors",
                                                                                    "texts.jsonl"])), draw)

    def work():
        store = activations.open_named(str(folder))
        store.verify()
        assert next(iter(store.batches(32, 32))).x.isfinite().all()
        store.heldout()
        store.heldout_texts()

    harmless_or_named(work, str(folder), "hook_name")
    shutil.rmtree(folder)


# -- SAEs --------------------------------------------------------------------------------------------------------

def ours(folder):
    g = torch.Generator().manual_seed(0)
    SparseAutoencoder.initialise(16, torch.zeros(8), architectures.get("topk")(k=3), g).save(folder)


def sparsify(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"encoder.weight": torch.ones(16, 8), "encoder.bias": torch.ones(16), "W_dec": torch.ones(16, 8),
               "b_dec": torch.ones(8)}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 3, "num_latents": 16, "d_in": 8,
                                                 "transcode": False, "skip_connection": False}))


def dictionary_learning(folder):
    folder.mkdir()
    torch.save({"encoder.weight": torch.ones(16, 8), "encoder.bias": torch.ones(16),
                "decoder.weight": torch.ones(8, 16), "b_dec": torch.ones(8), "k": torch.tensor(3),
                "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {
        "dict_class": "AutoEncoderTopK", "k": 3, "layer": 1, "lm_name": "tiny", "submodule_name": None}}))


SAES = {"ours": (ours, load_sae), "SAELens": (ours, load_foreign), "sparsify": (sparsify, load_foreign),
        "dictionary_learning": (dictionary_learning, load_foreign)}


@settings(FEW, max_examples=500)
@given(draw=st.data())
def test_saes(draw, tmp_path_factory):
    """SAE folders of every format: what loads also computes."""
    kind = draw.draw(st.sampled_from(list(SAES)))
    make, load = SAES[kind]
    folder = tmp_path_factory.mktemp("damaged") / "sae"
    make(folder)
    damage_file(kind, draw.draw(st.sampled_from(sorted(folder.iterdir()))), draw)
    harmless_or_named(lambda: load(folder)(torch.ones(2, load(folder).d_in)), str(folder))
    shutil.rmtree(folder)


# -- results -----------------------------------------------------------------------------------------------------

WHOLE = {
    "params.yaml": {"role": "normal", "model": "tiny", "seed": 1, "architecture": "topk", "d_sae": 64, "k": 8},
    "training.json": {
        "steps": 10, "planned_steps": 10, "nonfinite": None, "explained_variance": 0.8, "mse": 10.0, "l0": 8.0,
        "explained_variance_untrained": 0.1, "fold_error": 0.0, "d_in": 32, "d_sae": 64, "model_identity": "m",
        "mean_cos2": 0.01, "dead_share": 0.0, "samples": 1000, "unused_share": 0.0, "norm_ratio": 0.97,
        "final_loss": {"reconstruction": 10.0}, "unfinished_schedules": [], "unused_parameters": [],
        "terms": {"auxk": {"median_share": 0.1, "inert_share": 0.0, "dominating_share": 0.0}}, "seconds": 1.0,
        "hook": "blocks.1.hook_resid_post", "activations": {"content_hash": "abc"}, "provenance": {"library": "other"}},
    "validity.json": {"status": "valid", "reasons": [], "flags": ["a flag"]},
    "evals/core.json": {"metrics": {"kl_div_with_sae": 0.3, "ce_loss_score": 0.9, "l0": 8.0}, "config": {
        "comparable": "c", "model_identity": "m", "hook": "blocks.1.hook_resid_post", "d_sae": 64},
        "provenance": {"packages": {"sae-bench": "0.6.0"}}},
}


@settings(FEW, max_examples=250)
@given(draw=st.data())
def test_results(draw, tmp_path, monkeypatch):
    """A damaged run is one row of 05 and leaves the others as they are; the gate names what it cannot read."""
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    monkeypatch.setattr(runs, "library_digest", lambda: "this one")  # slow, and not what is damaged
    monkeypatch.setattr(runs, "provenance", lambda **_: {})
    for seed in (1, 2):
        for name, value in WHOLE.items():
            runs.write_json(runs.folder_of(f"s/topk-s{seed}") / name, value)
    bad = runs.folder_of("s/topk-s2")
    name = draw.draw(st.sampled_from(list(WHOLE)))
    if draw.draw(st.booleans()):
        (bad / name).write_text(json.dumps(altered(f"result {name}", WHOLE[name], draw)))
    else:
        damage_file("result", bad / name, draw)
    names = ["s/topk-s1", "s/topk-s2"]
    table = results.collect(names)
    assert table.run.tolist() == names and table.status[0] == "valid"
    assert table.status[1] in ("valid", "invalid", "null") or table.reasons[1]
    compare.compare(params.check("compare", {"study": "s", "runs": names}))
    harmless_or_named(lambda: validity.update(runs.Run("s/topk-s2")), str(bad), "s/topk-s2")


def test_at_least_a_hundred_kinds_of_damage_were_tried():
    """Runs last: the kinds that the tests above drew."""
    drawn = {what.split(" ")[0] for what, _, _ in KINDS}
    if drawn >= {"parameters", "store", "rows", "ours", "SAELens", "sparsify", "dictionary_learning", "result"}:
        assert len(KINDS) >= 500 and len({(what, how) for what, _, how in KINDS}) >= 100
