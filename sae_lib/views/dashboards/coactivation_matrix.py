"""Which latents fire together: the whole matrix, a block around a latent, over training, beside another run."""

from __future__ import annotations

import contextlib
import threading

import ipywidgets as widgets
import numpy as np

from sae_lib import runs
from sae_lib.evaluation import latents, matching, pairs
from sae_lib.params import ParameterError
from sae_lib.views import figures_coactivation as figures
from sae_lib.views import figures_latents
from sae_lib.views.dashboards.base import dropdown, number, verdict
from sae_lib.views.dashboards.inspector import WithInspector
from sae_lib.views.figures import caption

LARGE = 10_000_000
"""Numbers of a decoder whose latents are matched beside the reader's other work."""
SIZES, ORDERS, NONE = (32, 64, 128, 256, 512), ("number", "density"), "no other run"


class Coactivation(WithInspector):
    """An overview of all pairs, a cluster-ordered block with its scatter, snapshots, and the difference of two runs."""

    parts = ("overview", "block")
    affects = {"size": ("block",)}

    def __init__(self, run: runs.Run, others: list[str] = (), latent: int | None = None):
        """``others`` are runs that may be subtracted. Raises RunError or ParameterError where pairs cannot be read."""
        self.run, self.others, self._beside = run, [name for name in others if name != run.name], {}
        self.snapshots, self.matching = _snapshots(run), {}
        # What the next controls will ask for is read while the reader looks.
        self.reading = threading.Thread(target=_read, args=(self.snapshots,), daemon=True)
        self.names = [one.name for one in self.snapshots]
        if latent is None:
            latent = _first(run, self.snapshots[-1])
        super().__init__(measure="Jaccard", snapshot=self.names[-1], latent=int(latent), size=64, order="density",
                         other=NONE)
        self.title = f"Co-activation in {run.name}"
        self.notices = verdict(run)
        if not self.snapshots[-1].matrix.nnz or not self.snapshots[-1].own.any():
            self.notices.append("No latent fires on the tokens that pairs are counted over: there are no pairs.")
        self.caption = caption(run.name, run.json("training.json"))
        self.reading.start()

    # -- what the state means ------------------------------------------------------------------------------------

    @property
    def snapshot(self) -> pairs.Snapshot:
        """The moment that is shown."""
        return self.snapshots[self.names.index(self.state["snapshot"])]

    @property
    def latent(self) -> int:
        """The latent around which the block is."""
        return min(self.state["latent"], self.snapshot.matrix.shape[0] - 1)

    @property
    def cell(self) -> np.ndarray:
        """(F,) each latent's cell; by the last snapshot's density, so that cells stay where they are over training."""
        key = self.state["order"]
        if key not in self.__dict__.setdefault("_cells", {}):
            self._cells[key] = pairs.cells(self.snapshots[-1], key)
        return self._cells[key]

    def before(self, kept: list[pairs.Snapshot], name: str) -> pairs.Snapshot | None:
        """The snapshot before ``name`` (for stability)."""
        place = [one.name for one in kept].index(name)
        return kept[place - 1] if place else None

    def other(self) -> tuple[pairs.Snapshot, pairs.Snapshot | None, matching.Match] | None:
        """The other run's snapshot of this moment, the one before it, and latents as their last decoder rows match."""
        name = self.state["other"]
        if name == NONE:
            return None
        if name not in self._beside:
            if self.panels and self.snapshots[-1].rows.numel() > LARGE:  # seconds: not while a reader waits
                if name not in self.matching:
                    self.matching[name] = threading.Thread(target=self._match_and_draw, args=(name,), daemon=True)
                    self.matching[name].start()
                raise runs.RunError(f"reading {name} and matching its latents; the figure comes by itself")
            self._match(name)
        if isinstance(self._beside[name], Exception):
            raise self._beside[name]
        kept, matched = self._beside[name]
        theirs, moment = {one.name: one for one in kept}, self.snapshot.name
        if moment not in theirs:
            raise runs.RunError(f"{name} kept no snapshot '{moment}'")
        return theirs[moment], self.before(kept, moment), matched

    def _match(self, name: str) -> None:
        kept = _snapshots(runs.Run(name))
        self._beside[name] = kept, matching.match(self.snapshots[-1].rows, kept[-1].rows)

    def _match_and_draw(self, name: str) -> None:
        try:
            self._match(name)
            _read(self._beside[name][0])
        except (runs.RunError, ParameterError) as error:
            self._beside[name] = error
        if self.state["other"] == name:
            self.set(other=name)

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(self, part: str):
        """The overview or the block."""
        measure, beside = self.state["measure"], self.other()
        before = self.before(self.snapshots, self.snapshot.name)
        if measure == "stability" and before is None:
            raise runs.RunError("stability compares a snapshot with the one before it: choose a later one")
        return (self._overview if part == "overview" else self._block)(measure, before, beside)

    def _overview(self, measure: str, before, beside):
        cell, snapshot = self.cell, self.snapshot
        if beside is None:
            found = pairs.overview(snapshot, measure, cell, before)
        else:
            found = matching.overview_difference(snapshot, beside[0], beside[2], measure, cell, (before, beside[1]))
        return figures.overview(found, measure, self.state["order"], len(cell), self.latent, int(cell[self.latent]),
                                self._other_name, self.run.name, self._said(beside))

    def _block(self, measure: str, before, beside):
        snapshot, latent = self.snapshot, self.latent
        chosen = pairs.members(snapshot, latent, self.state["size"], measure)
        chosen = chosen[pairs.cluster_order(snapshot, chosen, measure)]
        order = np.argsort(chosen)
        if beside is None:
            values = pairs.block(snapshot, chosen[order], measure, before)
        else:
            values = matching.block_difference(snapshot, beside[0], beside[2], chosen[order], measure,
                                               (before, beside[1]))
        values = values[np.ix_(np.argsort(order), np.argsort(order))]
        strength = values[np.flatnonzero(chosen == latent)[0]]
        return figures.block(values, chosen, snapshot.own[chosen] / snapshot.tokens, strength, measure, latent,
                             self._other_name, self.run.name, self._said(beside))

    @property
    def _other_name(self) -> str:
        return "" if self.state["other"] == NONE else self.state["other"]

    def _said(self, beside) -> str:
        """What the counts rest on."""
        one = self.snapshot
        step = f", step {one.step:,}" if one.step is not None else ""
        text = f"{self.caption}<br>Snapshot {one.name}{step}; {one.tokens:,} held-out tokens"
        if one.about["least"] > 1:
            text += f"; pairs of fewer than {one.about['least']} common tokens were not kept"
        if beside is not None:
            matched = beside[2]
            known = matched.cosine[matched.partner >= 0]
            text += (f"; {matched.share:.0%} of latents matched (mutually nearest, cosine at least {matching.LEAST}"
                     f"{f', median {np.median(known):.2f}' if len(known) else ''})")
        return text

    # -- moving --------------------------------------------------------------------------------------------------

    def make_controls(self) -> dict[str, widgets.Widget]:
        """Measure, moment, latent, size of the block, order of the overview, and the run to subtract."""
        slider = widgets.SelectionSlider(options=self.names, value=self.names[-1], description="snapshot",
                                         continuous_update=False, style={"description_width": "initial"})
        return {"measure": dropdown(pairs.MEASURES, self.state["measure"], "measure"), "snapshot": slider,
                "latent": number(self.latent, self.snapshot.matrix.shape[0] - 1, "latent"),
                "size": dropdown(SIZES, self.state["size"], "block of"),
                "order": dropdown(ORDERS, self.state["order"], "order by"),
                "other": dropdown([NONE, *self.others], NONE, "less that of")}

    def extra(self) -> list[widgets.Widget]:
        """The way to the inspector."""
        return [self.inspect_button()]

    def clicked(self, part: str, point) -> None:
        """A cell of the overview opens the block around its strongest pair; a latent of the block opens itself."""
        if part == "overview" and point["trace"] == 0:
            self.set(latent=self.strongest(*point["place"]))
        elif part == "block" and point["trace"] in (0, 1):
            self.set(latent=int(point["y"] if point["trace"] == 0 else point["customdata"]))
            self.inspect_chosen()

    def strongest(self, row: int, column: int) -> int:
        """The latent (of the cell's row) of the strongest pair in a cell of the overview."""
        cell = self.cell
        chosen = np.flatnonzero((cell == row) | (cell == column))
        values = np.abs(pairs.block(self.snapshot, chosen, "Jaccard" if self.state["measure"] == "stability" else
                                    self.state["measure"]))
        values[np.ix_(cell[chosen] != row, np.arange(len(chosen)))] = np.nan
        values[:, cell[chosen] != column] = np.nan
        if not np.isfinite(values).any():
            return int(chosen[0])
        return int(chosen[np.unravel_index(np.nanargmax(values), values.shape)[0]])


def _snapshots(run: runs.Run) -> list[pairs.Snapshot]:
    """The run's snapshots, the finished SAE's pairs counted now where training did not."""
    return pairs.moments(run, lambda: latents.read(run).codes)


def _read(kept: list[pairs.Snapshot]) -> None:
    """Read what the snapshots hold; what cannot be read is said when it is asked for."""
    for one in reversed(kept):
        with contextlib.suppress(runs.RunError):
            one.own, one.matrix  # noqa: B018
        with contextlib.suppress(runs.RunError):
            one.rows if one.has_rows else None  # noqa: B018


def _first(run: runs.Run, snapshot: pairs.Snapshot) -> int:
    """The latent to open with: the inspector's, else one that fires."""
    with contextlib.suppress(runs.RunError, ParameterError):
        return figures_latents.first(latents.read(run).table)
    return int(np.argmax(snapshot.own))
