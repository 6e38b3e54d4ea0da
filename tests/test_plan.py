"""What a study costs before it starts: each kind of batch is timed once, what is shared is paid once, no stage is
left out, and work goes on without an estimate."""

import re

import pytest

from sae_lib import costs, params, plan, speed, studies
from sae_lib.data import language_model
from sae_lib.evaluation import embedded_nulls


class Still(speed.Speed):
    """A machine that makes 1e11 operations and ten steps of any variant a second."""

    def product(self, shape, dtype, device):
        return 1e11

    def step(self, p, width):
        return 0.1


@pytest.fixture
def nothing_there(tmp_path, monkeypatch):
    """No store, run or cache of an earlier test."""
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_nulls_there(monkeypatch):
    """No null came with the workbook."""
    monkeypatch.setattr(embedded_nulls, "FILE", embedded_nulls.FILE.with_name("none.json"))
    for held in (embedded_nulls._all, embedded_nulls._places):
        held.cache_clear()
    yield
    for held in (embedded_nulls._all, embedded_nulls._places):
        held.cache_clear()


def jobs(study, left=None, machine=None):
    return costs.jobs_of(study, studies.expand(study), machine or Still(cores=2), left)


def of(found, stage):
    return [job for job in found if job.stage == stage]


def test_every_stage_is_counted_and_what_runs_share_is_paid_once(nothing_there, no_nulls_there):
    found = jobs("progressive_seeds")
    members = studies.expand("progressive_seeds")
    assert [len(of(found, stage)) for stage in ("extract", "words", "compare")] == [1, 1, 1]
    assert not any(job.done for job in found)
    for stage in ("train", "eval", "letters"):
        assert [job.name for job in of(found, stage)] == [member.name for member in members]
        assert all(job.own > 0 for job in of(found, stage))
    assert sum(job.shared > 0 for job in of(found, "eval")) == 1, "the model's part, once"
    assert of(found, "words")[0].own > 0
    for stage in ("eval", "letters"):
        # Both variants are TopK of one width and k: they have the same nulls.
        assert sum(job.nulls > 0 for job in of(found, stage)) == 1
    first = of(found, "train")[0]
    assert first.own >= 0.1 * (first.amount // 2048)


def test_what_a_finished_job_has_paid_costs_the_next_one_nothing(nothing_there, no_nulls_there):
    members = studies.expand("quickstart")
    whole = jobs("quickstart")
    left = {("letters", member.name) for member in members[1:]} | {("compare", "quickstart")}
    rest = jobs("quickstart", left)
    assert {(job.stage, job.name) for job in rest if not job.done} == left
    assert of(rest, "words")[0].done and of(rest, "letters")[1].nulls == 0 < of(whole, "letters")[0].nulls
    minutes = plan.by_stage(rest, 2)
    assert minutes["extract"] == minutes["words"] == minutes["train"] == minutes["eval"] == 0 < minutes["letters"] < \
        plan.by_stage(whole, 2)["letters"]
    assert re.search(r": extract done, words done, train done, evaluate done, letters [0-9.]+, compare [0-9.]+$",
                     plan.in_words("quickstart", rest, 2))


def test_nulls_that_came_with_the_workbook_cost_nothing(nothing_there):
    assert sum(job.nulls for job in jobs("quickstart")) == sum(job.nulls for job in jobs("ci")) == 0
    assert sum(job.nulls for job in jobs("architectures")) > 0


def test_files_say_what_is_done_where_nobody_else_does(nothing_there, tmp_path):
    member = studies.expand("quickstart")[0]
    (tmp_path / "runs" / member.name).mkdir(parents=True)
    (tmp_path / "runs" / member.name / "training.json").write_text("{}")
    assert [job.done for job in of(jobs("quickstart"), "train")] == [True] + [False] * (
        len(studies.expand("quickstart")) - 1)


def test_a_kind_of_step_is_timed_once_for_all_seeds_and_guessed_when_patience_ends(monkeypatch):
    timed = []
    monkeypatch.setattr(speed, "_step", lambda p, width: timed.append(p) or 0.1)
    machine, p = speed.Speed(cores=1), params.check("train", {"d_sae": 64, "k": 4}, "test")
    for changes in ({}, {"seed": 7}, {"samples": 5, "layer": 3, "tokens": 9}, {"k": 8}, {"d_sae": 128}):
        assert machine.step(p.model_copy(update=changes), 32) == 0.1
    assert machine.step(p, 48) == 0.1
    assert len(timed) == 4, "the variant, another k, another d_sae, another width"
    machine.patience = 0
    assert machine.step(p.model_copy(update={"d_sae": 256}), 32) == pytest.approx(0.1 * 4)
    assert len(timed) == 4 and len(machine.guessed) == 1


def test_twice_the_work_takes_twice_as_long(nothing_there):
    shape = speed.ALIASES["smollm2"]
    assert shape.operations(128, 12) == pytest.approx(2 * shape.operations(128, 6))
    machine = costs._Counting(Still(cores=2), None)
    p = params.check("extract", {"layer": 5, "tokens": 100_000, "dtype": "float32"}, "test")
    more = p.model_copy(update={"tokens": 200_000})
    assert machine.store("b", more).own == pytest.approx(2 * machine.store("a", p).own, rel=0.01)


def test_jobs_that_fit_side_by_side_run_so():
    job = costs.Job("eval", "a", fixed=10.0, own=4.0, shared=0.0, nulls=0.0)
    assert plan._wall([job] * 2, cores=2, threads=1) == 10 + 2 * 4, "starts side by side, work on half the cores each"
    assert plan._wall([job] * 3, cores=2, threads=1) == 2 * (10 + 2 * 4)
    assert plan._wall([job] * 2, cores=2, threads=2) == 2 * (10 + 4)
    assert plan._wall([job._replace(shared=5.0, nulls=3.0), job], cores=2, threads=1) == 18 + 5 + 2 * 3
    assert plan._wall([], cores=2, threads=1) == 0


def test_shapes_known_beforehand_are_the_models_own(tiny_model):
    block = tiny_model.hf.base_model.layers[0]
    known = speed.ALIASES["tiny"]
    assert known.block == sum(part.numel() for part in block.parameters() if part.dim() == 2)
    assert (known.d_model, known.blocks) == (tiny_model.d_model, tiny_model.n_layers)
    told = speed.from_config(tiny_model.hf.config.to_dict())
    assert told._replace(vocabulary=0) == known._replace(vocabulary=0)
    assert told.vocabulary == pytest.approx(known.vocabulary, rel=0.1)
    assert speed.from_config({"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
                              "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
                              "model_type": "llama"}) == speed.ALIASES["smollm2"]
    assert language_model.describe("smollm2").d_model == speed.ALIASES["smollm2"].d_model
    with pytest.raises(params.ParameterError, match="before its config.json"):
        speed.shape_of("nobody/nothing")


def test_the_command_says_what_each_part_takes_and_a_total(nothing_there, capsys):
    assert plan.plan("ci") == 0
    *parts, total = capsys.readouterr().out.strip().splitlines()
    assert parts[0].startswith("store smollm2-") and "42,048 tokens" in parts[0]
    assert len(parts) == 2 + len(studies.expand("ci")) and all("minutes: " in part for part in parts)
    assert all(f"{word} " in total for word in plan.NAMES.values())


def test_planted_worlds_and_what_is_not_counted_are_planned_too(nothing_there):
    found = jobs("planted")
    assert of(found, "extract") == [] and "without truth" in plan.in_words("planted", found, 2)


def test_work_goes_on_without_an_estimate():
    said = plan.line("no_such_study", [], 2)
    assert said.startswith("no_such_study: how long it takes is not known (") and "\n" not in said
