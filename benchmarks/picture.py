"""Results as pictures of the README and the docs: ``python benchmarks/picture.py`` writes them into figures/."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib import runs
from sae_lib.sae.architectures import Architecture
from sae_lib.views.template import COLOURS, GREY, dress, mark, style

TRIED = {"explained_variance": "Explained variance", "letter_recovery": "Letter recovery",
         "unused_share": "Unused latents"}
"""What a trial of a learning rate measures."""


def train_step(results: dict) -> go.Figure:
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


def learning_rates(results: dict) -> go.Figure:
    """A panel per measure, a curve per architecture: the trials in which nothing but the rate differs."""
    alone = {"seed", "architecture", "samples", "warmup_steps", "lr"}
    trials = [one for one in results["trials"] if {*one["trial"]} == alone and one["trial"]["warmup_steps"] == 50]
    fig = make_subplots(rows=1, cols=len(TRIED), subplot_titles=[*TRIED.values()], horizontal_spacing=0.07)
    for number, name in enumerate(dict.fromkeys(one["trial"]["architecture"] for one in trials)):
        own = sorted((one for one in trials if one["trial"]["architecture"] == name), key=lambda one: one["lr"])
        for column, measure in enumerate(TRIED, 1):
            fig.add_scatter(x=[one["lr"] for one in own], y=[one[measure] for one in own], name=name, row=1, col=column,
                            mode="lines+markers", line=style(number), marker=mark(number, 8), legendgroup=name,
                            showlegend=column == 1)
    fig.add_vline(x=Architecture.tuned_lr, line={"color": GREY, "dash": "dot"})
    fig.update_xaxes(type="log", title="Learning rate (log)")
    fig.update_yaxes(tickformat=".0%", row=1, col=len(TRIED))
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"})
    return dress(fig, "Learning rates on SmolLM2", "Layer 11, F 4096, L0 32 or steered to it, batch 2048, 500,000 "
                 "samples, one seed; the dotted line is the default", width=1180, height=520, top=140)


PICTURES = {"train_step": train_step, "learning_rates": learning_rates}
RESULTS = {"train_step": "train_step-cpu.json", "learning_rates": "tuning-cpu.json"}

if __name__ == "__main__":
    for picture, draw in PICTURES.items():
        found = runs.read_json(Path(__file__).parent / "results" / RESULTS[picture])
        draw(found).write_image(runs.project() / f"figures/{picture}.png", scale=1.5)
