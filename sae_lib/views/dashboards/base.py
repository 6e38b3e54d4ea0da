"""A dashboard: some state, the figures of that state, and controls that change it.

Figures come from pure functions, so that a batch draws the same ones without a widget. Whatever a run lacks becomes a
sentence in the place of the figure.
"""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go

from sae_lib import runs
from sae_lib.params import ParameterError
from sae_lib.views.dashboards.figure_widget import FigureWidget

WIDE = {"width": "auto", "max_width": "460px"}
STYLE = {"description_width": "initial"}
WIDEST = 1040
"""Pixels that a notebook has beside JupyterLab's sidebar on a laptop."""


class Dashboard:
    """What all dashboards share. A subclass names its ``parts``, draws each, and makes controls for its ``state``."""

    title = ""
    parts: tuple[str, ...] = ()
    """Names of what is drawn, in the order shown."""
    affects: dict[str, tuple[str, ...]] = {}
    """Parts that a key of the state changes; all parts for a key that is not here."""

    def __init__(self, **state: Any):
        self.state = state
        self.notices: list[str] = []
        """Sentences above everything: the verdict of a run that is no result, what is not known."""
        self.controls: dict[str, widgets.Widget] = {}
        self.panels: dict[str, Panel] = {}
        self.answered: list[tuple[str, float]] = []
        """What was changed, and the seconds that the kernel took to answer."""
        self._quiet = False

    # -- for subclasses ------------------------------------------------------------------------------------------

    def draw(self, part: str) -> go.Figure | str:
        """The figure (or HTML) of a part in the present state."""
        raise NotImplementedError

    def make_controls(self) -> dict[str, widgets.Widget]:
        """Widgets by the key of the state that each shows."""
        return {}

    def clicked(self, part: str, point: dict[str, Any]) -> None:
        """A point of a part's figure was clicked: x, y, trace, and its custom data where it has any."""

    def extra(self) -> list[widgets.Widget]:
        """Further widgets, below the controls."""
        return []

    @functools.cached_property
    def slot(self) -> widgets.VBox:
        """Where another dashboard opens below; a batch makes no widget, whose state its notebook would hold."""
        return widgets.VBox([], layout={"width": "100%"})

    # -- for everyone --------------------------------------------------------------------------------------------

    def drawn(self, part: str) -> go.Figure | str:
        """``draw``, with a sentence instead of what cannot be drawn."""
        try:
            return self.draw(part)
        except (runs.RunError, ParameterError) as error:
            return sentence(str(error))

    def figures(self) -> dict[str, go.Figure | str]:
        """Every part by name, as a batch shows them."""
        return {part: self.drawn(part) for part in self.parts}

    def set(self, **changes: Any) -> None:
        """Change the state, and draw anew what depends on it."""
        self._apply(changes)

    @property
    def widget(self) -> widgets.Widget:
        """The dashboard for JupyterLab, made when first asked for."""
        if not self.panels:
            self.panels = {part: Panel(lambda point, part=part: self.clicked(part, point)) for part in self.parts}
            self.controls = self.make_controls()
            for key, control in self.controls.items():
                control.observe(lambda change, key=key: self._moved(key, change["new"]), "value")
            for part, panel in self.panels.items():
                panel.show(self.drawn(part))
            row = widgets.HBox(list(self.controls.values()), layout={"flex_flow": "row wrap", "grid_gap": "4px 18px"})
            note = [widgets.HTML("".join(map(sentence, self.notices)))] if self.notices else []
            head = [widgets.HTML(f"<h3 style='margin:4px 0'>{html.escape(self.title)}</h3>")] if self.title else []
            self._widget = widgets.VBox([*head, *note, row, *self.extra(), *(p.box for p in self.panels.values()),
                                         self.slot], layout={"width": "100%"})
            self._widget.add_class("workbook-dashboard")
        return self._widget

    def _moved(self, key: str, value: Any) -> None:
        if not self._quiet:
            self._apply({key: value})

    def _apply(self, changes: dict[str, Any]) -> None:
        began = time.perf_counter()
        self.state |= changes
        self._quiet = True
        try:
            for key, value in changes.items():
                if key in self.controls and self.controls[key].value != value:
                    self.controls[key].value = value
        finally:
            self._quiet = False
        parts = {part for key in changes for part in self.affects.get(key, self.parts)}
        for part in self.parts:
            if part in parts and part in self.panels:
                try:
                    self.panels[part].show(self.drawn(part))
                except Exception as error:  # JupyterLab would keep it to itself
                    self.panels[part].show(sentence(f"could not be drawn ({type(error).__name__}: {error})"))
                    raise
        self.answered.append((", ".join(changes), time.perf_counter() - began))


class Panel:
    """A place for one figure or piece of HTML, which changes in place as long as its traces stay of the same kinds."""

    def __init__(self, on_click: Callable[[dict[str, Any]], None]):
        self.box = widgets.VBox([], layout={"width": "100%", "overflow": "auto hidden"})
        self.figure: FigureWidget | None = None
        self.on_click = on_click

    def show(self, drawn: go.Figure | str) -> None:
        """Put it there."""
        if isinstance(drawn, str):
            self.figure, self.box.children = None, (widgets.HTML(drawn),)
            return
        drawn.update_layout(width=min(drawn.layout.width or WIDEST, WIDEST))
        kinds = [(trace.type, trace.xaxis if "xaxis" in trace else None) for trace in drawn.data]
        if self.figure is not None and kinds == self.kinds:
            with self.figure.batch_update():
                for held, new in zip((*self.figure.data, self.figure.layout), (*drawn.data, drawn.layout)):
                    _assign(held, new.to_plotly_json())
            return
        self.figure, self.kinds = FigureWidget(drawn), kinds
        for number, trace in enumerate(self.figure.data):
            trace.on_click(lambda trace, points, _state, number=number: self._click(trace, points, number))
        self.box.children = (self.figure,)

    def _click(self, trace, points, number: int) -> None:
        if not points.point_inds:
            return
        place = points.point_inds[0]
        data = trace.customdata
        own = None if data is None else data[tuple(place)] if isinstance(place, (list, tuple)) else data[place]
        self.on_click({"x": points.xs[0], "y": points.ys[0], "trace": number, "customdata": own, "place": place})


def _assign(held, new: dict[str, Any]) -> None:
    """Give a trace or layout the values of ``new``: only those that differ, and nothing that it had beside."""
    old = held.to_plotly_json()
    for key in {*old, *new} - {"uid", "type", "template"}:
        if not _same(old.get(key), new.get(key)):
            held[key] = new.get(key)


def _same(one: Any, other: Any) -> bool:
    """Whether two properties of a figure are equal, arrays within them too."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other) if type(one) is type(other) else False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


class Sentence(Dashboard):
    """In the place of a dashboard that cannot be opened."""

    parts = ("sentence",)

    def __init__(self, text: str, title: str = ""):
        super().__init__()
        self.text, self.title = text, title

    def draw(self, part: str) -> str:
        """The sentence."""
        return sentence(self.text)


def sentence(text: str) -> str:
    """A sentence to the reader, on a coloured background."""
    return ("<p class='workbook-sentence' style='background:#F2F2F2;color:#111111;border-left:4px solid #9A9A9A;"
            f"padding:6px 10px;margin:4px 0'>{html.escape(text)}</p>")


def verdict(run: runs.Run) -> list[str]:
    """What a reader must know before looking at a run: nothing for a valid one."""
    held = run.json("validity.json") or {"status": "not judged", "reasons": ["02 did not end"], "flags": []}
    if held["status"] == "valid":
        return []
    why = f": {'; '.join(held.get('reasons', []))}" if held.get("reasons") else ""
    return [f"This run is {held['status']}{why}. What is shown is what it holds, not a result."]


def dropdown(options, value, label: str) -> widgets.Dropdown:
    """A choice."""
    return widgets.Dropdown(options=options, value=value, description=label, style=STYLE, layout=WIDE)


def number(value: int, top: int, label: str) -> widgets.BoundedIntText:
    """A whole number from 0 to ``top``, taken when Enter is pressed."""
    return widgets.BoundedIntText(value=value, min=0, max=max(top, 0), description=label, style=STYLE, layout=WIDE,
                                  continuous_update=False)


def switch(value: bool, label: str) -> widgets.Checkbox:
    """On or off."""
    return widgets.Checkbox(value=value, description=label, indent=False, layout=WIDE)
