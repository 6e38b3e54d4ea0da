"""What a run's folder claims, hashed when a stage ends, and the command that says what no longer holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from sae_lib import runs
from sae_lib.params import ParameterError, digest

CLAIMS = {"02_train_variant": ("params.yaml", "provenance.json", "training.json", "history.parquet", "sae/*",
                               "snapshots/*/*", "coactivation/*", "latents/*"),
          "03_eval": ("evals/core.json", "evals/sparse_probing.json", "evals/sae_probes.json", "evals/scr.json",
                      "evals/tpp.json", "evals/unlearning.json", "evals/truth.json", "evals/nulls.json",
                      "evals/compression.json", "evals/compression_importance.safetensors", "evals/over_training.json",
                      "evals/done.json"),
          "04_letter_absorption": ("evals/*absorption*", "evals/*letter*")}
"""The files that each stage writes and vouches for, beside validity.json, which every stage completes."""
NAMES = tuple(pattern for patterns in CLAIMS.values() for pattern in patterns) + ("validity.json", "evals/*")


def seal(run: runs.Run, stage: str) -> None:
    """Write the hashes of what ``stage`` (a notebook's name) wrote into the run's hashes.json.

    Training begins the file anew; a later stage adds its own files and leaves the others' hashes as they are, so
    that a change in between is found. A training that ended as planned needs its checkpoints no more.
    """
    begins = stage == "02_train_variant"
    held = (None if begins else run.json("hashes.json")) or {"files": {}, "stages": {}}
    # Of an SAE made elsewhere the first evaluation wrote what training does else.
    wrote = CLAIMS[stage] if held["stages"] or begins else (*CLAIMS["02_train_variant"], *CLAIMS[stage])
    for path in _files(run.path, (*wrote, "validity.json")):
        held["files"][path] = runs.sha256(run.path / path)
    made = runs.provenance()
    held["stages"][stage] = {key: made[key] for key in ("written", "library", "packages")}
    runs.write_json(run.path / "hashes.json", held)
    if begins and _as_planned(run):
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)


def _as_planned(run: runs.Run) -> bool:
    """False where a person stopped the training: it can go on from its checkpoints."""
    report = run.json("training.json") or {}
    return bool(report.get("steps") == report.get("planned_steps") or report.get("nonfinite")
                or run.params.get("stop_after_steps") is not None)


def faults(run: runs.Run) -> list[str]:
    """Sentences, one for each claim of the run's folder that does not hold now; empty where all hold."""
    try:
        held = run.json("hashes.json")
        files, stages = (held["files"].items(), held["stages"].items()) if held else ((), ())
    except (runs.RunError, KeyError, TypeError, AttributeError) as error:
        return [f"hashes.json: damaged ({error})"]
    if not held:
        return ["hashes.json: missing; 02_train_variant did not run to its end"]
    found = []
    for path, written in files:
        if not (run.path / path).is_file():
            found.append(f"{path}: missing")
        elif runs.sha256(run.path / path) != written:
            found.append(f"{path}: changed since it was written")
    found += [f"{path}: not among what the stages wrote" for path in _files(run.path, NAMES)
              if path not in held["files"]]
    return found + [*_activations(run), *_versions(stages)]


def _files(folder: Path, patterns) -> list[str]:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths if not path.name.endswith(".tmp"))


def _activations(run: runs.Run) -> Iterator[str]:
    """The store that the run was trained on: there, the same content, every shard as it was written."""
    from sae_lib.data.activations import open_named

    try:
        named = run.json("training.json")["activations"]
        asked = run.params.get("activations", "auto")
    except (runs.RunError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return  # said already: the file is missing or changed
    if str(named["content_hash"]).startswith("stream-"):
        return  # streamed: nothing was kept
    try:
        store = open_named(named["name"] if asked == "auto" else asked)
        listed = store.manifest.get("shards", {})
        hashes = [shard["sha256"] for split in ("train", "heldout") for shard in listed.get(split, [])]
        # A store's hash is that of its manifest's shards; activations computed elsewhere are hashed when asked.
        told = digest(hashes, 24) if hashes else store.content_hash
        if not store.content_hash == named["content_hash"] == told:
            yield f"activations/{named['name']}: not the content that the run was trained on"
        store.verify()
    except (runs.RunError, ParameterError) as error:
        yield f"activations/{named['name']}: {error}"


def _versions(stages) -> Iterator[str]:
    """Stages made by another library or other packages than those here."""
    here = runs.provenance()
    for stage, made in stages:
        if made["library"] != here["library"]:
            yield f"{stage}: stale, made by library {made['library']}, here is {here['library']}"
        for name in sorted({*made["packages"], *here["packages"]}):
            then, now = made["packages"].get(name), here["packages"].get(name)
            if then != now:
                yield f"{stage}: made with {name} {then or 'missing'}, here is {now or 'missing'}"


def verify(given: str) -> int:
    """Print for a run (``quickstart/a-s1`` or ``runs/quickstart/a-s1``), or each of a study's, what does not hold.

    Returns 1 where anything does not. Raises RunError where there is no such run, ParameterError for a bad name.
    """
    base = (runs.home() / "runs").resolve()
    path = Path(given)
    name = path.resolve().relative_to(base).as_posix() if path.resolve().is_relative_to(base) else given
    name = name.removeprefix("runs/").rstrip("/")
    run = runs.Run(name)
    several = [run] if (run.path / "params.yaml").exists() else [
        runs.Run(f"{name}/{file.parent.name}") for file in sorted(run.path.glob("*/params.yaml"))]
    if not several:
        raise runs.RunError(f"run '{name}': no params.yaml in {run.path}; name a run, or a study that was run")
    wrong = 0
    for one in several:
        found = faults(one)
        wrong += bool(found)
        print(f"{one.name}: " + ("holds" if not found else f"{len(found)} not as written"))
        for text in found:
            print(f"  {text}")
    return int(bool(wrong))
