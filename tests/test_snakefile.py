"""The batch engine on the tiny model: it runs a study, then does nothing, and re-runs only what a change reaches."""

import os
import re
import signal
import subprocess
import sys
import time

import checkouts
import nbformat
import pandas as pd
import psutil
import pytest

from sae_lib import runs, warm

VARIANT = "architecture: topk\nd_sae: 128\nk: {k}\nsamples: 30000\nbatch_size: 256\nlr: 0.002\nwarmup_steps: 10\n"
VARIANTS = {"a": VARIANT.format(k=8).replace("d_sae: 128", "d_sae: 512").replace("samples: 30000", "samples: 200000"),
            "b": VARIANT.format(k=16)}
"""The first takes long enough to be interrupted in."""
STUDY = """models: [tiny]
variants: [a, b]
seeds: [1]
shared: {tokens: 9000, store_shard_tokens: 512, checkpoint_every: 50, eval_preset: smoke, nulls: [],
         absorption_preset: smoke, absorption_words_per_letter: 40}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with a study of two small runs, and a way to call snakemake in it."""
    folder = tmp_path_factory.mktemp("project")
    checkouts.copy(folder, "sae_lib", "notebooks", "params", "profiles", "Snakefile")
    (folder / "params/studies/small.yaml").write_text(STUDY)
    for name, text in VARIANTS.items():
        (folder / f"params/variants/{name}.yaml").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    shared = warm.start(environment, folder)  # for all that follow, where each would start its own

    def start(*arguments, study="small", home=folder, estimate=False, own=False):
        words = [sys.executable, "-m", "snakemake", "--config", f"study={study}", f"estimate={estimate}", *arguments]
        changed = {"SAE_WORKBOOK_HOME": str(home)} | ({warm.ADDRESS: ""} if own else {})
        # A shell's background job ignores Ctrl-C, and what it starts inherits that: here it shall be heard.
        return subprocess.Popen(words, cwd=folder, env=environment | changed,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def call(*arguments, **where):
        process = start(*arguments, **where)
        text, _ = process.communicate()
        return process.returncode, text
    call.start, call.warm = start, shared
    yield folder, call
    if shared:
        shared.stdin.close()
        shared.wait()


@pytest.fixture(scope="module")
def whole(checkout):
    """What snakemake said as it ran the small study, undisturbed."""
    code, text = checkout[1](estimate=True)
    assert code == 0, text[-3000:]
    return text


def jobs(text):
    """Rules and how many jobs of each, from snakemake's table."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text.split("Job stats:")[1], re.M)}


def test_a_study_runs_then_rests_and_reruns_only_what_changed(checkout, whole):
    folder, call = checkout
    stages = "".join(rf", {name} [\d.]+" for name in ("words", "train", "evaluate", "letters", "compare"))
    assert re.search(rf"^small: (about|less).*: extract [\d.]+{stages}", whole, re.M), whole[:3000]
    assert (folder / "runs/small/compare/table.csv").exists()
    for name in ("a", "b"):
        run = runs.read_json(folder / f"runs/small/tiny-{name}-s1/validity.json")
        assert run["status"] == "valid", run
        assert (folder / f"runs/small/tiny-{name}-s1/notebooks/02_train_variant.ipynb").exists()
    assert "Nothing to be done" in call("--dry-run")[1]

    (folder / "params/variants/b.yaml").write_text(VARIANT.format(k=12))
    assert jobs(call("--dry-run")[1]) == {"train": 1, "eval": 1, "letters": 1, "compare": 1,
                                              "pictures": 1, "all": 1, "total": 6}
    (folder / "params/variants/b.yaml").write_text(VARIANTS["b"])
    (folder / "params/studies/small.yaml").write_text(STUDY.replace("eval_preset: smoke", "eval_preset: default"))
    assert jobs(call("--dry-run")[1]) == {"eval": 2, "compare": 1, "pictures": 1, "all": 1,
                                              "total": 5}


def test_after_a_failed_job_what_is_there_is_compared(checkout):
    folder, call = checkout
    (folder / "params/variants/broken.yaml").write_text(VARIANT.format(k=8) + "activations: nowhere\n")
    (folder / "params/studies/failing.yaml").write_text(STUDY.replace("[a, b]", "[b, broken]"))
    code, text = call(study="failing")
    assert code != 0, text[-3000:]
    table = pd.read_csv(folder / "runs/failing/compare/table.csv").set_index("variant")
    assert table.status.to_dict() == {"tiny-b": "valid", "tiny-broken": "failed"}
    assert "activations: no finished store" in table.reasons["tiny-broken"]
    assert jobs(call("--dry-run", study="failing")[1])["train"] == 1, "a table of what is there is not the end"


def interrupt(process, begun, how, warmed=None):
    """Interrupt snakemake once ``begun()`` is true; what it, or ``warmed`` for it, had started must end by itself."""
    while not begun():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)
    left = [child for one in (process, warmed) if one for child in psutil.Process(one.pid).children(recursive=True)]
    assert warmed is None or psutil.Process(warmed.pid).children(), "papermill runs in a copy of the warm process"
    how(process)
    process.communicate(timeout=60)
    assert process.returncode != 0 and len(left) >= 3, "the shell, papermill and its kernel"
    assert psutil.wait_procs(left, timeout=20)[1] == []


def threads_of(notebook):
    """How many threads an executed notebook was given."""
    return nbformat.read(notebook, as_version=4).metadata.papermill.parameters.threads


def killed(process):
    process.kill()


def terminated(process):
    process.terminate()


def control_c(process):
    os.killpg(process.pid, signal.SIGINT)


def test_an_interrupted_snakemake_leaves_nothing_and_the_plain_command_goes_on(checkout, whole):
    """In every stage: no kernel, no papermill and no lock outlive it; the result is an undisturbed run's."""
    folder, call = checkout
    (folder / "params/studies/killed.yaml").write_text(STUDY.replace("[a, b]", "[a]"))
    run, undisturbed = (home / f"runs/{study}/tiny-a-s1" for home, study in (
        (folder / "killed", "killed"), (folder, "small")))
    # Equal bits want equal threads, of which a run that is alone in its study would have more.
    threads = [f"{rule}={threads_of(undisturbed / f'notebooks/{notebook}.ipynb')}" for rule, notebook in (
        ("train", "02_train_variant"), ("eval", "03_eval"), ("letters", "04_letter_absorption"))]

    def start(**how):
        return call.start("--set-threads", *threads, study="killed", home=folder / "killed", **how)

    def written(stage):
        log = run / f"notebooks/{stage}.log"
        return lambda: log.exists() and log.stat().st_size > 0
    interrupt(start(own=True), lambda: any((folder / "killed").glob("activations/*.partial/*.json")), terminated)
    interrupt(start(own=True), lambda: any(run.glob("checkpoints/[0-9]*")), killed)
    assert not (run / "training.json").exists()
    for stage, how in (("03_eval", control_c), ("04_letter_absorption", killed)):
        interrupt(start(), written(stage), how, call.warm)
    assert not (run / "evals/letters_done.json").exists()

    text, _ = (process := start()).communicate()
    assert process.returncode == 0, text[-3000:]
    assert "Nothing to be done" in call("--dry-run", study="killed", home=folder / "killed")[1]
    assert runs.read_json(run / "training.json")["resumed_at"] != []
    assert runs.read_json(undisturbed / "training.json")["resumed_at"] == []
    assert runs.read_json(run / "validity.json")["status"] == "valid"
    assert runs.sha256(run / "sae/sae_weights.safetensors") == runs.sha256(undisturbed / "sae/sae_weights.safetensors")
    for name in ("core", "absorption"):
        assert runs.read_json(run / f"evals/{name}.json")["metrics"] == \
            runs.read_json(undisturbed / f"evals/{name}.json")["metrics"]
    assert not (run / "checkpoints").exists() and (run / "hashes.json").exists()
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("text, says", [
    (STUDY.replace("eval_preset: smoke", "eval_preset: quick"), "params/studies/small.yaml: eval_preset"),
    (STUDY.replace("seeds", "seed"), "seed: Extra inputs are not permitted; did you mean 'seeds'"),
    (STUDY.replace("[a, b]", "[wrong]"), "wieght"),
])
def test_a_fault_stops_before_any_job_and_names_its_file(checkout, text, says):
    folder, call = checkout
    (folder / "params/variants/wrong.yaml").write_text(
        "ingredients: [{name: progressive_orthogonality, wieght: 1}]\n")
    (folder / "params/studies/small.yaml").write_text(text)
    code, output = call()
    assert code != 0 and says in output and "Job stats" not in output
