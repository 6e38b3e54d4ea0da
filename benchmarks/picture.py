"""train_step's results as the README's picture: ``python benchmarks/picture.py`` writes figures/train_step.png."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib import runs
from sae_lib.views.template import COLOURS, GREY, dress


def picture(results: dict) -> go.Figure:
    """A panel per size, a bar per contender and setting: milliseconds per step on a log axis."""
    sizes = results["sizes"]
    fig = make_subplots(rows=len(sizes), cols=1, vertical_spacing=0.1, subplot_titles=[
        f"D {one['D']}, F {one['F']}, k {one['k']}, batch {one['batch']}" for one in sizes])
    for row, one in enumerate(sizes, 1):
        times = sorted(one["milliseconds"].items(), key=lambda pair: -pair[1])
        own = [name.startswith("workbook") for name, _ in times]
        fig.add_bar(y=[name for name, _ in times], x=[ms for _, ms in times], orientation="h", row=row, col=1,
                    text=[f"{ms:,.0f}" for _, ms in times], textposition="outside", showlegend=False, cliponaxis=False,
                    marker={"color": [COLOURS[0] if mine else GREY for mine in own],
                            "pattern": {"shape": ["" if mine else "/" for mine in own]}})
        longest = max(ms for _, ms in times)
        fig.update_xaxes(type="log", dtick=1, range=[0.9, _log(longest) + 0.25], row=row, col=1)
    fig.update_xaxes(title="Milliseconds per training step (log)", row=len(sizes), col=1)
    fig.update_yaxes(automargin=True)
    packages = results["provenance"]["packages"]
    return dress(fig, "One TopK training step, in one process",
                 f"Median; {results['threads']} threads, CPU; torch {packages['torch']}, "
                 f"sae-lens {packages['sae-lens']}, dictionary-learning 0.1.0, eai-sparsify 1.3.3",
                 width=1080, height=230 + 290 * len(sizes), top=100)


def _log(value: float) -> float:
    import math

    return math.log10(value)


if __name__ == "__main__":
    found = runs.read_json(Path(__file__).parent / "results" / "train_step-cpu.json")
    picture(found).write_image(runs.project() / "figures/train_step.png", scale=1.5)
