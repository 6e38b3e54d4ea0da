"""Nothing is lost: killed extractions and trainings go on to the same bits; what no longer holds is said."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from conftest import TINY
from synthetic import Interrupted, Planted

from sae_lib import presence, runs, verify
from sae_lib.data import activations
from sae_lib.evaluation import validity
from sae_lib.params import check
from sae_lib.training import checkpoint, trainer

KILLS = int(os.environ.get("SAE_WORKBOOK_KILLS", 3))
SMALL = {"run": "trial", "d_sae": 96, "k": 3, "samples": 25_600, "batch_size": 256, "lr": 2e-3, "warmup_steps": 20,
         "mode": "batch", "threads": 1, "aux_dead_after": 2_000, "checkpoint_every": 10, "log_points": 20}
ORTHOGONAL = {"ingredients": [{"name": "progressive_orthogonality", "weight": 0.1, "chunk": 16}]}
CONTROLLED = {"architecture": "standard", "l1": 5.0, "target_l0": 4}


# -- in one process ------------------------------------------------------------------------------------------------

def train(home, source=None, **values):
    """Train in a home; a fault of the source is swallowed and gives None."""
    os.environ["SAE_WORKBOOK_HOME"] = str(home)
    p = check("train", SMALL | values)
    run = runs.start(p)
    try:
        return trainer.train(p, source or Planted(), run), run
    except OSError:
        return None, run


@pytest.fixture
def homes(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    return tmp_path / "undisturbed", tmp_path / "disturbed"


def assert_same(one, other):
    """Weights, history and measures, bit for bit; only what is a time may differ."""
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(one.sae, name), getattr(other.sae, name)), name
    pd.testing.assert_frame_equal(one.history.drop(columns="samples_per_second"),
                                  other.history.drop(columns="samples_per_second"), check_exact=True)
    times = {"seconds", "data_wait_share", "provenance", "resumed_at"}
    assert {k: v for k, v in one.report.items() if k not in times} == \
        {k: v for k, v in other.report.items() if k not in times}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed training gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_WORKBOOK_HOME", str(tmp_path_factory.mktemp("whole")))
        return train(runs.home())[0]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The home of a training that was interrupted after 37 of 100 steps, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_WORKBOOK_HOME", str(tmp_path_factory.mktemp("cut")))
        train(runs.home(), Interrupted(37))
        return runs.home()


@pytest.mark.parametrize("values", [ORTHOGONAL | {"d_sae": 512, "k": 2}, CONTROLLED], ids=["topk", "standard"])
def test_an_interrupted_training_goes_on_to_the_same_bits(homes, values, capsys):
    whole, _ = train(homes[0], **values)
    assert train(homes[1], Interrupted(37), **values)[0] is None
    assert train(homes[1], Interrupted(25), **values)[0] is None
    resumed, run = train(homes[1], **values)
    assert_same(whole, resumed)
    assert resumed.report["resumed_at"] == [30, 50] and whole.report["resumed_at"] == []
    assert "going on from the checkpoint of step 50 of 100" in capsys.readouterr().out
    assert resumed.report["seconds"] > 0 and math.isfinite(resumed.report["seconds"])


def test_a_training_of_one_thread_keeps_to_one_as_numba_starts(tmp_path):
    """In a process of its own: numba starts once."""
    code = ("import sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(2); "
            f"from test_resume import *; home = {str(tmp_path)!r}; "
            "print(*(train(home, overwrite=True, **values)[0].report['threads'] "
            "for values in ({}, CONTROLLED, {'threads': 2})), torch.get_num_threads())")
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.project(), capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-4:] == ["1", "1", "2", "2"], done.stdout + done.stderr


def newest(run):
    return sorted((run.path / "checkpoints").iterdir())[-1]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda c: os.truncate(c / "tensors.safetensors", 5000), lambda c: flip(c / "tensors.safetensors"),
    lambda c: flip(c / "state.json"), lambda c: os.truncate(c / "state.json", 100),
    lambda c: (c / "tensors.safetensors").unlink(), lambda c: (c / "state.json").write_text("[]"),
    lambda c: (c / "state.json").write_bytes(b"\xff\xfe"),
])
@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_falls_back_and_says_so(homes, whole, cut, damage, both, capsys):
    shutil.copytree(cut, homes[1])
    os.environ["SAE_WORKBOOK_HOME"] = str(homes[1])
    run = runs.Run("trial")
    damage(newest(run))
    if both:
        damage(sorted((run.path / "checkpoints").iterdir())[0])
    resumed, _ = train(homes[1])
    text = capsys.readouterr().out
    assert "checkpoint of step 30 is damaged" in text
    assert ("step 20 is damaged" in text) == both and resumed.report["resumed_at"] == ([] if both else [20])
    assert_same(whole, resumed)


@pytest.mark.parametrize("values, named", [({"k": 4}, "k:"), ({"threads": 2}, "threads:"),
                                           ({"samples": 30_000}, "samples:")])
def test_checkpoints_of_other_parameters_are_not_used(homes, cut, values, named, capsys):
    shutil.copytree(cut, homes[1])
    resumed, run = train(homes[1], **values)
    torch.set_num_threads(1)
    assert f"was made with other {named} not used" in capsys.readouterr().out
    assert resumed.report["resumed_at"] == [] and len(list((run.path / "checkpoints").iterdir())) == 2


def test_how_often_is_no_other_parameter_and_0_writes_none(homes, cut):
    shutil.copytree(cut, homes[1])
    assert [int(path.name) for path in sorted((homes[1] / "runs/trial/checkpoints").iterdir())] == [20, 30]
    assert train(homes[1], checkpoint_every=0)[0].report["resumed_at"] == [30]
    _, run = train(homes[0], checkpoint_every=0)
    assert not (run.path / "checkpoints").exists()


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(homes, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    result, run = train(homes[1])
    assert result.report["steps"] == 100 and list((run.path / "checkpoints").iterdir()) == []
    text = capsys.readouterr().out
    assert re.search("no checkpoint of step 10 .*space left.*; training goes on", text)


# -- killed ---------------------------------------------------------------------------------------------------------

TRAINING = """
import json, sys
from sae_lib import params, runs
from sae_lib.data import activations
from sae_lib.training import trainer
p = params.check("train", json.loads(sys.argv[1]))
trainer.train(p, activations.source(p), runs.start(p))
"""
EXTRACTION = """
import json, sys
from sae_lib import params
from sae_lib.data import activations
print(activations.extract(params.check("extract", json.loads(sys.argv[1]))).content_hash)
"""


def command(script, home, values):
    return subprocess.Popen([sys.executable, "-c", script, json.dumps(values)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.DEVNULL, env=os.environ | {"SAE_WORKBOOK_HOME": str(home)})


def disturb(script, home, values, began, within, draw):
    """Run, kill -9 at a random moment after ``began()`` is true; give whether it was killed in its work."""
    process = command(script, home, values)
    while process.poll() is None and not began():
        time.sleep(0.002)
    time.sleep(draw.uniform(0, within))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def finish(script, home, values):
    text, _ = (process := command(script, home, values)).communicate()
    assert process.returncode == 0, text
    return text


def test_killed_trainings_end_in_the_same_bits(tmp_path, tiny_store):
    draw = random.Random(seed := random.randrange(10 ** 6))
    values = SMALL | ORTHOGONAL | {"activations": str(tiny_store.path), "model": "tiny", "layer": 1, "d_sae": 256,
                                   "k": 8, "samples": 600_000, "checkpoint_every": 25}
    finish(TRAINING, tmp_path / "whole", values)
    folder = tmp_path / "killed/runs/trial"
    killed = 0
    for number in range(KILLS):
        before = {path.name for path in folder.glob("checkpoints/*")}

        def began(number=number, before=before):
            return (folder / "params.yaml").exists() if number == 0 else \
                {path.name for path in folder.glob("checkpoints/[0-9]*")} - before
        killed += disturb(TRAINING, tmp_path / "killed", values, began, 3.0 / KILLS, draw)
    text = finish(TRAINING, tmp_path / "killed", values)
    whole = tmp_path / "whole/runs/trial"
    assert killed >= min(KILLS, 2) and ("going on from" in text or KILLS < 2), (seed, killed, text)
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json"):
        assert runs.sha256(whole / name) == runs.sha256(folder / name), (seed, name)
    one, other = (pd.read_parquet(path / "history.parquet").drop(columns="samples_per_second")
                  for path in (whole, folder))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert not list(folder.rglob("*.tmp"))


def test_killed_extractions_end_in_the_same_bits(tmp_path, workbook_home):
    draw = random.Random(seed := random.randrange(10 ** 6))
    values = TINY | {"tokens": 60_000, "store_shard_tokens": 512, "threads": 1}
    whole = finish(EXTRACTION, tmp_path / "whole", values)
    killed, store = 0, tmp_path / "killed/activations"
    for _ in range(KILLS):
        before = len(list(store.glob("*/*-*.json")))
        killed += disturb(EXTRACTION, tmp_path / "killed", values,
                          lambda before=before: len(list(store.glob("*/*-*.json"))) > before or
                          (not before and any(store.glob("*.partial"))), 1.0 / KILLS, draw)
    again = finish(EXTRACTION, tmp_path / "killed", values)
    assert killed >= min(KILLS, 2) and again.split()[-1] == whole.split()[-1], (seed, killed)
    assert sorted(path.name for path in store.glob("*/*")) == \
        sorted(path.name for path in (tmp_path / "whole/activations").glob("*/*"))


def test_a_finished_store_whose_manifest_was_removed_is_taken_up(elsewhere, tiny, capsys):
    """As Snakemake does before it runs an interrupted job again; but not where a shard changed."""
    store = activations.extract(tiny())
    manifest = (store.path / "manifest.json").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in store.path.glob("*.safetensors")}
    (store.path / "manifest.json").unlink()
    activations.extract(tiny())
    assert "finished before" in capsys.readouterr().out
    assert (store.path / "manifest.json").read_bytes() == manifest
    assert times == {path: path.stat().st_mtime_ns for path in store.path.glob("*.safetensors")}
    (store.path / "manifest.json").unlink()
    flip(store.path / "train-00000.safetensors")
    again = activations.extract(tiny())
    again.verify()
    assert again.content_hash == store.content_hash and "finished before" not in capsys.readouterr().out


# -- presence -------------------------------------------------------------------------------------------------------

def test_two_processes_do_not_work_on_one_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    code = f"from sae_lib import presence; import time; h = presence.hold({str(tmp_path / 'x')!r}, 'x')\n" \
           "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(presence.Busy, match=f"run 'x': process {process.pid} works on it; wait for it or end it"):
        presence.hold(tmp_path / "x", "run 'x'", patience=0.3)
    process.kill()
    with presence.alone(tmp_path / "x", "x", patience=5):
        pass


def test_a_process_ends_with_its_engine():
    engine = subprocess.Popen(["sleep", "60"])
    code = "import sae_lib, time; print('up', flush=True); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {presence.ENGINE: str(engine.pid)})
    assert worker.stdout.readline() == "up\n"
    engine.kill()  # not waited for: a zombie has ended, too
    assert worker.wait(timeout=10) == 1
    engine.wait()
    late = subprocess.run([sys.executable, "-c", code], env=os.environ | {presence.ENGINE: str(engine.pid)})
    assert late.returncode == 1 and not psutil.pid_exists(engine.pid)


# -- verify ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sealed_home(tiny, tmp_path_factory):
    """A home with a trained, sealed run on a store of its own, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_WORKBOOK_HOME", str(tmp_path_factory.mktemp("sealed")))
        activations.extract(tiny())
        p = check("train", TINY | SMALL | {"samples": 5120})
        run = runs.start(p)
        trainer.train(p, activations.source(p), run)
        validity.update(run)
        verify.seal(run, "02_train_variant")
        return runs.home()


@pytest.fixture
def sealed(elsewhere, sealed_home):
    """A trained, sealed run on a store of its own."""
    shutil.copytree(sealed_home, elsewhere, dirs_exist_ok=True)
    return runs.Run("trial")


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("damage, says", [
    (lambda r: flip(r.path / "sae/sae_weights.safetensors"), "sae/sae_weights.safetensors: changed"),
    (lambda r: (r.path / "history.parquet").unlink(), "history.parquet: missing"),
    (lambda r: change(r.path / "training.json", lambda t: t.update(l0=1.0)), "training.json: changed"),
    (lambda r: runs.write_json(r.path / "evals/core.json", {}), "evals/core.json: not among what the stages wrote"),
    (lambda r: flip(next((runs.home() / "activations").glob("*/train-00002.safetensors"))), "train-00002.*damaged"),
    (lambda r: next((runs.home() / "activations").glob("*/manifest.json")).unlink(), "no finished store"),
    (lambda r: change(r.path / "hashes.json", lambda h: h["stages"]["02_train_variant"].update(library="old")),
     "02_train_variant: stale, made by library old"),
    (lambda r: change(r.path / "hashes.json", lambda h: h["stages"]["02_train_variant"]["packages"].update(torch="1")),
     "made with torch 1, here is"),
    (lambda r: (r.path / "hashes.json").write_text("{"), "hashes.json: damaged"),
    (lambda r: (r.path / "hashes.json").unlink(), "hashes.json: missing"),
])
def test_verify_says_what_no_longer_holds(sealed, damage, says, capsys):
    assert verify.verify(str(sealed.path)) == 0 and verify.verify("runs/trial/") == 0
    assert not (sealed.path / "checkpoints").exists()
    damage(sealed)
    capsys.readouterr()
    assert verify.verify("trial") == 1
    assert re.search(says, capsys.readouterr().out)


def test_verify_is_a_command(sealed):
    words = [sys.executable, "-m", "sae_lib", "verify", "trial"]
    assert subprocess.run(words).returncode == 0
    (sealed.path / "history.parquet").unlink()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "history.parquet: missing" in done.stdout
    assert subprocess.run([*words[:-1], "../x"]).returncode == 2


def test_a_later_stage_vouches_for_its_own_files_alone(sealed):
    flip(sealed.path / "sae/sae_weights.safetensors")
    runs.write_json(sealed.path / "evals/core.json", {})
    verify.seal(sealed, "03_eval")
    assert verify.faults(sealed) == ["sae/sae_weights.safetensors: changed since it was written"]
    with pytest.raises(runs.RunError, match="run 'none': no params.yaml"):
        verify.verify("none")


def test_a_training_stopped_by_hand_keeps_its_checkpoints(homes, whole):
    class ByHand(Planted):
        def batches(self, batch_size, samples, **how):
            for number, batch in enumerate(super().batches(batch_size, samples, **how)):
                if samples > batch_size * 2 and number == 37:
                    raise KeyboardInterrupt
                yield batch
    stopped, run = train(homes[1], ByHand())
    verify.seal(run, "02_train_variant")
    assert stopped.report["steps"] == 37
    resumed, _ = train(homes[1])
    assert resumed.report["resumed_at"] == [30]
    assert_same(whole, resumed)


def test_what_killed_writes_left_is_swept_and_nothing_else(tmp_path):
    for name in (".a.json.12.tmp", ".tmpgbcfwZ", "kept.safetensors", ".hidden"):
        (tmp_path / name).write_text("x")
    runs.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept.safetensors"]
