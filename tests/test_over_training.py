"""SAEs kept on the way: the same bits as a run cut there, a curve whose end is the run's own evaluation."""

import contextlib
import os

import pytest
import torch
from safetensors.torch import load_file
from synthetic import Interrupted, Planted

from sae_lib import params, runs, verify
from sae_lib.data import activations
from sae_lib.evaluation import compare, evaluate, letters, over_training, validity
from sae_lib.evaluation.saebench import absorption as bench
from sae_lib.params import ParameterError, check
from sae_lib.training import trainer
from sae_lib.training.ingredients import load_sae
from sae_lib.views import figures_over_training

SMALL = {"run": "trial", "d_sae": 96, "k": 3, "samples": 25_600, "batch_size": 256, "lr": 2e-3, "warmup_steps": 20,
         "mode": "batch", "threads": 1, "aux_dead_after": 2_000, "checkpoint_every": 10, "log_points": 20,
         "overwrite": True}
SHARES = [0.0, 0.16, 0.51, 1.0]
VARIANTS = {"topk": {}, "orthogonal": {"ingredients": [{"name": "progressive_orthogonality", "weight": 0.1}]},
            "batch_topk": {"architecture": "batch_topk"},
            "jumprelu": {"architecture": "jumprelu", "target_l0": 4},
            "masked": {"ingredients": [{"name": "bounded_mask"}]}}


# -- training ------------------------------------------------------------------------------------------------------

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


# -- evaluation ----------------------------------------------------------------------------------------------------

TINY = {"d_sae": 192, "k": 8, "samples": 40_000, "batch_size": 256, "lr": 2e-3, "warmup_steps": 10,
        "dead_after": 20_000, "threads": 1, "snapshots": [0.0, 0.5]}
RUNS = {"first-s1": {}, "first-s2": {"seed": 2}, "dead-s1": {"architecture": "standard", "l1": 3000.0, "l1_warmup": 0.0,
                                                           "lr": 0.02}}
CALL = {"threads": 1, "mode": "batch", "device": "cpu", "nulls": []}


@pytest.fixture(scope="module")
def trained(tiny, tiny_store, tmp_path_factory):
    """Two seeds and a dead SAE of the tiny store, in a cache of their own: other tests count on being the first."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name, changes in RUNS.items():
        p = check("train", tiny().model_dump() | TINY | changes | {"run": f"along/{name}"})
        trainer.train(p, activations.source(p), runs.start(p))
    yield
    patch.undo()


def quality(name, **changes):
    return evaluate.evaluate(check("eval", CALL | {"run": f"along/{name}", "eval_preset": "smoke"} | changes))


def absorbed(name, **changes):
    return letters.evaluate(check("letters", CALL | {"run": f"along/{name}", "absorption_preset": "smoke",
                                                     "absorption_words_per_letter": 120} | changes))


@pytest.fixture(scope="module")
def measured(trained):
    """What 03 and 04 said of the first seed, and of the dead SAE."""
    return {name: (quality(name), absorbed(name)) for name in ("first-s1", "dead-s1")}


def test_the_last_point_is_what_core_and_absorption_say(measured):
    results, found = measured["first-s1"]
    core, points = results["core"]["metrics"], results["over_training"]["points"]
    assert [point["samples"] for point in points] == [0, 78 * 256, 156 * 256]
    last = points[-1]
    assert last["metrics"]["explained_variance"] == pytest.approx(core["explained_variance"], abs=1e-5)
    assert last["metrics"]["loss_recovered"] == pytest.approx(core["ce_loss_score"], abs=1e-4)
    assert last["metrics"]["l0"] == pytest.approx(core["l0"], abs=1e-3)
    for name in ("explained_variance", "loss_recovered"):
        assert points[0]["metrics"][name] < points[1]["metrics"][name] < last["metrics"][name]
        low, high = last["interval"][name]
        assert low < last["metrics"][name] < high
    assert [point["status"] for point in points] == ["null", "valid", "valid"]
    end = found.along["points"][-1]
    assert end["metrics"] == found.report["metrics"] and end["l0_words"] == found.report["l0_words"]
    assert end["interval"] == found.report["within_this_sae"]
    assert found.along["config"]["comparable"] == found.report["config"]["comparable"]


def test_a_point_is_what_03_and_04_say_of_a_run_cut_there(measured, tiny):
    """The snapshot's folder alone, as an SAE by itself, gives the same figures."""
    run = runs.Run("along/first-s1")
    results, found = measured["first-s1"]
    p = check("train", tiny().model_dump() | TINY | {"run": "along/cut", "snapshots": [], "stop_after_steps": 78})
    trainer.train(p, activations.source(p), runs.start(p))
    cut = runs.Run("along/cut")
    assert torch.equal(load_sae(run.path / "snapshots/19968").W_dec, load_sae(cut.path / "sae").W_dec)
    core, letter = quality("cut")["core"]["metrics"], absorbed("cut").report
    point = results["over_training"]["points"][1]["metrics"]
    assert point["explained_variance"] == pytest.approx(core["explained_variance"], abs=1e-5)
    assert point["loss_recovered"] == pytest.approx(core["ce_loss_score"], abs=1e-4)
    raw = letter["raw"][42]["eval_result_metrics"]["mean"]  # a run that was cut is invalid
    assert found.along["points"][1]["metrics"] == {key: raw[key] for key in found.along["points"][1]["metrics"]}


def test_files_are_written_and_sealed(measured):
    run = runs.Run("along/first-s1")
    for stage, file in (("03_eval", "over_training"), ("04_letter_absorption", "absorption_over_training")):
        assert runs.read_json(run.path / f"evals/{file}.json")["status"] == "valid"
        verify.seal(run, "02_train_variant")
        verify.seal(run, stage)
        assert f"evals/{file}.json" in run.json("hashes.json")["files"]
    assert "over_training" in runs.read_json(run.path / "evals/done.json")["evals"]


def test_an_invalid_run_has_points_under_raw_alone(measured):
    results, found = measured["dead-s1"]
    for report in (results["over_training"], found.along):
        assert report["status"] == "invalid" and report["points"] == [] and report["not_a_result"]
        dead = report["raw"]["points"][-1]
        assert dead["metrics"] == {} and dead["interval"] == {} and "L0" in dead["not_a_result"]
    figure = figures_over_training.of_run("dead", found.along)["absorption_over_training"]
    assert "left out: dead" in figure.layout.annotations[-1].text.replace("<br>", " ")
    assert not figure.data


def test_a_snapshot_that_is_dead_has_no_score(measured, monkeypatch):
    """Its absorption is null with the reason, and a grey cross; the run's other points stay."""
    run = runs.Run("along/first-s1")
    training = run.json("training.json")
    training["snapshots"][1] |= {"dead_share": 0.97, "l0": 0.01}
    monkeypatch.setattr(runs.Run, "json", lambda self, name, default=None: training)
    asked, config = evaluate.trained(run), measured["first-s1"][1].report["config"]
    rows = [(one | {"seconds": 0}, {"metrics": {"mean_full_absorption_score": 0.0}, "interval": {}, "note": None,
                                    "l0_words": 8.0, "letters": {}}) for one in training["snapshots"]]
    report = over_training.absorption(run, asked, rows, config)
    dead = report["points"][1]
    assert dead["status"] == "invalid" and dead["metrics"] == {} and "dead: 97.0%" in dead["not_a_result"]
    assert dead["raw"]["metrics"] == {"mean_full_absorption_score": 0.0}
    assert all(point["metrics"] for number, point in enumerate(report["points"]) if number != 1)
    figure = figures_over_training.of_run("first", report)["absorption_over_training"]
    crosses = [trace for trace in figure.data if trace.name == figures_over_training.NO_SCORE]
    assert [len(trace.x) for trace in crosses] == [1, 3, 3]
    assert "dead: 97.0%" in figure.layout.annotations[-1].text.replace("<br>", " ")


def test_a_snapshot_whose_probes_find_nothing_has_no_score(measured, monkeypatch):
    real, calls = bench.absorption, []

    def first_blind(*args, **options):
        calls.append(1)
        found = real(*args, **options)
        if len(calls) == 2:  # the first of the snapshots, after the finished SAE
            found.letters.f1_by_k = found.letters.f1_by_k.map(lambda f1: [0.0] * len(f1), na_action="ignore")
        return found
    monkeypatch.setattr(bench, "absorption", first_blind)
    points = absorbed("first-s1").along["points"]
    assert len(calls) == 3  # the finished SAE once
    assert points[0]["metrics"] == {} and "no latent predicts any letter" in points[0]["not_a_result"]
    assert points[1] | {"seconds": 0} == measured["first-s1"][1].along["points"][1] | {"seconds": 0}


def test_weights_that_are_not_finite_are_not_measured(measured, monkeypatch):
    run = runs.Run("along/first-s1")
    training = run.json("training.json")
    training["snapshots"][1]["nonfinite"] = "weights are not finite"
    held = runs.Run.json
    monkeypatch.setattr(runs.Run, "json", lambda self, name, default=None: (
        training if name == "training.json" else held(self, name, default)))
    asked, config = evaluate.trained(run), measured["first-s1"][1].report["config"]
    rows = over_training.each(run, None, lambda sae: None)
    for points in (quality("first-s1")["over_training"]["points"],
                   over_training.absorption(run, asked, rows, config)["points"]):
        assert points[1]["metrics"] == {} and "not finite: weights" in points[1]["not_a_result"]


def test_it_can_be_switched_off_and_needs_snapshots(trained):
    assert set(quality("first-s2", over_training=False)) == {"core"}
    assert absorbed("first-s2", absorption_over_training=False).along == {}
    assert validity.update(runs.Run("along/first-s2")).status == "valid"


# -- figures -------------------------------------------------------------------------------------------------------

def test_05_draws_a_style_a_variant_and_seeds_as_thin_lines(measured):
    quality("first-s2"), absorbed("first-s2", absorption_over_training=False)
    names = ["along/first-s1", "along/first-s2", "along/dead-s1"]
    found = compare.compare(check("compare", {"study": "along", "runs": names}))
    assert set(found.over_training) == set(names)
    figure = figures_over_training.of_study(found)["over_training"]
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 3 * 2 + 3  # quality of both seeds, letters of one
    assert len({(trace.line.color, trace.line.dash) for trace in lines}) == 1
    assert {trace.line.width for trace in lines} == {1.2}
    assert sum(trace.showlegend for trace in lines) == 1
    untrained = [trace for trace in figure.data if trace.name == figures_over_training.UNTRAINED]
    assert untrained and all(trace.marker.color == figures_over_training.GREY for trace in untrained)
    said = figure.layout.annotations[-1].text.replace("<br>", " ")
    assert "left out: dead" in said and "no claim possible" in figures_note(found)
    other = compare.compare(check("compare", {"study": "none", "runs": ["along/absent-s1"]}))
    assert figures_over_training.of_study(other) == {}


def figures_note(found):
    from sae_lib.views.figures_compare import note

    return note(found.table, found.study)


def test_damaged_files_are_not_drawn(measured):
    run = runs.Run("along/first-s1")
    held = (run.path / "evals/over_training.json").read_text()
    try:
        runs.write_json(run.path / "evals/over_training.json", {"points": [{"samples": 3}]})
        found = compare.compare(check("compare", {"study": "along", "runs": ["along/first-s1"]}))
        assert found.over_training == {}
    finally:
        (run.path / "evals/over_training.json").write_text(held)


@pytest.mark.parametrize("number, text", [(512, "510"), (40_960, "41k"), (200_704, "200k"), (1_998_848, "2M"),
                                          (1_500_000, "1.5M"), (20_000_000, "20M"), (999_424, "1M")])
def test_ticks_are_short(number, text):
    assert figures_over_training._short(number) == text
