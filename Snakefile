# `snakemake` runs the quickstart; `snakemake --config study=NAME` another of params/studies.
# Each stage is a notebook under papermill. A stage is passed only the names that it reads, so that changing an
# evaluation's parameter re-runs the evaluation alone. Data are outputs; executed notebooks are logs, kept after a
# failure. `--config refresh=true` also re-runs what an older version of the library made.
import json

import nbformat

from sae_lib import params, runs, studies

STUDY = config.get("study", "quickstart")
HOME = runs.home()
MEMBERS = {member.name: member for member in studies.expand(STUDY)}
STORES = {}
for member in MEMBERS.values():
    asked = params.check("extract", member.params, member.origin)
    if asked.store == "disk":
        STORES.setdefault(params.activations_name(asked), member)
if workflow.is_main_process:
    studies.check_ingredients(MEMBERS.values())

NOTEBOOKS = {"extract": "01_extract", "train": "02_train_variant", "eval": "03_eval", "compare": "05_compare"}
# Runs of a study share the cores: each trains on its part, all at once.
SHARE = max(1, workflow.cores // max(1, len(MEMBERS))) if workflow.cores else 1


def notebook(stage):
    return str(runs.project() / "notebooks" / f"{NOTEBOOKS[stage]}.ipynb")


def code(stage):
    """Hash of the notebook's code cells: saving it with other outputs or prose is no change."""
    cells = nbformat.read(notebook(stage), as_version=4).cells
    fresh = runs.library_digest() if config.get("refresh") else ""
    return params.digest([cell.source for cell in cells if cell.cell_type == "code"] + [fresh])


def given(stage, values):
    """The stage's parameters as JSON (which is YAML): names of other stages left out, and for a store, which many
    runs share, the names of one run."""
    names = set(params.STAGES[stage].model_fields) - ({"run", "seed"} if stage == "extract" else set())
    return json.dumps({key: value for key, value in values.items() if key in names}, sort_keys=True)


def store_of(member):
    asked = params.check("extract", member.params, member.origin)
    return [f"{HOME}/activations/{params.activations_name(asked)}/manifest.json"] if asked.store == "disk" else []


# Lines that tell how far the work is go to the terminal too; the whole log is kept beside the notebook.
PAPERMILL = ("papermill {input.notebook:q} {log.notebook:q} -y {params.given:q} -p threads {threads} -p overwrite True "
             "--log-output --no-progress-bar 2>&1 | tee {log.text:q} "
             "| {{ grep --line-buffered -E ' left|tokens/s|samples/s' || true; }}")


rule all:
    input: f"{HOME}/runs/{STUDY}/compare/table.csv"


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
    threads: SHARE
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
    shell: PAPERMILL


rule compare:
    input:
        notebook=ancient(notebook("compare")),
        evals=[f"{HOME}/runs/{name}/evals/done.json" for name in MEMBERS]
    output: f"{HOME}/runs/{STUDY}/compare/table.csv"
    log: notebook=f"{HOME}/runs/{STUDY}/compare/05_compare.ipynb", text=f"{HOME}/runs/{STUDY}/compare/05_compare.log"
    params:
        given=given("compare", {"mode": "batch", "study": STUDY, "run": STUDY, "runs": list(MEMBERS),
                                "baseline": studies.baseline(STUDY)}),
        code=code("compare")
    threads: 1
    shell: PAPERMILL
