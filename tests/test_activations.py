import json
import shutil

import numpy as np
import pytest
import torch

from sae_lib import params, runs
from sae_lib.data import activations, capture, page, store
from sae_lib.data.language_model import load
from sae_lib.params import ParameterError


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def whole(batches):
    return store.join(list(batches))


def copy(tiny_store, folder):
    return type(folder)(shutil.copytree(tiny_store.path, folder / "copy"))


def keys(rows):
    return torch.stack([rows.block, rows.position], 1).tolist()


# -- what is extracted -------------------------------------------------------------------------------------------

def test_rows_are_the_residual_stream_of_their_token(tiny_store, tiny):
    model = load("tiny", hook=tiny().hook, dtype="float32", device="cpu")
    blocks = tiny_store.train_blocks()
    rows = whole(tiny_store.batches(256, tiny_store.n_train // 256 * 256, seed=3))
    expected = model.residual(blocks)[rows.block.long(), rows.position.long()]
    torch.testing.assert_close(rows.x, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows.token, blocks[rows.block.long(), rows.position.long()].int())
    assert (rows.position > 0).all() and (blocks[:, 0] == 2).all()
    assert not set(rows.token.tolist()) & {0, 1, 2}


def test_what_is_dropped_is_counted(tiny, elsewhere):
    made = activations.extract(tiny(max_norm_ratio=1.1))
    model = load("tiny", hook=tiny().hook, dtype="float32", device="cpu")
    blocks = made.train_blocks()
    norm, special = model.residual(blocks)[:, 1:].norm(dim=-1), blocks[:, 1:] == 1
    median = made.manifest["median_norm"]
    assert median == pytest.approx(norm[~special].median().item(), rel=0.01)
    counts = made.manifest["counts"]["train"]
    outliers = (norm[~special] > 1.1 * median).sum().item()
    assert outliers > 0 and counts["outliers_dropped"] == pytest.approx(outliers, abs=2)
    assert counts["bos_dropped"] == len(blocks) and counts["special_dropped"] == special.sum().item()
    assert counts["rows"] + counts["outliers_dropped"] + counts["special_dropped"] == counts["text_tokens"]
    assert made.n_train == counts["rows"] == sum(s["rows"] for s in made.manifest["shards"]["train"])
    assert whole(made.batches(100, made.n_train)).x.norm(dim=1).max() <= 1.1 * median + 1e-3
    histogram = made.manifest["norm_histogram"]
    assert sum(histogram["counts"]) == counts["rows"] + counts["outliers_dropped"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1


def test_scale_and_mean_are_those_of_the_training_rows(tiny_store):
    rows = whole(tiny_store.batches(tiny_store.n_train, tiny_store.n_train))
    torch.testing.assert_close(rows.x.mean(0), tiny_store.mean, rtol=1e-4, atol=1e-4)
    assert ((rows.x * tiny_store.scale).square().sum(1).mean().item()) == pytest.approx(tiny_store.d_in, rel=1e-4)


def test_the_manifest_says_what_the_store_is(tiny_store, tiny):
    manifest = tiny_store.manifest
    assert tiny_store.name == manifest["name"] == params.activations_name(tiny())
    assert manifest["model"]["identity"] == "tiny-gemma2-v2" and manifest["dtype"] == "float32"
    assert manifest["provenance"]["packages"]["torch"] and manifest["tokens_per_second"] > 0
    assert len(manifest["shards"]["train"]) == 6 and not list(tiny_store.path.glob("train-*.json"))
    for table in (page.counts(manifest), page.facts(manifest), page.examples(manifest)):
        assert len(table) >= 5 and not table.isna().any().any()
    assert len(tiny_store.heldout_texts()) == sum(manifest["counts"]["heldout"]["documents"].values())


def test_a_finished_store_is_not_extracted_again(tiny_store, tiny, monkeypatch):
    monkeypatch.setattr(activations.language_model, "load", lambda *_, **__: pytest.fail("loaded the model"))
    assert activations.extract(tiny()).content_hash == tiny_store.content_hash
    train = params.check("train", {n: getattr(tiny(), n) for n in params.Extract.model_fields})
    assert activations.source(train).content_hash == tiny_store.content_hash
    named = train.model_copy(update={"activations": tiny_store.name})
    assert activations.find(named).content_hash == tiny_store.content_hash


def test_bfloat16_is_kept_as_such(tiny, elsewhere):
    made = activations.extract(tiny(dtype="bfloat16", tokens=2000))
    assert made.manifest["dtype"] == "bfloat16" and next(made.batches(8, 8)).x.dtype == torch.float32


# -- interruption and damage -------------------------------------------------------------------------------------

def interrupt(monkeypatch, tiny, after):
    """Extract until ``after`` shards are written, as a killed process would."""
    write, done = activations._write_shard, []

    def stopping(*args):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(args)
        return write(*args)

    monkeypatch.setattr(activations, "_write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        activations.extract(tiny())
    monkeypatch.setattr(activations, "_write_shard", write)
    (partial,) = (runs.home() / "activations").glob("*.partial")
    return partial


def count_shards(monkeypatch):
    write, done = activations._write_shard, []
    monkeypatch.setattr(activations, "_write_shard", lambda *args: done.append(args[6].name) or write(*args))
    return done


def test_an_interrupted_extraction_goes_on(tiny_store, tiny, elsewhere, monkeypatch):
    interrupt(monkeypatch, tiny, after=4)  # three shards are held out
    assert not activations.folder(tiny()).exists()
    done = count_shards(monkeypatch)
    again = activations.extract(tiny())
    assert done and not {"heldout-00000.safetensors", "train-00000.safetensors"} & set(done)
    assert again.content_hash == tiny_store.content_hash and again.scale == tiny_store.scale
    assert again.manifest["counts"] == tiny_store.manifest["counts"]
    assert not list((elsewhere / "activations").glob("*.partial"))


def test_a_shard_damaged_in_between_is_written_again(tiny_store, tiny, elsewhere, monkeypatch):
    partial = interrupt(monkeypatch, tiny, after=5)
    (partial / "train-00000.safetensors").write_bytes(b"not a shard")
    (partial / "train-00001.json").write_text("{")
    done = count_shards(monkeypatch)
    assert activations.extract(tiny()).content_hash == tiny_store.content_hash
    assert {"train-00000.safetensors", "train-00001.safetensors"} <= set(done)


def test_damaged_blocks_start_again(tiny_store, tiny, elsewhere, monkeypatch):
    partial = interrupt(monkeypatch, tiny, after=2)
    (partial / "blocks.safetensors").write_bytes(b"no")
    assert activations.extract(tiny()).content_hash == tiny_store.content_hash


def test_a_folder_made_beforehand_is_filled(tiny_store, tiny, elsewhere):
    target = activations.folder(tiny())
    target.mkdir(parents=True)
    (target / "train-00000.safetensors").write_bytes(b"of a store whose manifest was taken away")
    made = activations.extract(tiny())
    made.verify()
    assert made.content_hash == tiny_store.content_hash


@pytest.mark.parametrize("damage, said", [
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: damaged JSON"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: not a store of format"),
    (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "manifest.json: damaged .*shards"),
    (lambda f: (f / "train-00001.safetensors").unlink(), r"train-00001.safetensors: damaged \(missing\)"),
    (lambda f: (f / "train-00001.safetensors").write_bytes(b"x"), "train-00001.safetensors: damaged .its hash"),
    (lambda f: flip(f / "train-00001.safetensors"), "train-00001.safetensors: damaged .its hash"),
])
def test_damage_is_one_clear_error(damage, said, tiny_store, tmp_path):
    folder = copy(tiny_store, tmp_path)
    damage(folder)
    with pytest.raises(runs.RunError, match=said) as error:
        list(activations.open_store(folder).batches(64, 6000))
    assert "01_extract" in str(error.value) or "run its stage again" in str(error.value)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def test_a_store_that_is_not_there_says_how_to_get_it(tiny, elsewhere):
    train = params.check("train", {n: getattr(tiny(), n) for n in params.Extract.model_fields})
    with pytest.raises(ParameterError, match=f"{params.activations_name(tiny())}; run 01_extract"):
        activations.find(train)
    with pytest.raises(ParameterError, match="activations: no finished store"):
        activations.find(train.model_copy(update={"activations": "nothing"}))


def test_a_named_store_of_another_layer_is_refused(tiny_store, tiny):
    train = params.check("train", {"model": "tiny", "layer": 0, "activations": str(tiny_store.path)})
    with pytest.raises(ParameterError, match="activations: store .* holds blocks.1.hook_resid_post"):
        activations.find(train)


def test_what_does_not_fit_the_disk_stops_before_work(tiny, elsewhere, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ParameterError, match="store: .* store: stream"):
        activations.extract(tiny())
    assert "GB in activations/tiny-1" in capsys.readouterr().out and not list(elsewhere.glob("activations/tiny*"))


def test_a_layer_that_the_model_lacks_stops_before_work(tiny, elsewhere):
    with pytest.raises(ParameterError, match="layer: model 'tiny' has 2 layers"):
        activations.extract(tiny(layer=2))


# -- reading -----------------------------------------------------------------------------------------------------

@pytest.fixture(params=["in memory", "by groups of shards"])
def reader(request, tiny_store, monkeypatch):
    if request.param == "by groups of shards":  # the store is smaller than the smallest buffer
        monkeypatch.setattr(store.Store, "_groups", by_thirds)
    return store.open_store(tiny_store.path)


def by_thirds(self, epoch, seed):
    drawn = torch.randperm(len(self._shards["train"]), generator=store.generator(seed, epoch, "shards")).numpy()
    return [sorted(part.tolist()) for part in np.array_split(drawn, 3)]


def test_an_epoch_holds_every_row_once(reader):
    n = reader.n_train
    two = whole(reader.batches(n, 2 * n, seed=1))
    first, second = keys(two)[:n], keys(two)[n:]
    assert sorted(first) == sorted(second) and first != second and len({tuple(k) for k in first}) == n


def test_batches_are_repeatable_and_skip_exactly(reader):
    every = list(reader.batches(500, 30_000, seed=4))
    assert len(every) == 60 and {len(b.x) for b in every} == {500}
    for start in (0, 7, 13, 59, 60):
        rest = list(reader.batches(500, 30_000, seed=4, start=start))
        assert len(rest) == 60 - start and all(same(a, b) for a, b in zip(every[start:], rest))
    assert not same(every[0], next(reader.batches(500, 500, seed=5)))
    assert every[0].x.dtype == torch.float32 and every[0].block.dtype == torch.int32


def test_blocks_in_sequence_keep_their_rows_in_order(reader):
    rows = whole(reader.batches(50, reader.n_train // 50 * 50, order="sequence_blocks", seed=2))
    change = rows.block[1:] != rows.block[:-1]
    assert (rows.position[1:] > rows.position[:-1])[~change].all()
    assert change.sum() + 1 == len(rows.block.unique()) and (rows.block[1:] < rows.block[:-1]).any()


def test_groups_of_shards_follow_the_buffer(tiny_store):
    reader = store.open_store(tiny_store.path)
    reader.buffer_mb = 1
    size = sum(f.stat().st_size for f in tiny_store.path.glob("train-*"))
    assert len(reader._groups(0, 0)) == -(-size // 2**20) == 2
    assert sorted(sum(reader._groups(0, 0), [])) == list(range(6)) and reader._groups(0, 0) != reader._groups(1, 0)


def test_a_batch_may_be_larger_than_the_store(reader):
    (batch,) = reader.batches(3 * reader.n_train, 3 * reader.n_train)
    assert len(batch.x) == 3 * reader.n_train


def test_held_out_rows(tiny_store):
    rows = tiny_store.heldout()
    assert len(rows.x) == tiny_store.n_heldout > 1900 and same(tiny_store.heldout(100), [c[:100] for c in rows])
    blocks = tiny_store.heldout_blocks(3)
    assert blocks.shape == (3, 32) and blocks.dtype == torch.int64 and (blocks[:, 0] == 2).all()


# -- streaming ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stream(tiny):
    return activations.extract(tiny(store="stream", store_buffer_mb=1))


def test_a_stream_gives_what_the_disk_gives(stream, tiny_store):
    n = tiny_store.n_train
    ours = whole(stream.batches(n, n, order="sequence_blocks"))
    theirs = whole(tiny_store.batches(n, n, order="sequence_blocks"))
    assert sorted(keys(ours)) == sorted(keys(theirs))
    place = {tuple(k): i for i, k in enumerate(keys(theirs))}
    index = torch.tensor([place[tuple(k)] for k in keys(ours)])
    torch.testing.assert_close(ours.x, theirs.x[index], rtol=1e-4, atol=1e-4)
    assert stream.scale == pytest.approx(tiny_store.scale, rel=1e-5)
    torch.testing.assert_close(stream.mean, tiny_store.mean, rtol=1e-4, atol=1e-4)
    assert stream.n_train == n and stream.d_in == 64 and not stream.path.exists()
    assert stream.heldout_texts() == tiny_store.heldout_texts()
    torch.testing.assert_close(stream.heldout().x, tiny_store.heldout().x, rtol=1e-4, atol=1e-4)
    assert torch.equal(stream.heldout_blocks(), tiny_store.heldout_blocks())


def test_a_shuffled_stream_is_bounded_repeatable_and_whole(stream, tiny_store):
    assert stream.buffer_rows == (1 << 20) // (64 * 4 + 16) // 2
    every = list(stream.batches(400, 16_000, seed=1))
    assert len(every) == 40
    rest = list(stream.batches(400, 16_000, seed=1, start=35))
    assert all(same(a, b) for a, b in zip(every[35:], rest)) and len(rest) == 5
    rows = whole(every)
    assert keys(rows)[:400] != sorted(keys(rows)[:400])
    assert len({tuple(k) for k in keys(rows)}) > 0.95 * tiny_store.n_train
    torch.testing.assert_close(rows.x.mean(0), tiny_store.mean, atol=0.1, rtol=0)


def test_a_streams_page_and_texts(stream, tiny):
    for table in (page.counts(stream.manifest), page.facts(stream.manifest), page.examples(stream.manifest)):
        assert len(table)
    runs._plain(stream.manifest)
    assert json.dumps(stream.manifest)
    train = params.check("train", {n: getattr(stream.p, n) for n in params.Extract.model_fields})
    assert activations.heldout_texts(train) == stream.heldout_texts()


def test_text_without_a_token_is_refused(tiny_model):
    with pytest.raises(ParameterError, match="corpus: no text tokens"):
        capture.median_norm(tiny_model, np.full((4, 8), 2, dtype=np.int32))
