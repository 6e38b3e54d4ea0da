# `snakemake` runs the quickstart; `snakemake --config study=NAME` another of params/studies.
# Each stage is a notebook under papermill. A stage is passed only the names that it reads, so that changing an
# evaluation's parameter re-runs the evaluation alone. Data are outputs; executed notebooks are logs, kept after a
# failure. `--config refresh=true` also re-runs what an older version of the library made; `estimate=false` leaves out
# the line that says how long it will take.
import json
import os
import subprocess
import sys
from pathlib import Path

from sae_lib import params, plan, presence, runs, studies, warm

STUDY = config.get("study", "quickstart")
HOME = runs.home()
MEMBERS = {member.name: member for member in studies.expand(STUDY)}
STORES = {}
for member in MEMBERS.values():
    asked = params.check("extract", member.params, member.origin)
    if asked.store == "disk" and member.params.get("activations", "auto") == "auto":
        STORES.setdefault(params.activations_name(asked), member)
if workflow.is_main_process:
    studies.check_ingredients(MEMBERS.values())
HELD = []


onstart:
    # One snakemake at a time on a study; its jobs end when it does, however it ends (sae_lib.presence).
    HELD.append(presence.hold(HOME / "runs" / STUDY, f"study '{STUDY}'"))
    # Notebooks begin as copies of a process that has imported everything (sae_lib.warm).
    HELD.append(warm.start() if workflow.is_main_process else None)
    os.environ[presence.ENGINE] = str(os.getpid())
    os.environ[presence.CORES] = str(workflow.cores)
    if workflow.is_main_process and config.get("estimate", True):
        left = [(job.rule.name, job.wildcards_dict.get("store") or job.wildcards_dict.get("run") or STUDY)
                for job in workflow.dag.needrun_jobs()]
        print(plan.line(STUDY, left, workflow.cores), flush=True)


onerror:
    # Runs that failed are rows of the comparison, never its end: it is made of whatever is there.
    if workflow.is_main_process and any((HOME / "runs" / name).exists() for name in MEMBERS):
        print("some jobs failed; comparing what is there")
        compare_what_is_there()


NOTEBOOKS = {"extract": "01_extract", "train": "02_train_variant", "eval": "03_eval",
             "letters": "04_letter_absorption", "compare": "05_compare"}
# Runs of a study share the cores, all at once; but training is fastest on a few cores each: on two cores, two runs one
# after the other took 96 ms for a step of both, side by side 216.
SHARE = max(1, workflow.cores // max(1, len(MEMBERS))) if workflow.cores else 1
TRAINING = min(workflow.cores, max(SHARE, 4)) if workflow.cores else 1


def notebook(stage):
    return str(runs.project() / "notebooks" / f"{NOTEBOOKS[stage]}.ipynb")


def code(stage):
    """Hash of the notebook's code cells: saving it with other outputs or prose is no change."""
    cells = json.loads(Path(notebook(stage)).read_text(encoding="utf-8"))["cells"]
    fresh = runs.library_digest() if config.get("refresh") else ""
    return params.digest(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] + [fresh])


def given(stage, values):
    """The stage's parameters as JSON (which is YAML): names of other stages left out, and for a store, which many
    runs share, the names of one run."""
    names = set(params.STAGES[stage].model_fields) - ({"run", "seed"} if stage == "extract" else set())
    return json.dumps({key: value for key, value in values.items() if key in names}, sort_keys=True)


def store_of(member):
    asked = params.check("extract", member.params, member.origin)
    ours = asked.store == "disk" and member.params.get("activations", "auto") == "auto"
    return [f"{HOME}/activations/{params.activations_name(asked)}/manifest.json"] if ours else []


# Lines that tell how far the work is go to the terminal too; the whole log is kept beside the notebook.
# numba's threads are told apart from torch's: a team of all cores would stand in the way of other jobs.
PAPERMILL = ("NUMBA_NUM_THREADS={threads} {PYTHON:q} sae_lib.batch papermill {input.notebook:q} {log.notebook:q} -y {params.given:q} -p threads {threads} -p overwrite True "
             "--log-output --no-progress-bar 2>&1 | tee {log.text:q} "
             "| {{ grep --line-buffered -E ' left|tokens/s|samples/s' || true; }}")


PYTHON = [sys.executable, "-m"]


def compare_what_is_there():
    """05 over all runs of the study, outside the plan of jobs; the next call makes its table again."""
    folder = HOME / "runs" / STUDY / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([*PYTHON, "sae_lib.batch", "papermill", notebook("compare"), str(folder / "05_compare.ipynb"), "-y", COMPARED,
                    "--no-progress-bar"], check=False)
    subprocess.run([*PYTHON, "sae_lib", "pictures", STUDY], check=False)


# What 04 needs of the models alone, on all cores and once: a 04 that computed it would keep the others waiting.
WITH_WORDS = [member for member in MEMBERS.values() if member.params.get("model") != "planted"]
WORDS = [f"{HOME}/runs/{STUDY}/words.txt"] * bool(WITH_WORDS)


COMPARED = given("compare", {"mode": "batch", "study": STUDY, "run": STUDY, "runs": list(MEMBERS),
                             "baseline": studies.baseline(STUDY)})


EVALUATED = [f"{HOME}/runs/{name}/evals/{file}" for name in MEMBERS for file in ("done.json", "letters_done.json")]


rule all:
    # The evaluations too: a comparison made after a failure is a table of what was there, not the end of the study.
    input: f"{HOME}/runs/{STUDY}/compare/table.csv", EVALUATED, f"{HOME}/runs/{STUDY}/compare/pictures.txt"


rule extract:
    input: notebook=ancient(notebook("extract"))
    output: HOME / "activations/{store}/manifest.json"
    log: notebook=str(HOME / "activations/{store}.01_extract.ipynb"), text=str(HOME / "activations/{store}.01_extract.log")
    params: given=lambda w: given("extract", STORES[w.store].params), code=code("extract")
    threads: workflow.cores
    shell: PAPERMILL


rule train:
    input:
        notebook=ancient(notebook("train")),
        store=lambda w: store_of(MEMBERS[w.run])
    output: HOME / "runs/{run}/training.json", HOME / "runs/{run}/sae/cfg.json", HOME / "runs/{run}/history.parquet"
    log: notebook=str(HOME / "runs/{run}/notebooks/02_train_variant.ipynb"), text=str(HOME / "runs/{run}/notebooks/02_train_variant.log")
    params: given=lambda w: given("train", MEMBERS[w.run].params), code=code("train")
    wildcard_constraints: run=r"[^/]+/[^/]+"
    threads: TRAINING
    # All trainings before evaluations, which share the cores: the last run's would leave cores idle. So would a run
    # whose two evaluations come last, one after the other. Snakemake adds up what would start at once: the number is
    # more than all evaluations together have.
    priority: 1000
    shell: PAPERMILL


rule eval:
    input:
        notebook=ancient(notebook("eval")),
        training=HOME / "runs/{run}/training.json"
    output: HOME / "runs/{run}/evals/done.json"
    log: notebook=str(HOME / "runs/{run}/notebooks/03_eval.ipynb"), text=str(HOME / "runs/{run}/notebooks/03_eval.log")
    params: given=lambda w: given("eval", MEMBERS[w.run].params), code=code("eval")
    wildcard_constraints: run=r"[^/]+/[^/]+"
    threads: SHARE
    priority: 1
    shell: PAPERMILL


rule words:
    input: sorted({file for member in WITH_WORDS for file in store_of(member)})
    output: WORDS
    params: asked=sorted({given("letters", {**member.params, "run": ""}) for member in WITH_WORDS})
    threads: workflow.cores
    priority: 1000
    shell:
        "{PYTHON:q} sae_lib.batch sae_lib words {STUDY:q} 2>&1 | tee {output:q} | {{ grep --line-buffered -E ' left|tokens/s' || true; }}"


rule letters:
    input:
        notebook=ancient(notebook("letters")),
        training=HOME / "runs/{run}/training.json",
        words=[ancient(file) for file in WORDS],
        # After 03, which writes the same verdict; another evaluation of 03 is no reason to repeat this one.
        eval=ancient(HOME / "runs/{run}/evals/done.json")
    output: HOME / "runs/{run}/evals/letters_done.json"
    log: notebook=str(HOME / "runs/{run}/notebooks/04_letter_absorption.ipynb"), text=str(HOME / "runs/{run}/notebooks/04_letter_absorption.log")
    params: given=lambda w: given("letters", MEMBERS[w.run].params), code=code("letters")
    wildcard_constraints: run=r"[^/]+/[^/]+"
    threads: SHARE
    shell: PAPERMILL


rule compare:
    input:
        notebook=ancient(notebook("compare")),
        evals=EVALUATED
    output: f"{HOME}/runs/{STUDY}/compare/table.csv"
    log: notebook=f"{HOME}/runs/{STUDY}/compare/05_compare.ipynb", text=f"{HOME}/runs/{STUDY}/compare/05_compare.log"
    params:
        given=COMPARED,
        code=code("compare")
    threads: 1
    shell: PAPERMILL


rule pictures:
    # Of all notebooks, after the verdicts, by one browser. What is without pictures is what is to be drawn.
    input: f"{HOME}/runs/{STUDY}/compare/table.csv", EVALUATED
    output: f"{HOME}/runs/{STUDY}/compare/pictures.txt"
    threads: workflow.cores
    shell: "{PYTHON:q} sae_lib.batch sae_lib pictures {STUDY:q} 2>&1 | tee {output:q}"
