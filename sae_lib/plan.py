"""What a study will cost before it starts: ``python -m sae_lib plan STUDY``, and one line as ``snakemake`` begins.

Sizes follow from the parameters; minutes from what ``speed`` times in a few seconds, each kind of batch once, and the
operations and durations in ``costs``. A machine that is busy with other work, or a run whose latents die, takes longer.
"""

from __future__ import annotations

import heapq
import json
import os
import subprocess
import sys

from sae_lib import params, runs, studies
from sae_lib.costs import Job, jobs_of
from sae_lib.speed import Speed

NAMES = {"extract": "extract", "words": "words", "train": "train", "eval": "evaluate", "letters": "letters",
         "compare": "compare"}
"""Each stage in the line, in their order."""
PATIENCE = 5.0
"""Seconds that the line as snakemake begins may time steps for; kinds beyond are guessed by their size."""
LIMIT = 60.0
"""Seconds after which work begins without the line."""


def plan(study: str) -> int:
    """Print the cost of every part of a study and of the whole; nothing is written."""
    members = studies.expand(study)
    studies.check_ingredients(members)
    _check_layers(members)
    cores = os.cpu_count() or 1
    jobs = jobs_of(study, members, Speed(cores=cores, training=threads_of(len(members), cores)["train"]))
    for text in _parts(jobs):
        print(text)
    size = sum(job.gigabytes for job in jobs)
    print(f"{len(members)} runs, {size:.2f} GB on disk. {in_words(study, jobs, cores)}")
    return 0


def _check_layers(members) -> None:
    from sae_lib.data import language_model

    for model, hook in {(p.model, p.hook) for p in (params.check("extract", member.params, member.origin)
                                                    for member in members) if p.model != language_model.PLANTED}:
        language_model.check_layer(model, hook)


def _parts(jobs: list[Job]) -> list[str]:
    """A line for each store and each run: what is asked of it, and its minutes if it were alone."""
    lines, names = [], dict.fromkeys(job.name for job in jobs)
    for name in names:
        own = {job.stage: job for job in jobs if job.name == name}
        times = [f"{NAMES[stage]} {'done' if job.done else _minutes(job.alone)}{job.note}"
                 for stage, job in own.items()]
        if "extract" in own:
            what = f"store {name}: {own['extract'].amount:,} tokens, {own['extract'].gigabytes:.2f} GB"
        elif "train" in own:
            what = f"run {name}: {own['train'].amount:,} samples, {own['train'].gigabytes:.2f} GB"
        else:
            what = f"study {name}"
        lines.append(f"{what}; minutes: {', '.join(times)}")
    return lines


def in_words(study: str, jobs: list[Job], cores: int) -> str:
    """The line: the study's minutes, and those of each stage; one that is finished is done."""
    minutes = {stage: seconds / 60 for stage, seconds in by_stage(jobs, cores).items()}
    parts = [f"{NAMES[stage]} {_minutes(60 * value) if value else 'done'}" for stage, value in minutes.items()]
    without = sorted({job.note for job in jobs if job.note.startswith(" (without") and not job.done})
    total = sum(minutes.values())
    return f"{study}: {_about(total)}: {', '.join(parts)}{without[0] if without else ''}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _about(minutes: float) -> str:
    """A number of minutes in words that claim no more than is known."""
    if not minutes:
        return "nothing is left to do"
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes:.0f} min" if minutes < 100 else f"about {minutes / 60:.1f} hours"


def threads_of(members: int, cores: int) -> dict[str, int]:
    """Threads of a job of each stage, as the Snakefile gives them out."""
    share = max(1, cores // max(1, members))
    return {"extract": cores, "words": cores, "train": min(cores, max(share, 4)), "eval": share, "letters": share,
            "compare": 1}


def by_stage(jobs: list[Job], cores: int) -> dict[str, float]:
    """Seconds of each stage as snakemake runs it: as many jobs at once as their threads leave room for."""
    threads = threads_of(sum(job.stage == "train" for job in jobs), cores)
    return {stage: _wall([job for job in jobs if job.stage == stage and not job.done], cores, threads[stage])
            for stage in NAMES}


def _wall(jobs: list[Job], cores: int, threads: int) -> float:
    """Seconds from the first job's start to the last one's end, what they share at the beginning."""
    ends = [0.0] * max(1, min(len(jobs), cores // threads))
    # A step is timed on its own threads; all else on all cores, of which each job has its share.
    slower = len(ends)
    for job in jobs:
        own = job.own * (1 if job.stage == "train" else slower)
        heapq.heappush(ends, heapq.heappop(ends) + job.fixed + own)
    return max(ends) + sum(job.shared + job.nulls * slower for job in jobs)


def line(study: str, left: list[tuple[str, str]], cores: int) -> str:
    """The line of the jobs in ``left`` (stage and name), made by a process of its own that cannot stop the work.

    A sentence says why where there is none.
    """
    asked = json.dumps({"study": study, "left": left, "cores": cores})
    try:
        found = subprocess.run([sys.executable, "-m", "sae_lib.batch", "sae_lib.plan"], input=asked,
                               capture_output=True, text=True, timeout=LIMIT, cwd=runs.project())
    except (OSError, subprocess.SubprocessError) as error:
        return f"{study}: how long it takes is not known ({type(error).__name__})"
    said = (found.stdout.strip() or found.stderr.strip() or "no answer").splitlines()[-1]
    return said if found.returncode == 0 else f"{study}: how long it takes is not known ({said})"


def main() -> int:
    """Read what is left to do from the standard input and print the line."""
    asked = json.load(sys.stdin)
    study, cores, members = asked["study"], asked["cores"], studies.expand(asked["study"])
    speed = Speed(PATIENCE, cores, threads_of(len(members), cores)["train"])
    jobs = jobs_of(study, members, speed, {tuple(one) for one in asked["left"]})
    print(in_words(study, jobs, cores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
