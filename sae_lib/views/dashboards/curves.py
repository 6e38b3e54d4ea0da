"""Training curves: of one run while it trains, of one that is finished, of many beside each other."""

from __future__ import annotations

import os
import time

import ipywidgets as widgets
import pandas as pd

from sae_lib import runs
from sae_lib.views import figures, figures_curves
from sae_lib.views.dashboards.base import Dashboard, dropdown, sentence, switch, verdict

AXES = ("samples", "step")
BUDGET = 0.01
"""Share of a training's time that drawing may take in the kernel."""
EVERY, SHARED = 3.0, 20.0
"""Seconds between drawings; the second where training works on all cores: a drawing takes the browser half a second of
one (measured in a Chromium without a graphics card)."""


def _smoothing() -> widgets.FloatSlider:
    return widgets.FloatSlider(value=0.0, min=0, max=0.95, step=0.05, description="smoothing", continuous_update=False,
                               style={"description_width": "initial"})


class RunCurves(Dashboard):
    """Six panels of one run: loss terms, gradient shares, explained variance, L0, dead share, learning rate."""

    parts = ("curves",)

    def __init__(self, name: str, history: pd.DataFrame, caption: str = "", notices: list[str] = ()):
        super().__init__(log=True, smoothing=0.0, x=AXES[1])
        self.name, self.history, self.caption, self.notices = name, history, caption, list(notices)
        self.spent, self.began = 0.0, time.perf_counter()
        self.last, self.redrawn, self.waiting = -SHARED, 0, False

    @classmethod
    def of(cls, run: runs.Run) -> RunCurves:
        """Of a run's folder. Raises RunError where it has no history."""
        try:
            history = runs.read_table(run.path / "history.parquet")
        except runs.RunError as error:
            raise runs.RunError(f"run '{run.name}': no training history; it was made elsewhere, or 02 did not end "
                                f"({error})") from None
        report = run.json("training.json")
        return cls(run.name, history, figures.caption(run.name, report) if report else "", verdict(run))

    def draw(self, part: str):
        """The six panels."""
        if self.history.empty and self.waiting:
            return sentence("The curves come with the first steps; their controls answer when training has ended.")
        if self.history.empty:
            return figures.training_curves(self.history, self.name, self.caption)
        shown = figures_curves.smoothed(self.history, self.state["smoothing"])
        return figures.training_curves(shown, self.name, self.caption, log=self.state["log"], x=self.state["x"])

    def make_controls(self) -> dict[str, widgets.Widget]:
        """Axes and smoothing."""
        return {"log": switch(True, "log losses and shares"), "x": dropdown(AXES, self.state["x"], "along"),
                "smoothing": _smoothing()}

    # -- while it trains -----------------------------------------------------------------------------------------

    def __call__(self, rows: list[dict[str, float]]) -> None:
        """Draw the history so far, unless drawing has had its share of the time; a trainer's ``watch``.

        A fault in drawing ends the drawing, never the training.
        """
        import torch

        now = time.perf_counter()
        if not self.panels or len(rows) < 2:  # nobody looks, or there is no line yet
            return
        every = SHARED if torch.get_num_threads() >= (os.cpu_count() or 1) else EVERY  # known once training has begun
        if self.spent is None or self.spent > BUDGET * (now - self.began) or now - self.last < every:
            return
        try:
            self.history = pd.DataFrame(rows)
            if len(rows) < 2 * self.redrawn:
                self._extend(self.panels["curves"].figure)
            else:  # whenever the rows have doubled, the axes and new terms too
                self.panels["curves"].show(self.draw("curves"))
                self.redrawn = len(rows)
            self.last = now
            self.spent += time.perf_counter() - now
        except Exception as error:
            self.spent = None
            print(f"live curves stopped ({type(error).__name__}: {error}); training goes on")

    def _extend(self, figure) -> None:
        """Longer lines in the same axes, in a tenth of the time."""
        shown = figures_curves.smoothed(self.history, self.state["smoothing"])
        with figure.batch_update():
            for trace in figure.data:
                if trace.meta in shown:
                    trace.update({"x": shown[self.state["x"]].to_numpy(float), "y": shown[trace.meta].to_numpy(float)})

    def finish(self, run: str, result) -> None:
        """The whole history, once training has ended."""
        self.history, self.caption, self.waiting = result.history, figures.caption(run, result.report), False
        self.set(log=self.state["log"])


class Curves(Dashboard):
    """Several runs: chosen quantities, runs or bands over seeds."""

    parts = ("curves",)

    def __init__(self, histories: dict[str, pd.DataFrame], table: pd.DataFrame, caption: str = ""):
        self.histories, self.table, self.caption = histories, table, caption
        self.recorded = figures_curves.quantities(histories.values())
        first = [name for name in ("loss/reconstruction", "explained_variance", "l0", "dead_share")
                 if name in self.recorded]
        super().__init__(shown=tuple(first), x=AXES[0], log=True, smoothing=0.0, bands=True)

    def draw(self, part: str):
        """A panel per chosen quantity."""
        state = self.state
        return figures_curves.curves(self.histories, self.table, list(state["shown"]), state["x"], state["log"],
                                     state["smoothing"], state["bands"], self.caption)

    def make_controls(self) -> dict[str, widgets.Widget]:
        """Quantities, axes, smoothing, bands."""
        options = [(figures_curves.called(name), name) for name in self.recorded]
        chosen = widgets.SelectMultiple(options=options, value=self.state["shown"], description="show", rows=6,
                                        layout={"width": "420px"})
        return {"shown": chosen, "x": dropdown(AXES, self.state["x"], "along"),
                "log": switch(True, "log losses and shares"), "bands": switch(True, "seeds as bands"),
                "smoothing": _smoothing()}
