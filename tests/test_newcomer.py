"""The README's example of a new ingredient, as a newcomer would add it: one new file and one params file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import checkouts

from sae_lib import runs

TRIAL = """
import sys
from synthetic import Planted
from sae_lib import params, runs
from sae_lib.evaluation import validity
from sae_lib.training import trainer

values = params.load_yaml("params/variants/small_codes.yaml")
p = params.check("train", values | {"run": "mine", "d_sae": 96, "k": 3, "samples": 25600, "batch_size": 256, "lr": 2e-3,
                                    "warmup_steps": 5, "mode": "batch", "overwrite": True,
                                    "set": sys.argv[1:]})
run = runs.start(p)
trainer.train(p, Planted(), run)
print(validity.update(run).status, run.json("training.json")["terms"]["small_codes"]["median_share"])
"""


def test_a_new_ingredient_is_one_file_and_one_params_file(tmp_path):
    code, values = re.findall(r"```(?:python|yaml)\n(.*?)```", (runs.project() / "README.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 10 and "small_codes" in code and "small_codes" in values
    checkouts.copy(tmp_path, "sae_lib", "params", "notebooks")
    (tmp_path / "sae_lib/training/ingredients/small_codes.py").write_text(code)
    (tmp_path / "params/variants/small_codes.yaml").write_text(values)
    where = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent}",
                          "SAE_WORKBOOK_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def trial(*changes):
        return subprocess.run([sys.executable, "-W", "ignore", "-c", TRIAL, *changes], cwd=tmp_path, env=where,
                              text=True, capture_output=True)
    done = trial()
    status, share = done.stdout.split()[-2:]
    assert status == "valid" and float(share) > 0, done.stderr[-2000:]
    wrong = trial("small_codes.wieght=1")
    assert "small_codes.wieght" in wrong.stderr and "did you mean 'weight'" in wrong.stderr
