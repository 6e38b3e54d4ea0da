"""Figures of planted worlds: SAEBench's absorption against the true one, and recovery by architecture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS
from sae_lib.views.figures import explained
from sae_lib.views.template import GREY, dress, mark

if TYPE_CHECKING:
    from sae_lib.evaluation import truth as truths

COMPARED = (("true_absorption_of_parent", "saebench_full_absorption"),
            ("true_absorption", "saebench_full_absorption_with_child"),
            ("true_absorption_of_parent", "saebench_absorption_fraction"))
"""Pairs of columns: of the rows where a parent fires, of those where a child does too, and the fraction."""
TITLES = ("Rows where the parent fires", "Rows where a child fires too", "Absorption fraction", "Recovery")


def truth(table: pd.DataFrame, caption: str = "") -> go.Figure:
    """Four panels of one row per SAE: three of SAEBench's absorption over the true one, and MCC over L0.

    ``table`` has architecture, d_sae, status, l0, mcc and the columns of COMPARED. SAEs that are not valid are left out
    and counted in the caption, which gives Spearman's rank correlation of each panel with its interval.
    """
    from sae_lib.evaluation import truth as truths  # and torch, which few pages need here

    valid = table[table.status == "valid"]
    fig = make_subplots(rows=2, cols=2, subplot_titles=TITLES, horizontal_spacing=0.12, vertical_spacing=0.17)
    for number, (architecture, own) in enumerate(valid.groupby("architecture", sort=False)):
        names = [f"{row.architecture}, {row.d_sae} latents, L0 {row.l0:.1f}" for row in own.itertuples()]
        for place, (x, y) in enumerate((*COMPARED, ("l0", "mcc"))):
            fig.add_scatter(x=own[x], y=own[y], mode="markers", name=architecture, legendgroup=architecture,
                            showlegend=place == 0, hovertext=names, marker=mark(number), row=place // 2 + 1,
                            col=place % 2 + 1)
    said = []
    for place, (x, y) in enumerate(COMPARED):
        at = {"row": place // 2 + 1, "col": place % 2 + 1}
        most = _most(valid, x, y)
        fig.add_scatter(x=[0, most], y=[0, most], mode="lines", showlegend=False, hoverinfo="skip",
                        line={"color": GREY, "dash": "dot", "width": 1.5}, **at)
        fig.update_xaxes(title="True absorption (share of rows)", **at)
        fig.update_yaxes(title="SAEBench's (share)", **at)
        said.append(f"{TITLES[place].lower()} {spearman(truths.rank_correlation(valid[x], valid[y]))}")
    fig.update_xaxes(title="L0 (active latents per row)", row=2, col=2)
    fig.update_yaxes(title=METRICS["mcc"].titled.replace("correlation ", "correlation<br>"), row=2, col=2)
    if "true_l0" in valid and len(valid):
        level = float(valid.true_l0.iloc[0])
        fig.add_vline(x=level, line={"color": GREY, "dash": "dash"}, annotation_text="true L0", row=2, col=2)
    text = (f"Spearman's rank correlation, its 95 % interval by a bootstrap over SAEs: {'; '.join(said)}. "
            "Dotted: equal.")
    left_out = len(table) - len(valid)
    text += f" Left out as not valid: {left_out} of {len(table)}." * bool(left_out)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"})
    return dress(fig, "Absorption and recovery where the truth is known", text + f"<br>{caption}" * bool(caption),
                 width=1040, height=900, top=130)


def of_study(table: pd.DataFrame, caption: str = "") -> dict[str, go.Figure]:
    """``truth`` of a comparison's table by name; none where no run was trained on a planted world."""
    known = table[table.mcc.notna()] if "mcc" in table else table.iloc[:0]
    return {"planted_truth": truth(known, caption)} if len(known) else {}


def of_run(results: dict[str, Any]) -> pd.DataFrame:
    """03's table of a run on a planted world; empty for any other."""
    return explained(results["truth"]["metrics"]) if "truth" in results else pd.DataFrame()


def spearman(rank: truths.Rank) -> str:
    """A rank correlation in words."""
    if math.isnan(rank.rho):
        return f"none ({rank.n} SAEs, or no variation)"
    return f"rho {rank.rho:.2f} [{rank.low:.2f}, {rank.high:.2f}], {rank.n} SAEs"


def _most(table: pd.DataFrame, *columns: str) -> float:
    """The largest figure of the columns, for the line of equality; 1 without figures."""
    values = table[list(columns)].to_numpy(dtype=float)
    return float(np.nanmax(values)) if np.isfinite(values).any() and np.nanmax(values) > 0 else 1.0
