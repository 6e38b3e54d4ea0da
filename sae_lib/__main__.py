"""Commands on studies: ``python -m sae_lib plan STUDY`` says its cost; see --help for the others."""

from __future__ import annotations

import argparse
import shutil
import sys

from sae_lib import params, plan, runs, studies, verify

OUTPUTS = ("params.yaml", "training.json", "history.parquet", "validity.json", "sae/cfg.json",
           "sae/sae_weights.safetensors", "evals/core.json", "evals/absorption.json",
           "figures/training_curves.html", "notebooks/02_train_variant.ipynb", "notebooks/03_eval.ipynb",
           "notebooks/04_letter_absorption.ipynb")
README_FIGURES = {"progressive": ("phases_by_run",)}
"""The README's pictures by the study that they come from; of every other study:"""
OTHERWISE = ("training_curves_by_run", "compression_panels", "comparison_table", "letters_by_run",
             "coactivation_overview", "coactivation_block")
OF_THE_FIRST_RUN = ("latents_latent", "splits_split")


def check(study: str) -> int:
    """Say for each run of a study whether its outputs are all there and its verdict; 1 where not all are valid."""
    wrong = 0
    for member in studies.expand(study):
        run = runs.Run(member.name)
        missing = [name for name in OUTPUTS if not (run.path / name).exists()]
        verdict = run.json("validity.json", {"status": "failed", "reasons": ["not run"], "flags": []})
        core = (run.json("evals/core.json") or {}).get("metrics", {})
        training = run.json("training.json") or {}
        wrong += bool(missing) or verdict["status"] != "valid"
        print(f"{member.name}: {verdict['status']}; explained variance {_figure(training.get('explained_variance'))}, "
              f"L0 {_figure(training.get('l0'))}, cross-entropy recovered {_figure(core.get('ce_loss_score'))}")
        for text in (*verdict["reasons"], *verdict["flags"], *(f"missing: {name}" for name in missing)):
            print(f"  {text}")
    table = runs.home() / "runs" / study / "compare" / "table.csv"
    print(f"{table.relative_to(runs.home())}: {'there' if table.exists() else 'missing'}")
    return int(bool(wrong) or not table.exists())


def _figure(value) -> str:
    return "none" if value is None else f"{value:.3f}"


def figures(study: str) -> int:
    """Refresh the README's pictures in figures/ from a study's comparison."""
    compared = runs.home() / "runs" / study / "compare" / "figures"
    files = [compared / f"{name}.png" for name in README_FIGURES.get(study, OTHERWISE)]
    if study not in README_FIGURES:
        first = runs.Run(studies.expand(study)[0].name).path / "figures"
        files += [first / f"{name}.png" for name in OF_THE_FIRST_RUN]
    for file in files:
        if not file.exists():
            raise runs.RunError(f"{file}: not there; run `snakemake --config study={study}` first")
        with runs.whole(runs.project() / "figures" / file.name) as temporary:
            shutil.copyfile(file, temporary)
        print(f"figures/{file.name}")
    return 0


def pictures(name: str) -> int:
    """Draw the figures of a study (or a run) that lack pictures, by one browser, into its executed notebooks too."""
    from sae_lib.views import executed

    return executed.draw(name)


def words(study: str) -> int:
    """Compute and keep what 04 needs of the study's models alone: words' activations and the letters' probes."""
    from sae_lib.evaluation.saebench import word_material

    return word_material.of_study(study)


def main() -> int:
    """Parse the command line and run one command; a known fault is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m sae_lib", description=__doc__)
    parser.add_argument("command", choices=["check", "figures", "pictures", "plan", "verify", "words"])
    parser.add_argument("study", help="a file of params/studies, without .yaml; for pictures and verify also a run")
    given = parser.parse_args()
    try:
        commands = {"check": check, "figures": figures, "pictures": pictures, "plan": plan.plan,
                    "verify": verify.verify, "words": words}
        return commands[given.command](given.study)
    except (params.ParameterError, runs.RunError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
