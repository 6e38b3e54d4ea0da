"""Figures of 04: pure functions from the letters' and words' tables to plotly figures and tables for the page.

Full absorption and the absorption fraction have a panel each and never share an axis. Letters that SAEBench drops,
and everything of a run that is not valid, stand in grey with the reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS
from sae_lib.views import beside_nulls, figures_compression
from sae_lib.views.figures import caption, explained
from sae_lib.views.template import COLOURS, GREY, GREY_INK, SYMBOLS, dress, wrapped

PANELS = (("full_absorption", "mean_full_absorption_score"),
          ("absorption_fraction", "mean_absorption_fraction_score"))
PANEL_NAMES = tuple(METRICS[metric].label.lower() for _, metric in PANELS)


def all_figures(found) -> dict[str, go.Figure]:
    """The figures of 04's page by file name, for what ``letters.evaluate`` gave; none where nothing was evaluated."""
    if not found.report:
        return {}
    config = found.report["config"]
    cap = "every word" if config["words_per_letter"] is None else f"at most {config['words_per_letter']} words a letter"
    text = caption(found.run.name, {"provenance": found.report["provenance"] | {"seed": found.run.params["seed"]}})
    text += f"; evaluation seeds {', '.join(map(str, config['seeds']))}, {cap}, model in {config['dtype']}"
    drawn = {"letter_absorption": letter_absorption(found.letters, found.report, found.run.name, text, found.nulls),
             "split_latents": split_latents(found.letters, found.report, found.run.name, text)}
    if found.by_ratio:
        kept = figures_compression.Kept(found.run.name, {}, found.by_ratio, {})
        drawn["absorption_by_latents_kept"] = figures_compression.curves(
            [kept], text, figures_compression.ABSORPTION, "Absorption against the share of latents kept")
    return drawn


def letter_absorption(letters: pd.DataFrame, report: dict[str, Any], title: str = "", caption: str = "",
                      nulls: dict[str, Any] | None = None) -> go.Figure:
    """Two panels over the letters: the rate of full absorption, and the absorption fraction; a mark per seed.

    Bars are means over seeds; the dotted line is the mean over letters, its interval a bootstrap over the words of
    this SAE's letters; thin and grey, the mean of the random SAE of ``nulls``. A dropped letter says why.
    """
    names = [METRICS[metric].panel.replace(")</span>", f"{_mean_text(report, metric, nulls)})</span>")
             for _, metric in PANELS]
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=names)
    seeds = list(dict.fromkeys(letters.seed))
    for row, (column, metric) in enumerate(PANELS, 1):
        values = letters.assign(y=pd.to_numeric(letters[column], errors="coerce").astype(float))
        mean = values.groupby("letter").y.mean()
        fig.add_bar(x=mean.index, y=mean, marker_color=COLOURS[row - 1], showlegend=False, row=row, col=1,
                    name=METRICS[metric].label, text=["0" if v == 0 else "" for v in mean], textposition="outside",
                    cliponaxis=False, hovertemplate="%{x}: %{y:.3f}<extra></extra>")
        for number, seed in enumerate(seeds if len(seeds) > 1 else ()):
            own = values[values.seed == seed]
            fig.add_scatter(x=own.letter, y=own.y, mode="markers", name=f"seed {seed}", legendgroup=str(seed),
                            showlegend=row == 1, row=row, col=1,
                            marker={"size": 7, "color": "#111111", "symbol": SYMBOLS[number % len(SYMBOLS)]})
        if metric in report["metrics"]:
            fig.add_hline(y=report["metrics"][metric], line={"color": "#111111", "dash": "dot", "width": 1.5}, row=row,
                          col=1)
        top = float(values.y.max()) if values.y.notna().any() else 1.0
        if (random := _of_random(nulls, metric)) is not None and metric in report["metrics"]:
            fig.add_hline(y=random, line={"color": GREY_INK, "width": 1}, row=row, col=1)
            top = max(top, random)
        fig.update_yaxes(title=METRICS[metric].axis, row=row, col=1,
                         range=[0, max(1.12 * top, 0.05)])
    fig.update_xaxes(type="category", categoryorder="array", categoryarray=list("abcdefghijklmnopqrstuvwxyz"),
                     range=[-0.6, 25.6], showgrid=False)
    fig.update_xaxes(title="First letter", row=2)
    if report["status"] == "invalid" or not report["metrics"]:
        _no_result(fig, report)
    else:
        _grey_out(fig, _dropped(letters))
    fig.update_layout(bargap=0.35, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.06,
                                           "yanchor": "bottom"})
    return dress(fig, f"Letter absorption: {title}", caption, width=1080, height=720, top=100)


def _mean_text(report: dict[str, Any], metric: str, nulls: dict[str, Any] | None) -> str:
    if metric not in report["metrics"] or not report["within_this_sae"].get(metric):
        return ""
    low, high = report["within_this_sae"][metric]
    random = _of_random(nulls, metric)
    return (f"; mean over letters {report['metrics'][metric]:.3f}, with other words "
            f"{low:.3f} to {high:.3f} within this SAE{'' if random is None else f'; random SAE {random:.3f}'}")


def _of_random(nulls: dict[str, Any] | None, metric: str) -> float | None:
    """The random SAE's mean over letters, where there is one."""
    return ((nulls or {}).get("random", {}).get("absorption", {}).get("metrics") or {}).get(metric)


def _dropped(letters: pd.DataFrame) -> dict[str, str]:
    """Reasons of letters that no seed kept."""
    reasons = {}
    for letter, group in letters.groupby("letter"):
        if not group.kept.any():
            reasons[letter] = "; ".join(dict.fromkeys(group.reason))
    return reasons


def _grey_out(fig: go.Figure, dropped: dict[str, str]) -> None:
    """A grey band over each dropped letter in both panels, its reason written up the band."""
    for letter, reason in dropped.items():
        x = ord(letter) - ord("a")
        for row in (1, 2):
            fig.add_vrect(x0=x - 0.48, x1=x + 0.48, fillcolor=GREY, opacity=0.3, line_width=0, layer="below", row=row,
                          col=1)
            fig.add_annotation(x=x, y=0.5, yref="y domain" if row == 1 else "y2 domain",
                               xref="x" if row == 1 else "x2", text=reason.replace("<", "&lt;"), textangle=-90,
                               showarrow=False, font={"size": 11, "color": "#444444"})


def _no_result(fig: go.Figure, report: dict[str, Any]) -> None:
    """Say across the figure that there is no figure, and why."""
    why = report["not_a_result"] or report["note"] or "no figure"
    text = f"{'invalid: ' if report['status'] == 'invalid' else ''}{why}"
    fig.add_annotation(text=wrapped(text), xref="paper", yref="paper", x=0.5, y=0.5, showarrow=False,
                       font={"size": 16, "color": "#555555"}, bgcolor="#EEEEEE", borderpad=10)


def split_latents(letters: pd.DataFrame, report: dict[str, Any], title: str = "", caption: str = "") -> go.Figure:
    """F1 of a letter's sparse probe as its k latents grow, beside the model's own probe; the first seed's.

    A ring marks the number of split latents: SAEBench counts one more while F1 rises by more than 0.03.
    """
    shown = letters[(letters.seed == letters.seed.iloc[0]) & letters.f1_by_k.notna()] if len(letters) else letters
    fig = make_subplots(rows=1, cols=2, column_widths=[0.86, 0.14], shared_yaxes=True, horizontal_spacing=0.02,
                        subplot_titles=("k latents", "model's probe"))
    if shown.empty:
        _no_result(fig, report)
        return dress(fig, f"Split latents: {title}", caption, height=480)
    scores, names = np.stack(shown.f1_by_k.map(list).to_list()), list(shown.letter)
    kept = shown.kept.to_numpy(dtype=bool)
    invalid = report["status"] == "invalid"
    scale = [[0, "#F2F2F2"], [1, "#666666"]] if invalid else "Cividis"
    most = scores.shape[1]
    shared = {"zmin": 0, "zmax": 1, "colorscale": scale, "xgap": 1, "ygap": 1}
    fig.add_heatmap(z=scores, x=list(range(1, most + 1)), y=names, **shared, row=1, col=1,
                    colorbar={"title": "F1", "thickness": 14},
                    hovertemplate="%{y}, k = %{x}: F1 %{z:.3f}<extra></extra>")
    fig.add_heatmap(z=shown.probe_f1.to_numpy()[:, None], x=["probe"], y=names, **shared, showscale=False, row=1, col=2,
                    text=[[f"{v:.2f}"] for v in shown.probe_f1], texttemplate="%{text}", textfont={"size": 11})
    if not invalid:
        counts = shown.split_latents.map(len)
        fig.add_scatter(x=counts[kept], y=shown.letter[kept], mode="markers", name="number of split latents", row=1,
                        col=1, showlegend=True,
                        marker={"symbol": "circle-open", "size": 11, "color": "#D55E00", "line": {"width": 3}})
    # Grey names for letters that are dropped.
    ticks = [name if own else f"<span style='color:{GREY}'>{name} (dropped)</span>" for name, own in zip(names, kept)]
    fig.update_yaxes(type="category", range=[len(names) - 0.5, -0.5], showgrid=False, tickvals=names, ticktext=ticks)
    fig.update_xaxes(title="k", dtick=1, showgrid=False, row=1, col=1)
    fig.update_xaxes(showticklabels=False, showgrid=False, row=1, col=2)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom"})
    name = f"Split latents: {title}" + (" (invalid: no result)" if invalid else "")
    return dress(fig, name, caption, width=1080, height=220 + 24 * len(names), top=110, side=110)


def summary(found) -> pd.DataFrame:
    """Means over letters with direction and definition, how many letters they rest on, and those of nulls beside.

    Empty without a result.
    """
    if not found.report or not found.report["metrics"]:
        return pd.DataFrame()
    kept = sorted({one["letters"] for one in found.report["seeds"].values() if one["metrics"]})
    within = found.report.get("within_this_sae", {})
    within = {name: within[name] for name in found.report["metrics"] if within.get(name)}
    table = explained(found.report["metrics"], within,
                      letters=" to ".join(map(str, kept[::len(kept) - 1 or 1])))
    return beside_nulls.with_columns(table, found.nulls, "absorption", list(found.report["metrics"]))


def by_letter(letters: pd.DataFrame) -> pd.DataFrame:
    """The letters' table for the page: what was kept with its figures, what was dropped with the reason."""
    if letters.empty:
        return letters
    why = letters.not_a_result.where(letters.kept, letters.reason)
    first = letters.f1_by_k.map(lambda scores: scores[0] if isinstance(scores, (list, np.ndarray)) else np.nan)
    best = letters.f1_by_k.map(lambda scores: max(scores) if isinstance(scores, (list, np.ndarray)) else np.nan)
    return pd.DataFrame({
        "seed": letters.seed, "letter": letters.letter, PANEL_NAMES[0]: letters.full_absorption.astype(float),
        "fully absorbed words": letters.fully_absorbed, PANEL_NAMES[1]: letters.absorption_fraction,
        METRICS["mean_num_split_features"].label.lower(): letters.splits, "true positives": letters.true_positives,
        "test words": letters.test_words, "probe F1": letters.probe_f1, "F1 of the first latent": first,
        "best F1": best, "left out because": why})


def absorbed(words: pd.DataFrame, most: int = 30) -> pd.DataFrame:
    """Fully absorbed words by the latent that absorbed them, the latents that took most words first."""
    full = words[words.full_absorption.fillna(False).astype(bool)] if len(words) else words
    if full.empty:
        return pd.DataFrame()
    groups = full.groupby(["letter", "absorbing_latent"])
    table = groups.agg(words=("word", lambda found: ", ".join(dict.fromkeys(w.strip() for w in found))),
                       count=("word", "size"), cosine=("top_cosine", "mean")).reset_index()
    table = table.rename(columns={"absorbing_latent": "absorbing latent", "cosine": "cosine with the letter's probe"})
    return table.sort_values(["count", "letter"], ascending=[False, True]).head(most)[
        ["letter", "absorbing latent", "count", "words", "cosine with the letter's probe"]]
