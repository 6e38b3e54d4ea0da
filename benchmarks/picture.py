"""Results as pictures of the README and the docs: ``python benchmarks/picture.py`` writes them into figures/."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import plotly.graph_objects as go
import tune
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
    """A row of panels per size, a panel per measure, a curve per architecture: mean and range over seeds.

    Of the trials on SmolLM2 in which nothing but size, architecture, rate and seed was set.
    """
    names = ["d_sae", "batch_size", "samples"]
    trials = [one for one in results["trials"] if not {*one["trial"]} - {"seed", "architecture", "lr", *names}]
    shipped = tune.checked({})
    frame = pd.json_normalize(trials)
    for name in names:
        frame[f"trial.{name}"] = frame[f"trial.{name}"].fillna(getattr(shipped, name))
    sizes = frame.groupby([f"trial.{name}" for name in names])
    fig = make_subplots(rows=len(sizes), cols=len(TRIED), column_titles=[*TRIED.values()], horizontal_spacing=0.07,
                        vertical_spacing=0.08)
    architectures = [*dict.fromkeys(frame["trial.architecture"])]
    for row, ((width, batch, samples), held) in enumerate(sizes, 1):
        for name, of_one in held.groupby("trial.architecture", sort=False):
            number, rates = architectures.index(name), of_one.groupby("lr")
            for column, measure in enumerate(TRIED, 1):
                mean = rates[measure].mean()
                fig.add_scatter(x=mean.index, y=mean, name=name, row=row, col=column, mode="lines+markers",
                                line=style(number), marker=mark(number, 8), legendgroup=name,
                                showlegend=(row, column) == (1, 1),
                                error_y={"array": rates[measure].max() - mean, "symmetric": False,
                                         "arrayminus": mean - rates[measure].min(), "thickness": 1})
        fig.update_yaxes(tickformat=".0%", row=row, col=len(TRIED))
        fig.update_yaxes(title=f"F {width:.0f}, batch {batch:.0f},<br>{samples:,.0f} samples", row=row, col=1)
        fig.update_xaxes(title="Learning rate (log)" if row == len(sizes) else None, row=row)
    fig.add_vline(x=Architecture.tuned_lr, line={"color": GREY, "dash": "dot"})
    fig.update_xaxes(type="log", tickvals=sorted(frame.lr.unique()), tickformat=".1e")
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"})
    return dress(fig, "Learning rates on SmolLM2", "Layer 8, L0 32 or steered to it; mean and range over seeds; the "
                 "dotted line is the default", width=1180, height=160 + 340 * len(sizes), top=150)


PICTURES = {"train_step": train_step, "learning_rates": learning_rates}
RESULTS = {"train_step": "train_step-cpu.json", "learning_rates": "tuning-cpu.json"}

if __name__ == "__main__":
    for picture, draw in PICTURES.items():
        found = runs.read_json(Path(__file__).parent / "results" / RESULTS[picture])
        draw(found).write_image(runs.project() / f"figures/{picture}.png", scale=1.5)
