"""Rankings for 05's page: a table in words, and dots with intervals, the place beside each."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation.results import parts_of
from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import span
from sae_lib.views.template import COLOURS, GREY, GREY_INK, dress, value_within, wrapped

MAIN = ("explained_variance", "ce_loss_score", "kl_div_score", "dead_share", "mean_cos2", "mean_full_absorption_score",
        "mean_absorption_fraction_score", "sae_top_1_test_accuracy", "scr_metric_threshold_20",
        "tpp_threshold_20_total_metric", "mcc", "true_absorption", "saebench_full_absorption_with_child")
"""Metrics that have a panel and a place in the page's table, where they were measured; the file has all."""

TINY = 0.01
"""An axis spans at least so much, where all values are 0."""


def named(comparison) -> pd.DataFrame:
    """The main metrics' rows of a comparison's ranking, in order; variants without a model's name that all share."""
    ranking, models = comparison.ranking, comparison.table.model.dropna().unique()
    order = {name: place for place, name in enumerate(MAIN)}
    shown = ranking[ranking.metric.isin(MAIN)].sort_values("metric", key=lambda names: names.map(order), kind="stable")
    if len(models) != 1:
        return shown
    names = {variant: "-".join(part for part in parts_of(variant, models[0])[1:] if part) for variant in shown.variant}
    alike = [", ".join(names.get(name, name) for name in row.split(", ")) for row in shown.alike]
    claims = [f"not distinguishable from {words}" if words else claim for words, claim in zip(alike, shown.claim)]
    return shown.assign(variant=shown.variant.map(names), alike=alike, claim=claims)


def table(shown: pd.DataFrame) -> pd.DataFrame:
    """Place, variant, mean over seeds with its interval, and from which variants it is not distinguishable."""
    means = [value_within(*row) for row in zip(shown["mean"], shown.low, shown.high)]
    return pd.DataFrame({"metric": [METRICS[name].called for name in shown.metric], "place": shown["rank"],
                         "variant": shown.variant, "seeds": shown.seeds, "mean over seeds": means,
                         "claim": shown.claim})


def ranking_by_metric(shown: pd.DataFrame, caption: str = "") -> go.Figure:
    """A panel a metric, the best variant on top: means with t intervals over seeds, the range of places beside them."""
    shown = shown[shown["rank"] != ""]
    panels = list(dict.fromkeys(shown.metric))
    if not panels:
        fig = go.Figure()
        fig.add_annotation(text="no claim possible: no variant has three comparable seeds", showarrow=False,
                           font_size=18, xref="paper", yref="paper", x=0.5, y=0.5)
        fig.update_xaxes(visible=False).update_yaxes(visible=False)
        return dress(fig, "Ranking", caption, height=300)
    most = max(len(shown[shown.metric == name]) for name in panels)
    rows, height = -(-len(panels) // 2), 38 * most + 60
    fig = make_subplots(rows=rows, cols=min(2, len(panels)), horizontal_spacing=0.3, subplot_titles=[
        METRICS[name].panel for name in panels], vertical_spacing=min(0.3, 110 / (rows * (height + 110))))
    for number, name in enumerate(panels):
        _panel(fig, shown[shown.metric == name].reset_index(drop=True), number)
    notes = ("; dots: means over seeds, with t intervals over a variant's own seeds; at the right: the places that its "
             "paired differences from the others leave open (Holm over all pairs of the metric). Variants of different "
             "baselines are ranked apart; grey: shown to differ from no other")
    fig.update_layout(margin_r=100)
    return dress(fig, "Ranking, and what seeds do not tell apart", caption + notes, width=1140,
                 height=rows * (height + 110) + 190, top=100, side=190)


def _panel(fig: go.Figure, own: pd.DataFrame, number: int) -> None:
    """One metric's variants; a row each, the first on top."""
    at = {"row": number // 2 + 1, "col": number % 2 + 1}
    metric, places = METRICS[own.metric[0]], list(range(len(own)))
    many = own.groupby("baseline").variant.transform("size")
    undecided = [row["rank"] == f"1-{count}" for (_, row), count in zip(own.iterrows(), many)]
    colours = [GREY if open_ else COLOURS[0] for open_ in undecided]
    for place, row in own.iterrows():
        fig.add_scatter(x=[row.low, row.high], y=[place, place], mode="lines", showlegend=False, hoverinfo="skip",
                        line={"color": colours[place], "width": 2}, **at)
    fig.add_scatter(x=own["mean"], y=places, mode="markers", showlegend=False, hovertext=own.claim, **at,
                    marker={"size": 10, "color": colours, "symbol": "circle"})
    low, high = span(pd.concat([own.low, own.high, own["mean"]]))
    if high - low < 1e-6:  # all are 0
        low, high = low - TINY, high + TINY
    axis = fig.layout[f"xaxis{number + 1 if number else ''}"]
    for place, row in own.iterrows():
        fig.add_annotation(x=1.02, xref=f"x{number + 1 if number else ''} domain", y=place, text=f"place {row['rank']}",
                           yref=f"y{number + 1 if number else ''}", showarrow=False, xanchor="left",
                           font={"size": 13, "color": GREY_INK if undecided[place] else "#111111"})
    axis.update(title=metric.axis, range=[low, high], nticks=6)
    names = [wrapped(name.replace("_", "_ "), 26).replace("_ ", "_") for name in own.variant]
    fig.update_yaxes(tickvals=places, ticktext=names, range=[len(own) - 0.4, -0.6], showgrid=False, automargin=True,
                     **at)
