"""plotly's FigureWidget, which sends matrices as numbers instead of text.

plotly (7.1) sends one-dimensional arrays as bytes, but matrices as nested lists in JSON: for 512 x 512 cells that is
megabytes of text, and JSON has no NaN. Rows are one-dimensional.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly import serializers


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


class FigureWidget(go.FigureWidget):
    """A figure in JupyterLab."""

    def __init__(self, figure: go.Figure):
        for trait in self.traits().values():
            if trait.metadata.get("to_json") is serializers._py_to_js:
                trait.metadata["to_json"] = to_javascript
        super().__init__(figure)
