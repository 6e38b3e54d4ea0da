"""What a metric is: everything that a reader must know before comparing two figures."""

from __future__ import annotations

from math import inf
from typing import NamedTuple


class Metric(NamedTuple):
    """One metric. Every header of a table and every axis takes its words from here."""

    name: str
    """Key in the JSON files and tables."""
    label: str
    """Name on axes and in tables."""
    direction: int
    """+1: higher is better; -1: lower is better; 0: neither, to be matched or read."""
    unit: str
    """What a value counts; after a comma, what else helps to read it."""
    source: str
    """Who measures it, on what."""
    version: str
    """The version of the source: another may mean another number by the same name."""
    formula: str
    lowest: float = 0.0
    """No SAE can score less; -inf where there is no floor."""
    highest: float = 1.0
    """No SAE can score more; inf where there is no ceiling."""
    trivial: float | None = None
    """What an SAE that does nothing of use scores, where that is one number."""
    trivial_by: str = ""
    """Which SAE, or guess, scores ``trivial``; without a number, what is known of it."""
    of_model: bool = False
    """The model's own figure: no SAE is in it, and none moves it."""

    @property
    def reading(self) -> str:
        """The direction in words."""
        return {1: "higher is better", -1: "lower is better", 0: "no direction"}[self.direction]

    @property
    def heading(self) -> str:
        """Head of a narrow column: the label with an arrow towards better."""
        return self.label + {1: " ↑", -1: " ↓", 0: ""}[self.direction]

    @property
    def called(self) -> str:
        """The label with its direction, where there is one."""
        return f"{self.label} ({self.reading})" if self.direction else self.label

    @property
    def panel(self) -> str:
        """Title of a panel: the label, and its reading in small letters."""
        return f"{self.label} <span style='font-size:13px'>({self.reading})</span>"

    @property
    def stacked(self) -> str:
        """The same on two lines, for a narrow panel."""
        return self.panel.replace(" <span", "<br><span")

    @property
    def axis(self) -> str:
        """The unit without its explanation, as an axis has room for."""
        return self.unit.partition(",")[0]

    @property
    def titled(self) -> str:
        """The label with its unit, for an axis without a panel's title."""
        return f"{self.label} ({self.axis})"

    @property
    def range(self) -> str:
        """Lowest and highest value, and what a trivial SAE scores, in words."""
        low = "no floor" if self.lowest == -inf else f"{self.lowest:g}"
        high = "no ceiling" if self.highest == inf else f"{self.highest:g}"
        ends = f"{low} to {high}"
        if self.trivial is not None:
            return f"{ends}; {self.trivial_by} scores {self.trivial:g}"
        return f"{ends}; {self.trivial_by}" if self.trivial_by else ends

    @property
    def from_(self) -> str:
        """Source and version."""
        return f"{self.source} ({self.version})"


def listed(*metrics: Metric) -> dict[str, Metric]:
    """Metrics by name."""
    return {metric.name: metric for metric in metrics}
