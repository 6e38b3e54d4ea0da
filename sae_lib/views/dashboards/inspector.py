"""The latent inspector: what one latent of a run does, and the table of all of them."""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
import pandas as pd

from sae_lib import runs
from sae_lib.evaluation import latents, pairs
from sae_lib.params import ParameterError
from sae_lib.views import figures_latents as figures
from sae_lib.views.dashboards.base import Dashboard, dropdown, number, sentence, switch, verdict
from sae_lib.views.figures import caption

KINDS = ("strongest", "over the range")


class Inspector(Dashboard):
    """Density, activations, contexts, logits, neighbours and history of a latent; a table of all of them."""

    parts = ("card", "latent", "contexts")
    affects = {"contexts": ("contexts",), "log": ("latent",)}

    def __init__(self, run: runs.Run, latent: int | None = None):
        """Raises RunError or ParameterError for a run whose latents cannot be read."""
        self.run, self.held = run, latents.read(run)
        chosen = figures.first(self.held.table) if latent is None else latent
        super().__init__(latent=int(chosen), contexts=KINDS[0], log=False)
        self.title = f"Latents of {run.name}"
        self.notices = verdict(run) + [note[0].upper() + note[1:] for note in self.held.notes]
        self.snapshots = pairs.moments(run, lambda: self.held.codes)
        self.snapshot = self.snapshots[-1]
        self.caption = caption(run.name, run.json("training.json"))

    @property
    def latent(self) -> int:
        """The latent that is shown."""
        return min(self.state["latent"], len(self.held.table) - 1)

    def draw(self, part: str):
        """A part for the latent of the state."""
        row = self.held.table.iloc[self.latent]
        if part == "card":
            return figures.card(row, len(self.held.tokens))
        if part == "contexts":
            found = latents.contexts(self.held, self.latent, spread=self.state["contexts"] == KINDS[1])
            return figures.contexts(found, self.latent)
        return figures.latent(self.held, self.latent, pairs.history(self.snapshots, self.latent), self.by_cosine(),
                              self.by_pairs(), self.state["log"], self.run.name, self.caption)

    def by_cosine(self, count: int = figures.NEIGHBOURS) -> pd.Series:
        """Latents of the largest |cosine| with this one's decoder row."""
        cosines = (self.snapshot.rows @ self.snapshot.rows[self.latent]).numpy()
        strength = np.abs(cosines)
        strength[self.latent] = -1
        best = np.argsort(-strength, kind="stable")[:count]
        best = best[best != self.latent]
        return pd.Series(cosines[best], best)

    def by_pairs(self, count: int = figures.NEIGHBOURS) -> pd.Series:
        """Latents of the largest Jaccard index with this one."""
        others, strength = pairs.strengths(self.snapshot, self.latent, "Jaccard")
        best = np.argsort(-strength, kind="stable")[:count]
        return pd.Series(strength[best], others[best])

    def make_controls(self) -> dict[str, widgets.Widget]:
        """The latent's number, which contexts, and the scale of the histogram."""
        return {"latent": number(self.latent, len(self.held.table) - 1, "latent"),
                "contexts": dropdown(KINDS, self.state["contexts"], "contexts"),
                "log": switch(self.state["log"], "log tokens")}

    def extra(self) -> list[widgets.Widget]:
        """The table of all latents."""
        from itables.widget import ITable

        self.listing = ITable(figures.listing(self.held.table), select="single", maxBytes=0, showIndex=False,
                              layout={"top1": "searchBuilder"}, lengthMenu=[8, 25, 100], pageLength=8,
                              autoWidth=False, columnDefs=[{"width": "30%", "targets": [6, 7]}],
                              classes="display compact", style="width:100%;margin:0")
        self.listing.observe(self._chosen, "selected_rows")
        help_text = ("<b>All latents</b>: the arrows of a column sort, <i>Search</i> finds words, <i>Add Condition</i> "
                     "filters (density % between 0.1 and 1); a click on a row opens the latent.")
        return [widgets.HTML(help_text), self.listing]

    def _chosen(self, change) -> None:
        if change["new"]:
            self.set(latent=int(change["new"][0]))

    def clicked(self, part: str, point) -> None:
        """A neighbour's bar opens that latent."""
        if part == "latent" and point["trace"] in self.neighbour_traces:
            self.set(latent=int(point["y"]))

    @property
    def neighbour_traces(self) -> tuple[int, int]:
        """The traces whose bars are latents: the last two."""
        count = len(self.panels["latent"].figure.data)
        return count - 2, count - 1


class WithInspector(Dashboard):
    """A dashboard whose latents open in an inspector below it."""

    inspector: Inspector | None = None

    def inspect(self, run: runs.Run, latent: int) -> None:
        """Show ``latent`` of ``run`` in the slot below."""
        if self.inspector is None or self.inspector.run.name != run.name:
            self.inspector = Inspector(run, latent)
            self.slot.children = (self.inspector.widget,)
        else:
            self.inspector.set(latent=int(latent))

    def inspect_button(self) -> widgets.Widget:
        """A button that opens the chosen latent, for whom the mouse on a figure is no way."""
        button = widgets.Button(description="inspect latent", layout={"width": "auto"})
        button.on_click(lambda _button: self.inspect_chosen())
        return widgets.HBox([button])

    def inspect_chosen(self) -> None:
        """Open the latent of the state; a sentence in the slot where it cannot be."""
        try:
            self.inspect(self.run, self.state["latent"])
        except (runs.RunError, ParameterError) as error:
            self.inspector, self.slot.children = None, (widgets.HTML(sentence(str(error))),)
