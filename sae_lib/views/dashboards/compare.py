"""A study's runs: any figure against any other, letters by runs, and the way into each run."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as widgets

from sae_lib import runs
from sae_lib.metrics import METRICS
from sae_lib.params import ParameterError
from sae_lib.views import figures_absorption, figures_compare, figures_explore
from sae_lib.views.dashboards.base import Dashboard, Sentence, dropdown, sentence, switch
from sae_lib.views.dashboards.curves import RunCurves

LETTERS = {column: METRICS[name].label.lower() for column, name in figures_absorption.MAPS.items()}
NONE = "no run"


def opened(make: Callable[..., Dashboard], *args, **options) -> Dashboard:
    """A dashboard, or the sentence that says why it cannot be opened."""
    try:
        return make(*args, **options)
    except (runs.RunError, ParameterError) as error:
        return Sentence(str(error))


class RunTabs:
    """The four dashboards of one run, each opened when its tab is."""

    def __init__(self, name: str, others: list[str] = (), letter: str | None = None, start: int = 0):
        # Imported when a run is opened: they need torch, which a study's page shows its verdicts without.
        from sae_lib.views.dashboards.coactivation_matrix import Coactivation
        from sae_lib.views.dashboards.feature_splits import FeatureSplits
        from sae_lib.views.dashboards.inspector import Inspector

        run = runs.Run(name)
        self.makers = {"latents": lambda: Inspector(run), "co-activation": lambda: Coactivation(run, others),
                       "feature splits": lambda: FeatureSplits(run, others, letter),
                       "training curves": lambda: RunCurves.of(run)}
        self.boards: dict[str, Dashboard] = {}
        self.widget = widgets.Tab([widgets.VBox() for _ in self.makers], titles=tuple(self.makers),
                                  selected_index=start)
        self.widget.observe(lambda change: self.open(change["new"]), "selected_index")
        self.open(start)

    def open(self, number: int | None) -> None:
        """Open a tab."""
        if number is None:
            return
        name = list(self.makers)[number]
        if name not in self.boards:
            self.boards[name] = opened(self.makers[name])
            self.widget.children[number].children = (self.boards[name].widget,)


class Compare(Dashboard):
    """Metric against metric, letters by runs; a click on a mark or a cell opens the run."""

    parts = ("explore", "letters_map", "run")
    affects = {"x": ("explore",), "y": ("explore",), "log": ("explore",), "apart": ("explore",),
               "letters": ("letters_map",), "run": ("run",)}

    def __init__(self, comparison):
        self.comparison, self.tabs = comparison, None
        self.columns = figures_explore.choices(comparison.table)
        if not self.columns:
            raise runs.RunError(f"study '{comparison.study}': no run has a figure to draw")
        first = [name for name in ("l0", "explained_variance", "mse") if name in self.columns] + self.columns
        y = "explained_variance" if "explained_variance" in self.columns else first[-1]
        super().__init__(x=first[0], y=y, log=False, apart=False, letters="full_absorption", run=NONE)
        self.caption = figures_compare.note(comparison.table, comparison.study)

    def draw(self, part: str):
        """The scatter, the letters' map, or what a run's parameters are beside the baseline's."""
        held, state = self.comparison, self.state
        if part == "explore":
            return figures_explore.explore(held.table, state["x"], state["y"], held.parameters, held.differences,
                                           state["log"], state["apart"], caption=self.caption)
        if part == "letters_map":
            if not len(held.letters):
                return sentence("No run has letters: 04 did not run, or its runs are no results.")
            return figures_absorption.letters_by_run(held.letters, held.table, self.caption, state["letters"])
        if state["run"] == NONE:
            return "<p><i>A click on a mark (or a choice of run) opens the run here.</i></p>"
        row = held.table[held.table.run == state["run"]].iloc[0]
        said = "<br>".join(map(html.escape, held.parameters[row.run].split("\n")))
        return f"<p><b>{html.escape(row.run)}</b>: {html.escape(self._verdict(row))}<br>{said}</p>"

    @staticmethod
    def _verdict(row) -> str:
        reasons, flags = row["reasons"], row["flags"]  # a Series has flags of its own
        return row.status + (f": {reasons}" if reasons else "") + (f" ({flags})" if flags else "")

    def make_controls(self) -> dict[str, widgets.Widget]:
        """Axes, the letters' figure, what is shown, and the run to open."""
        options = [(figures_explore.called(name), name) for name in self.columns]
        return {"x": dropdown(options, self.state["x"], "along"), "y": dropdown(options, self.state["y"], "up"),
                "log": switch(False, "log axis"), "apart": switch(False, "runs set apart"),
                "letters": dropdown([(text, name) for name, text in LETTERS.items()], self.state["letters"], "letters"),
                "run": dropdown([NONE, *self.comparison.table.run], NONE, "open run")}

    def clicked(self, part: str, point) -> None:
        """A mark opens its run; a letter's cell opens the run's feature splits at the letter."""
        if part == "explore" and point["customdata"] is not None:
            self.set(run=str(point["customdata"]))
        elif part == "letters_map":
            names = figures_compare.labels(self.comparison.table)
            run = next((run for run, name in names.items() if name == point["y"]), None)
            if run:
                self._start, self._letter = 2, point["x"]
                self.set(run=run)

    _start, _letter = 0, None

    def _apply(self, changes) -> None:
        super()._apply(changes)
        if "run" in changes:
            name, others = self.state["run"], list(self.comparison.table.run)
            try:
                self.tabs = None if name == NONE else RunTabs(name, others, self._letter, self._start)
                self.slot.children = () if self.tabs is None else (self.tabs.widget,)
            except (runs.RunError, ParameterError) as error:
                self.slot.children = (widgets.HTML(sentence(str(error))),)
            self._start, self._letter = 0, None
