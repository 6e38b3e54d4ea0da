"""SAEBench's unlearning, whole: on a tiny Gemma-2 that knows nothing, and on one rigged to read its answers."""

import json
import random
import shutil

import pytest
import torch
from test_probing import made

from sae_lib import params, runs
from sae_lib.data import labelled, tiny_model
from sae_lib.evaluation import evaluate, faults, validity
from sae_lib.evaluation.saebench import unlearning as bench
from sae_lib.evaluation.saebench.unlearning import unlearning
from sae_lib.params import ParameterError
from sae_lib.views import further

SUBJECTS = ("high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")
ANSWERS = "bh"
"""First letters of right answers: of biology's, and of the other subjects'."""
QUESTIONS, SPARE = 4, "cdfgjk"


def beginning(letters):
    return [word for word in tiny_model.words() if word[0] in letters]


def text(*key, letters):
    return " ".join(labelled._tiny_text(random.Random(f"{key} {part}"), letters) for part in range(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data as a user puts them there: the forget corpus of words with b, other text with h, questions."""
    made_here, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    def write(name, rows):
        (made_here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("bio-forget-corpus", [{"text": text("forget", row, letters="b")} for row in range(60)])
    write("wikitext", [{"text": text("retain", row, letters="h")} for row in range(60)])
    for name in ("wmdp-bio", *SUBJECTS):
        right = beginning("b" if name == "wmdp-bio" else "h")
        rows = []
        for _ in range(QUESTIONS):
            choices, answer = draw.sample(beginning(SPARE), 4), draw.randrange(4)
            choices[answer] = draw.choice(right)
            rows.append({"question": text("question", answer, letters="c"), "choices": choices, "answer": answer})
        write(name, rows)
    return str(made_here)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own: which questions a model knows is kept by its weights, which the rig does not touch."""
    monkeypatch.setenv("SAE_WORKBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def gemma(tiny_named):
    """By the name of the tuned model."""
    return tiny_named("gemma-2-2b-it")


@pytest.fixture(scope="module")
def directions(gemma):
    ids = [gemma.tokenizer(" " + word, add_special_tokens=False)["input_ids"][-1] for word in tiny_model.words()]
    x = gemma.residual(torch.tensor([[gemma.bos_id, number] for number in ids]))[:, 1].float()
    first = [word[0] for word in tiny_model.words()]
    return torch.stack([x[[one == letter for one in first]].mean(0) for letter in ANSWERS]) - x.mean(0)


@pytest.fixture
def knowing(gemma, directions, monkeypatch):
    """The model answers with the choice whose word has most of b's or h's direction in the stream at the hook."""
    real, seen = bench.to_hooked, {}
    biology, other = torch.nn.functional.normalize(directions, dim=1)
    read_along = torch.stack([biology, other - (other @ biology) * biology])  # what is clamped along one moves no other
    words = torch.tensor([gemma.tokenizer(" " + word, add_special_tokens=False)["input_ids"][-1]
                          for word in tiny_model.words()])
    letters = torch.tensor([gemma.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"])

    def rigged(lm):
        model = real(lm)
        model.embed.register_forward_pre_hook(lambda _module, args: seen.update(tokens=args[0]))
        model.blocks[1].register_forward_pre_hook(lambda _module, args: seen.update(stream=args[0]))

        def answer(_module, _args, logits):
            for row, tokens in enumerate(seen["tokens"]):
                places = torch.nonzero(torch.isin(tokens, words))[-4:, 0]
                if len(places) == 4:
                    read = (seen["stream"][row, places].float() @ read_along.T).amax(1)
                    logits[row, :, letters] = 100.0 * torch.nn.functional.one_hot(read.argmax(), 4).to(logits)
            return logits
        model.unembed.register_forward_hook(answer)
        return model
    monkeypatch.setattr(bench, "to_hooked", rigged)


def test_a_planted_latent_is_unlearnt_and_another_is_not(gemma, directions, knowing, folder):
    planted = made(directions, 4.0)  # between a letter's own words, at 6, and the others, at 0 +- 1
    report = unlearning(planted, gemma, "smoke", folder=folder)
    assert "status" not in report and report["metrics"]["unlearning_score"] > 0.7
    assert report["config"]["questions"] == dict.fromkeys(("wmdp-bio", *SUBJECTS), (QUESTIONS, QUESTIONS))
    assert "4 questions on biology: the score moves in steps of 0.25" in report["note"]
    assert report["l0_texts"] > 0.1 and report["config"]["data"]["wmdp-bio"] == "wmdp-bio.jsonl"
    rows = torch.randn(16, planted.d_in, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(directions.T).Q
    blind = unlearning(made(rows - rows @ q @ q.T), gemma, "smoke", folder=folder)
    assert blind["metrics"]["unlearning_score"] == 0 and blind["model_reused"] and not report["model_reused"]
    assert list(further.tables({"unlearning": report})["unlearning"].data) == ["mean"]
    assert unlearning(made(directions, 1e4), gemma, "smoke", folder=folder)["note"].startswith("mean L0 on these texts")


def test_a_model_that_knows_nothing_gets_no_number(gemma, directions, folder):
    report = unlearning(made(directions, 0.4), gemma, "smoke", folder=folder)
    assert report["status"] == "not applicable" and report["metrics"] == {}
    assert "the model knows 0 of 4 on wmdp-bio, " in report["reason"]
    assert faults.no_figure(report).startswith("not applicable: ") and faults.reason(report) is None
    other = unlearning(made(directions, 0.4), gemma._replace(name="smollm2"), "smoke")
    assert other["status"] == "not applicable" and "not smollm2" in other["reason"]


def test_data_that_are_not_there_are_named(gemma, directions, folder, tmp_path, monkeypatch):
    sae = made(directions, 0.4)
    for given, says in ((None, "no bio-forget-corpus.jsonl in the folder .*gated: ask for it"),
                        (str(tmp_path / "nowhere"), "no folder .*nowhere"), (str(tmp_path), "no bio-forget-corpus")):
        with pytest.raises(ParameterError, match=f"unlearning_data: {says}"):
            unlearning(sae, gemma, "smoke", folder=given)
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/human_aging.jsonl").write_text('{"question": "?", "choices": ["a"], "answer": 0}\n')
    with pytest.raises(ParameterError, match=r"human_aging.jsonl, line 1: 1 choices, answer 0; a line is"):
        unlearning(sae, gemma, "smoke", folder=str(tmp_path / "data"))
    (tmp_path / "data/human_aging.jsonl").unlink()
    monkeypatch.setattr("datasets.load_dataset", lambda *_a, **_o: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(ParameterError, match="no human_aging.jsonl there, and the hub did not give cais/mmlu"):
        unlearning(sae, gemma, "smoke", folder=str(tmp_path / "data"))


def test_a_declared_model_is_no_fault_of_the_run(gemma, directions, knowing, folder):
    report = unlearning(made(directions, 0.4), gemma, "smoke", folder=folder, declared=True)
    training = {"model_identity": "google/gemma-2-2b@1", "hook": gemma.hook, "d_sae": 2}
    assert validity._other_than_trained(training, report["config"]) == []
    assert validity._other_than_trained(training | {"hook": "h"}, report["config"])
    report["config"]["declared_model"] = False
    assert "evaluated model" in validity._other_than_trained(training, report["config"])[0]


def test_03_takes_a_tuned_model_for_unlearning_alone(gemma, folder, tiny, tiny_store, knowing):
    from sae_lib.data import activations
    from sae_lib.training import trainer

    p = params.check("train", tiny().model_dump() | {
        "run": "unlearning/one", "d_sae": 64, "k": 8, "samples": 10_000, "batch_size": 256, "lr": 2e-3,
        "warmup_steps": 5, "dead_after": 5000, "threads": 1})
    trainer.train(p, activations.source(p), runs.start(p))
    found = evaluate.evaluate(params.check("eval", {
        "run": p.run, "evals": ["unlearning"], "eval_preset": "smoke", "threads": 1, "mode": "batch", "device": "cpu",
        "model": gemma.name, "unlearning_data": folder}))
    faults.insist(found)
    assert found["unlearning"]["config"]["declared_model"]
    assert runs.Run(p.run).json("validity.json")["status"] == "valid"
    assert "unlearning" in runs.Run(p.run).json("validity.json")["checked"]
