"""Measure the null baselines' figures that come with the workbook, or compare them with ones measured here.

    snakemake && python benchmarks/embedded_nulls.py quickstart
    snakemake --config study=ci && python benchmarks/embedded_nulls.py ci --check

It needs a study's trained runs, and measures every null of them anew, whatever the workbook or a cache holds; entries
of other studies stay. ``--check`` writes nothing, measures the first run's random and untrained SAEs, and fails where a
figure lies outside the interval of the one that came with the workbook, or, where it has none, further off than
TOLERANCE of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sae_lib import params, runs, studies
from sae_lib.evaluation import embedded_nulls, evaluate, letters

TOLERANCE = 0.01
"""Relative: models read in another precision or on another processor round otherwise."""
KEPT = ("metrics", "note", "within_this_sae", "places")


def measured(member, names: list[str] | None) -> dict[str, dict]:
    """Every null's figures beside a run, by key; of ``names`` alone where they are given."""
    found = {}
    asked = params.check("train", member.params, member.origin)
    for stage, run, file in (("eval", evaluate.evaluate, "nulls"), ("letters", letters.evaluate, "absorption_nulls")):
        settings = params.check(stage, member.params | ({"nulls": names} if names else {}), member.origin)
        run(settings)
        for name, entries in runs.Run(member.name).json(f"evals/{file}.json", {}).items():
            for evaluation, entry in entries.items():
                if "key" in entry:
                    place = embedded_nulls.place(asked, name, evaluation, settings)
                    found[entry["key"]] = entry | {"places": [place]}
    return found


def joined(ours: dict[str, dict], more: dict[str, dict]) -> dict[str, dict]:
    """Both sets of entries; one that several runs share, or was here before, has all its places."""
    places = {key: sorted({*ours.get(key, {}).get("places", []), *entry["places"]}) for key, entry in more.items()}
    return ours | {key: entry | {"places": places[key]} for key, entry in more.items()}


def compare(mine: dict, theirs: dict) -> list[str]:
    """What differs, metric by metric."""
    wrong = []
    for name, value in theirs["metrics"].items():
        low, high = (theirs.get("within_this_sae") or {}).get(name) or (value, value)
        room = TOLERANCE * max(abs(value), 0.01)
        if value is not None and not low - room <= mine["metrics"][name] <= high + room:
            wrong.append(f"{name}: {mine['metrics'][name]}, with the workbook {value}")
    return wrong


def main() -> int:
    """Measure, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    members = studies.expand(asked.study)
    before = runs.read_json(embedded_nulls.FILE) if embedded_nulls.FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(embedded_nulls, "find", lambda _: None):
        # What the model alone gives need not be computed once more.
        for part in ("wheels", "models", *(["evaluation/*.safetensors"] if asked.check else [])):
            for held in runs.cache().glob(part):
                place = Path(folder) / held.relative_to(runs.cache())
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(held)
        os.environ["SAE_WORKBOOK_CACHE"] = folder
        found = {}
        for member in members[:1] if asked.check else members:
            found = joined(found, measured(member, ["random", "untrained"] if asked.check else None))
    if not asked.check:
        kept = {key: {name: entry[name] for name in KEPT if name in entry} for key, entry in found.items()}
        kept = joined(before, kept)
        runs.write_json(embedded_nulls.FILE, dict(sorted(kept.items())))
        print(f"{len(found)} entries measured, {len(kept)} in {embedded_nulls.FILE.name}")
        return 0
    known = {key: compare(entry, before[key]) for key, entry in found.items() if key in before}
    for key, wrong in known.items():
        print(f"{key}: {'; '.join(wrong) or 'agrees'}")
    print(f"{len(known)} of {len(found)} figures come with the workbook")
    return int(not known or any(known.values()))


if __name__ == "__main__":
    sys.exit(main())
