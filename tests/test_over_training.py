"""SAEs kept on the way: the same bits as a run cut there, a curve whose end is the run's own evaluation."""

import contextlib
import os

import pytest
import torch
from safetensors.torch import load_file
from synthetic import Planted

from sae_lib import params, runs, verify
from sae_lib.params import ParameterError, check
from sae_lib.training import trainer
from sae_lib.training.ingredients import load_sae

SMALL = {"run": "trial", "d_sae": 96, "k": 3, "samples": 25_600, "batch_size": 256, "lr": 2e-3, "warmup_steps": 20,
         "mode": "batch", "threads": 1, "aux_dead_after": 2_000, "checkpoint_every": 10, "log_points": 20,
         "overwrite": True}
SHARES = [0.0, 0.16, 0.51, 1.0]
VARIANTS = {"topk": {}, "orthogonal": {"ingredients": [{"name": "progressive_orthogonality", "weight": 0.1}]},
            "batch_topk": {"architecture": "batch_topk"},
            "jumprelu": {"architecture": "jumprelu", "target_l0": 4},
            "masked": {"ingredients": [{"name": "bounded_mask"}]}}


# -- training ------------------------------------------------------------------------------------------------------

class Interrupted(Planted):
    """Ends with a fault after some batches, as a kill between two steps would."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def batches(self, batch_size, samples, **how):
        for number, batch in enumerate(super().batches(batch_size, samples, **how)):
            if samples > batch_size * 2 and number == self.after:
                raise OSError("interrupted")
            yield batch


def train(home, source=None, **values):
    """Train in a home; a fault of the source is swallowed."""
    os.environ["SAE_WORKBOOK_HOME"] = str(home)
    p = check("train", SMALL | values)
    run = runs.start(p)
    with contextlib.suppress(OSError):
        trainer.train(p, source or Planted(), run)
    return run


@pytest.fixture
def homes(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    return tmp_path / "one", tmp_path / "other"


def files(folder):
    """Every tensor of a saved SAE, and its cfg.json."""
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    return tensors, runs.read_json(folder / "cfg.json")


def assert_equal(one, other):
    (tensors, cfg), (others, other_cfg) = files(one), files(other)
    assert cfg == other_cfg and tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_a_snapshot_is_what_a_run_cut_there_saves(homes, values):
    """Cut after steps that are logged in both: gradients of a logged step are summed term by term."""
    whole = train(homes[0], snapshots=SHARES, **values)
    assert sorted(int(path.name) for path in (whole.path / "snapshots").iterdir()) == [0, 16 * 256, 51 * 256]
    for steps in (0, 16, 51):
        cut = train(homes[1], stop_after_steps=steps, **values)
        assert_equal(whole.path / f"snapshots/{steps * 256}", cut.path / "sae")
    assert_equal(whole.path / "sae", train(homes[1], **values).path / "sae")


def test_training_says_what_it_kept(homes):
    run = train(homes[0], snapshots=SHARES)
    training = run.json("training.json")
    kept = training["snapshots"]
    assert [one["share"] for one in kept] == SHARES and [one["steps"] for one in kept] == [0, 16, 51, 100]
    assert [one["folder"] for one in kept] == ["snapshots/0", "snapshots/4096", "snapshots/13056", "sae"]
    assert kept[0]["explained_variance"] == pytest.approx(training["explained_variance_untrained"], abs=0.01)
    assert kept[0]["dead_share"] is None
    for name in ("explained_variance", "l0", "dead_share", "unused_share", "samples", "mean_cos2"):
        assert kept[-1][name] == training[name]
    assert kept[0]["explained_variance"] < kept[1]["explained_variance"] < kept[3]["explained_variance"]
    assert load_sae(run.path / kept[1]["folder"]).d_sae == 96
    plain = train(homes[1])
    assert plain.json("training.json")["snapshots"] == [] and not (plain.path / "snapshots").exists()


def test_a_resumed_training_keeps_the_same_snapshots(homes, capsys):
    whole = train(homes[0], snapshots=SHARES)
    train(homes[1], Interrupted(67), snapshots=SHARES)
    resumed = train(homes[1], snapshots=SHARES)
    assert "going on from the checkpoint of step 60" in capsys.readouterr().out
    assert resumed.json("training.json")["snapshots"] == whole.json("training.json")["snapshots"]
    for name in ("0", "4096", "13056"):
        assert_equal(whole.path / "snapshots" / name, resumed.path / "snapshots" / name)


def test_a_checkpoint_without_its_snapshots_is_not_used(homes, capsys):
    whole = train(homes[0], snapshots=SHARES)
    cut = train(homes[1], Interrupted(67), snapshots=SHARES)
    (cut.path / "snapshots/4096/sae_weights.safetensors").unlink()
    again = train(homes[1], snapshots=SHARES)
    said = capsys.readouterr().out
    assert "step 60 is damaged (its snapshots/4096 is missing or changed)" in said and "going on" not in said
    assert again.json("training.json")["snapshots"] == whole.json("training.json")["snapshots"]


def test_another_training_in_the_folder_leaves_no_old_snapshots(homes):
    run = train(homes[0], snapshots=[0.2, 0.5])
    train(homes[0], Interrupted(5), snapshots=[0.5], k=4)
    assert not (run.path / "snapshots").exists()
    train(homes[0], snapshots=[0.5], k=4)
    assert [path.name for path in (run.path / "snapshots").iterdir()] == ["12800"]
    train(homes[0], k=4)
    assert not (run.path / "snapshots").exists()


def test_verify_covers_snapshots(homes):
    run = train(homes[0], snapshots=SHARES)
    verify.seal(run, "02_train_variant")
    assert "snapshots/4096/sae_weights.safetensors" in run.json("hashes.json")["files"]
    (run.path / "snapshots/4096/cfg.json").write_text("{}")
    assert "snapshots/4096/cfg.json: changed since it was written" in verify.faults(run)


@pytest.mark.parametrize("values, says", [
    ([-0.1], "shares of training"), ([1.5], "shares of training"), ([0.5, 0.5], "each once"),
    ([float("nan")], "shares of training"), ([0.101, 0.102], "of 100 steps these are steps .10, 10."),
    ([0.001], "none but 0 and 1 the first or the last"), ([0.999], "steps of their own")])
def test_bad_shares_are_one_clear_error(values, says):
    with pytest.raises(ParameterError, match=f"snapshots: .*{says}"):
        params.check("train", SMALL | {"snapshots": values})


def test_an_untrained_baseline_keeps_none():
    assert check("train", {"samples": 0, "snapshots": [0.0, 0.5, 1.0]}).snapshot_steps == {}
