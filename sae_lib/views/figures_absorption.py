"""Figures of several runs' letters: absorption and splits by run, letters by runs, core against L0. Pure functions."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS
from sae_lib.views import beside_nulls
from sae_lib.views.figures_compare import labels, main, mark_apart, name_rows, span
from sae_lib.views.template import GREY, dress, mark, wrapped

CORE = ("explained_variance", "ce_loss_score", "kl_div_with_sae")


def by_run(table: pd.DataFrame, metrics: tuple[str, ...], title: str, caption: str = "",
           nulls: pd.DataFrame | None = None) -> go.Figure:
    """One panel per metric, a row per run; null baselines are hollow, other runs set apart say why on their row.

    Dotted lines are those of ``nulls`` (``null_table.collect``).
    """
    names, kept = labels(table), main(table)
    null = (table.status == "null") & (table.role == "null") & table[list(metrics)].notna().all(axis=1)
    names |= {run: f"{names[run]}<br>(null baseline)" for run in table.run[null]}
    titles = [METRICS[n].panel for n in metrics]
    fig = make_subplots(rows=1, cols=len(metrics), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.06)
    for number, metric in enumerate(metrics):
        fig.add_scatter(x=table[metric][kept], y=[names[run] for run in table.run[kept]], mode="markers", row=1,
                        col=number + 1, showlegend=False,
                        marker=mark(number, 13))
        fig.add_scatter(x=table[metric][null], y=[names[run] for run in table.run[null]], mode="markers", row=1,
                        col=number + 1, showlegend=False,
                        marker={"size": 12, "color": GREY, "symbol": "diamond-open", "line": {"width": 2}})
        top = table[metric][kept | null].max()
        if nulls is not None and nulls[metric].notna().any():
            top = max(top, nulls[metric].max())
        fig.update_xaxes(title=METRICS[metric].axis, range=[0, 1.15 * top if top > 0 else 1], row=1, col=number + 1)
        beside_nulls.draw(fig, nulls, metric, (0, float("inf")), "vline", row=1, col=number + 1)
    mark_apart(fig, table[~kept & ~null], names, longest=150 // (1 + len(metrics)))
    name_rows(fig, [names[run] for run in table.run])
    caption += "; hollow: null baseline, what the shape alone scores" if null.any() else ""
    return dress(fig, title, caption, width=1080, height=250 + 44 * len(table), top=110)


MAPS = {"full_absorption": "mean_full_absorption_score", "absorption_fraction": "mean_absorption_fraction_score",
        "splits": "mean_num_split_features"}


def letters_by_run(letters: pd.DataFrame, table: pd.DataFrame, caption: str = "",
                   column: str = "full_absorption") -> go.Figure:
    """A figure of each letter (columns) in each run (rows), mean over seeds; a gap: the letter was dropped."""
    names, metric = labels(table), METRICS[MAPS[column]]
    shown = pd.to_numeric(letters[column], errors="coerce").astype(float)  # a gap is NaN: pandas' NA cannot be sent
    means = letters.assign(shown=shown).pivot_table(index="run", columns="letter", values="shown", aggfunc="mean")
    # Bottom row first: with a categoryarray that turns them, plotly.js writes the numbers on other rows' colours.
    means = means.reindex([run for run in table.run if run in means.index][::-1])
    text = "%{z:.1f}" if column == "splits" else "%{z:.2f}"
    fig = go.Figure(go.Heatmap(z=means.to_numpy(), x=list(means.columns), y=[names[run] for run in means.index],
                               colorscale="Cividis", zmin=0, texttemplate=text, textfont={"size": 10},
                               colorbar={"title": {"text": wrapped(metric.axis, 16)}}, hoverongaps=False))
    fig.update_xaxes(title="First letter", type="category", showgrid=False)
    fig.update_yaxes(automargin=True, type="category")
    return dress(fig, f"{metric.label} by letter and run ({metric.reading})", caption, width=1180,
                 height=260 + 40 * len(means), top=80)


def core_against_l0(table: pd.DataFrame, caption: str = "", nulls: pd.DataFrame | None = None) -> go.Figure:
    """Core's figures against L0: the only axis on which SAEs of different sparsity compare.

    Dotted lines are those of ``nulls`` (``null_table.collect``) that are on the axis.
    """
    kept = table[main(table) | ((table.status == "valid") & (table.role != "null"))]
    variants = list(dict.fromkeys(table.variant))
    fig = make_subplots(rows=1, cols=len(CORE), horizontal_spacing=0.09,
                        subplot_titles=[METRICS[n].stacked for n in CORE])
    names = labels(table)
    for number, variant in enumerate(variants):
        own = kept[kept.variant == variant].sort_values("l0")
        label = names[table.run[table.variant == variant].iloc[0]].rpartition("-s")[0] or variant
        for col, metric in enumerate(CORE, 1):
            fig.add_scatter(x=own.l0, y=own[metric], mode="markers", name=label, legendgroup=label,
                            showlegend=col == 1 and len(own) > 0, hovertext=own.run, row=1, col=col,
                            marker=mark(number) | {"opacity": 0.85})
    for col, metric in enumerate(CORE, 1):
        fig.update_yaxes(title=METRICS[metric].axis, range=span(kept[metric]), row=1, col=col)
        beside_nulls.draw(fig, nulls, metric, span(kept[metric]), "hline", row=1, col=col)
    fig.update_xaxes(title=METRICS["l0"].titled)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.22, "yanchor": "bottom"})
    return dress(fig, "Core against L0", caption, width=1180, height=540, top=170)


def all_figures(comparison, caption: str) -> dict[str, go.Figure]:
    """Every figure of this file by name, as far as there is something to draw."""
    table, nulls = comparison.table, comparison.nulls if len(comparison.nulls) else None
    found = {"core_against_l0": core_against_l0(table, caption, nulls)}
    if table.mean_full_absorption_score.notna().any():
        found |= {"absorption_by_run": by_run(table, ("mean_full_absorption_score", "mean_absorption_fraction_score"),
                                              "First-letter absorption by run", caption, nulls),
                  "splits_by_run": by_run(table, ("mean_num_split_features",), "Feature splits by run", caption, nulls)}
    if len(comparison.letters):
        found["letters_by_run"] = letters_by_run(comparison.letters, table, caption)
    return found
