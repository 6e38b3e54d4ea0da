"""plotly's FigureWidget, which sends plotly.js once for a page, and matrices as numbers instead of text.

plotly (7.1) sends its five megabytes of JavaScript with every figure, and the browser reads them for each: of the 18
seconds of 05's twenty figures that was 7. It sends one-dimensional arrays as bytes, but matrices as nested lists in
JSON: for 512 x 512 cells that is megabytes of text, and JSON has no NaN. Rows are one-dimensional.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly
import plotly.graph_objects as go
import traitlets
from plotly import serializers

_held: list[widgets.HTML] = []


def to_javascript(value: Any, manager: Any) -> Any:
    """A widget's value for the browser: plotly's own conversion, but a matrix of numbers as rows of bytes."""
    if isinstance(value, dict):
        return {key: to_javascript(item, manager) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_javascript(item, manager) for item in value]
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f":
        rows = np.ascontiguousarray(value, np.float32)
        return [{"buffer": memoryview(row), "dtype": "float32", "shape": row.shape} for row in rows]
    return serializers._py_to_js(value, manager)


def plotly_js() -> widgets.HTML:
    """What holds plotly.js for all figures of this kernel, never shown."""
    if not _held or _held[0].comm is None:  # nothing was shown yet, or all widgets were closed
        bundle = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"
        _held[:] = [widgets.HTML(value=bundle.read_text(encoding="utf-8"))]
    return _held[0]


class FigureWidget(go.FigureWidget):
    """A figure in JupyterLab."""

    _esm = Path(__file__).with_suffix(".js")
    _plotly = traitlets.Instance(widgets.HTML).tag(sync=True, **widgets.widget_serialization)

    @traitlets.default("_plotly")
    def _shared(self) -> widgets.HTML:
        return plotly_js()

    def __init__(self, figure: go.Figure):
        for trait in self.traits().values():
            if trait.metadata.get("to_json") is serializers._py_to_js:
                trait.metadata["to_json"] = to_javascript
        super().__init__(figure)
