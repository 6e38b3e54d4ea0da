"""What earlier studies reported of these variants, as data: placed, judged by rules, and never mixed with measurements.

``results.json`` holds the records as they were published; ``records`` reads and places them, ``rules`` says what is
wrong with each, and ``parts`` splits a study's records into what may stand in one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from sae_lib.evaluation.reported.records import STUDIES, Record, Target, read
from sae_lib.evaluation.reported.rules import Annotation, Judged, judge

__all__ = ["Annotation", "Judged", "Part", "Record", "Study", "Target", "judged", "of_variants", "parts", "studies"]


class Part(NamedTuple):
    """Records that may stand in one table."""

    why: str
    """Why they do not stand beside the study's baseline; empty for those that do."""
    records: list[Judged]


class Study(NamedTuple):
    """All that one study reported."""

    name: str
    parts: list[Part]
    targets: dict[str, Target]
    """What the study wanted to reach, by metric."""
    about: str
    """What holds for every record."""

    @property
    def records(self) -> list[Judged]:
        """The records of all parts."""
        return [one for part in self.parts for one in part.records]

    def standing(self, metric: str) -> dict[str, float]:
        """By run the figures of a metric that are results and compare with the baseline's: all that may be averaged."""
        return {one.record.run: one.record.figures[metric] for one in self.records if one.stands(metric)}


def judged() -> list[Judged]:
    """Every record with what is wrong with it. Raises RunError where the file is damaged."""
    return judge(read().records)


def studies() -> list[Study]:
    """Every study with its records. Raises RunError where the file is damaged."""
    held = read()
    found = judge(held.records)
    return [Study(name, parts([one for one in found if one.record.study == name]), held.targets.get(name, {}),
                  held.about) for name in STUDIES]


def of_variants(variants: Iterable[str]) -> list[Study]:
    """The studies that reported of any of these variants (named as runs are, the model in front or not).

    A study's own variants tell it; topk and standard, which are every study's baselines, do not.
    """
    names = list(variants)
    return [study for study in studies() if any(re.search(rf"(^|-){STUDIES[study.name].stem}(_|-|$)", str(name))
                                                for name in names)]


def parts(found: list[Judged]) -> list[Part]:
    """A study's records split into what stands in one table: with its baseline, apart from it, and what is no score."""
    groups: dict[str, list[Judged]] = {}
    for one in found:
        groups.setdefault(one.why, []).append(one)
    def place(why: str) -> tuple[bool, bool, bool]:
        based = any(one.record.variant == STUDIES[one.record.study].base for one in groups[why])
        return why != "", not based, groups[why][0].status == "degenerate"
    order = sorted(groups, key=place)
    return [Part(why, groups[why]) for why in order]
