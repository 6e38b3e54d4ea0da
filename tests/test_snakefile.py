"""The batch engine on the tiny model: it runs a study, then does nothing, and re-runs only what a change reaches."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from sae_lib import runs

VARIANT = "architecture: topk\nd_sae: 128\nk: {k}\nsamples: 30000\nbatch_size: 256\nlr: 0.002\nwarmup_steps: 10\n"
STUDY = """models: [tiny]
variants: [a, b]
seeds: [1]
shared: {tokens: 8000, eval_preset: smoke}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with a study of two small runs, and a way to call snakemake in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("sae_lib", "notebooks", "params", "profiles", "Snakefile"):
        source = runs.project() / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / "params/studies/small.yaml").write_text(STUDY)
    for name, k in (("a", 8), ("b", 16)):
        (folder / f"params/variants/{name}.yaml").write_text(VARIANT.format(k=k))
    environment = os.environ | {"PYTHONPATH": str(folder), "SAE_WORKBOOK_HOME": str(folder)}

    def call(*arguments):
        done = subprocess.run([sys.executable, "-m", "snakemake", "--config", "study=small", *arguments], cwd=folder,
                              env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    yield folder, call


def jobs(text):
    """Rules and how many jobs of each, from snakemake's table."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text.split("Job stats:")[1], re.M)}


def test_a_study_runs_then_rests_and_reruns_only_what_changed(checkout):
    folder, call = checkout
    code, text = call()
    assert code == 0, text[-3000:]
    assert (folder / "runs/small/compare/table.csv").exists()
    for name in ("a", "b"):
        run = runs.read_json(folder / f"runs/small/tiny-{name}-s1/validity.json")
        assert run["status"] == "valid", run
        assert (folder / f"runs/small/tiny-{name}-s1/notebooks/02_train_variant.ipynb").exists()
    assert "Nothing to be done" in call("--dry-run")[1]

    (folder / "params/variants/b.yaml").write_text(VARIANT.format(k=12))
    assert jobs(call("--dry-run")[1]) == {"train": 1, "eval": 1, "compare": 1, "all": 1, "total": 4}
    (folder / "params/variants/b.yaml").write_text(VARIANT.format(k=16))
    (folder / "params/studies/small.yaml").write_text(STUDY.replace("smoke", "default"))
    assert jobs(call("--dry-run")[1]) == {"eval": 2, "compare": 1, "all": 1, "total": 4}


@pytest.mark.parametrize("text, says", [
    (STUDY.replace("smoke", "quick"), "params/studies/small.yaml: eval_preset"),
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
