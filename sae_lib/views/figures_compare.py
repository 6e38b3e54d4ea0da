"""Figures of several runs: pure functions from the results table (and histories) to plotly figures.

Runs that are not valid stand greyed at the side with their reason; they enter no series.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation.results import EVALUATION
from sae_lib.metrics import METRICS
from sae_lib.views.template import GREY, GREY_INK, dress, mark, smaller, style, value_within

TABLE = ("explained_variance", "ce_loss_score", "kl_div_score", "l0", "dead_share", "mean_cos2",
         "mean_full_absorption_score", "mcc", "true_absorption")
PANELS = ("explained_variance", "mse", "l0", "kl_div_with_sae")
WITHIN = "small: 95 % within this SAE, with other text; between variants it says nothing"


def main(table: pd.DataFrame) -> pd.Series:
    """Which runs make the main series: valid, no null baseline, and comparable with their baseline."""
    return (table.status == "valid") & (table.role != "null") & (table.get("apart", "") == "")


def why(row) -> str:
    """In words, why a run (a row of the table) is set apart."""
    if row.role == "null":
        return "null baseline" + (f": failed: {row.reasons}" if row.status == "failed" else "")
    if row.status != "valid":
        return f"{row.status}: {row.reasons}" if row.reasons else row.status
    return f"not comparable: {row.apart}"


def labels(table: pd.DataFrame) -> dict[str, str]:
    """Names for legends and axes: what all runs share (the study's folder, one model) is left out."""
    names = [name.rpartition("/")[2] for name in table.run]
    shared = names[0].split("-")[0] + "-" if names else ""
    common = len(names) > 1 and all(name.startswith(shared) for name in names)
    return {run: name.removeprefix(shared) if common else name for run, name in zip(table.run, names)}


def note(table: pd.DataFrame, study: str) -> str:
    """The caption: study, runs, versions, and what one seed allows."""
    versions = ", ".join(sorted({str(v) for v in table.get("sae_bench", pd.Series(dtype=str)).dropna()}))
    seeds = table[main(table)].groupby("variant").seed.nunique() if "seed" in table else pd.Series([0])
    claim = "" if len(seeds) and seeds.min() >= 3 else "; fewer than three seeds: no claim possible"
    bench = f"; sae-bench {versions}" if versions else ""
    return f"Study {study}, {len(table)} runs, {(table.status == 'valid').sum()} valid{bench}{claim}"


def final_losses(table: pd.DataFrame, caption: str = "") -> go.Figure:
    """Every loss term at the last logged step, by run (log axis: terms differ by orders of magnitude)."""
    names, valid = labels(table), table[main(table)]
    fig = go.Figure()
    for number, term in enumerate(name for name in table if name.startswith("loss/")):
        fig.add_scatter(y=[names[run] for run in valid.run], x=valid[term], mode="markers",
                        name=term.removeprefix("loss/"),
                        marker=mark(number, 13))
    mark_apart(fig, table[~main(table)], names)
    fig.update_xaxes(title="Loss per token at the last logged step (log)", type="log", dtick=1)
    name_rows(fig, [names[run] for run in table.run])
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return dress(fig, "Final losses by run", caption, width=1000, height=230 + 34 * len(table), top=110)


def training_curves_by_run(histories: dict[str, pd.DataFrame], table: pd.DataFrame, caption: str = "") -> go.Figure:
    """Reconstruction loss of every run over training on a log axis, and explained variance beside it.

    One colour and dash per variant, seeds alike; runs that are not valid in grey.
    """
    variance = METRICS["explained_variance"]
    fig = make_subplots(rows=1, cols=2, subplot_titles=("Reconstruction loss", f"{variance.label} (batch)"),
                        horizontal_spacing=0.1)
    names, variants, seen = labels(table), list(dict.fromkeys(table.variant)), set()
    kept = main(table)
    spans = _spans([histories[run] for run in table.run[kept] if run in histories])
    for row in table.itertuples():
        history = histories.get(row.run)
        if history is None or history.empty:
            continue
        valid = kept[row.Index]
        line = style(variants.index(row.variant)) if valid else {"color": GREY, "width": 1.5, "dash": "dot"}
        label = names[row.run].rpartition("-s")[0] or names[row.run]
        label = label if valid else f"{names[row.run]} ({why(row).partition(':')[0]})"
        for column, col in (("loss/reconstruction", 1), ("explained_variance", 2)):
            fig.add_scatter(x=history.samples, mode="lines", line=line, name=label,
                            y=history[column] if valid else history[column].clip(*spans[column]),
                            legendgroup=label, showlegend=col == 1 and label not in seen, row=1, col=col,
                            hovertext=f"{row.run}: {why(row)}".replace("<", "&lt;"))
        seen.add(label)
    fig.update_xaxes(title="Training samples")
    fig.update_yaxes(title="Squared error per token (log)", type="log", row=1, col=1)
    fig.update_yaxes(title=variance.axis.capitalize(), row=1, col=2)
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"})
    return dress(fig, "Training curves by run", caption, width=1080, height=560, top=140)


def _spans(histories: list[pd.DataFrame]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of the main series, by column: runs set apart run along these, and flatten nothing."""
    spans = {}
    for column in ("loss/reconstruction", "explained_variance"):
        values = pd.concat([history[column] for history in histories]) if histories else pd.Series(dtype=float)
        values = values[np.isfinite(values)]
        spans[column] = (values.min(), values.max()) if len(values) else (-np.inf, np.inf)
    return spans


def compression_panels(table: pd.DataFrame, caption: str = "") -> go.Figure:
    """Four panels: explained variance, squared error, L0 and KL divergence; one mark per run, a row per variant.

    An axis never spans less than a twentieth of its values: differences in the fifth digit should look like it.
    """
    titles = [METRICS[n].panel for n in PANELS]
    names, variants = labels(table), list(dict.fromkeys(table.variant))
    rows = 2 * 44 * len(variants)
    fig = make_subplots(rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.06, shared_yaxes=True,
                        vertical_spacing=110 / (rows + 110))
    places = {variant: _variant_label(table[table.variant == variant], names) for variant in variants}
    for number, name in enumerate(PANELS):
        place = {"row": number // 2 + 1, "col": number % 2 + 1}
        valid, bad = table[main(table)], table[~main(table)]
        low, high = span(valid[name])
        for order, variant in enumerate(variants):
            own = valid[valid.variant == variant]
            fig.add_scatter(y=[places[variant]] * len(own), x=own[name], mode="markers", hovertext=own.run,
                            showlegend=False, **place, marker=mark(order, 13) | {"opacity": 0.8})
        # What is not a result stays visible at the edge of the axis, without stretching it.
        fig.add_scatter(y=[places[variant] for variant in bad.variant], x=bad[name].clip(low, high), mode="markers",
                        hovertext=[f"{r.run}: {why(r)}".replace("<", "&lt;") for r in bad.itertuples()], **place,
                        showlegend=False, marker={"size": 11, "symbol": "x-thin", "line": {"width": 2, "color": GREY}})
        fig.update_xaxes(title=METRICS[name].axis, range=[low, high], nticks=6, **place)
    name_rows(fig, [places[variant] for variant in variants])
    extra = "; grey crosses: set apart"
    caption += extra if (~main(table)).any() else ""
    return dress(fig, "Quality of compression by variant", caption, width=1080, height=rows + 110 + 226,
                 top=110)


def _variant_label(own: pd.DataFrame, names: dict[str, str]) -> str:
    name = names[own.run.iloc[0]]
    bad = (~main(own)).sum()
    return (name.rpartition("-s")[0] or name) + (f"<br>{bad} of {len(own)} set apart" if bad else "")


def span(values: pd.Series) -> tuple[float, float]:
    """Ends of an axis: the values with room around, and at least a twentieth of their size."""
    values = values.dropna()
    if values.empty:
        return 0.0, 1.0
    middle, half = (values.max() + values.min()) / 2, 0.6 * (values.max() - values.min())
    half = max(half, 0.025 * abs(middle), 1e-9)
    return middle - half, middle + half


def name_rows(fig: go.Figure, order: list[str]) -> None:
    """Names on the left, the first at the top."""
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1], automargin=True, range=[-0.6, len(order) - 0.4])


def comparison_table(table: pd.DataFrame, caption: str = "", nulls: pd.DataFrame | None = None) -> go.Figure:
    """The table as a picture: verdict, flags, figures; what does not stand beside the baseline comes last, with why.

    Figures of runs that are not valid are dashes; a null baseline is no run that the gate could refuse. Rows of
    ``nulls`` (``null_table.collect``) end it, in grey.
    """
    table = pd.concat([table[main(table)], table[~main(table)]])
    measured = (table.status == "valid") | (table.status == "null")
    columns = [name for name in TABLE if name in table and (table[name].notna() | (instead(table, name) != "")).any()]
    names, valid = labels(table), main(table)
    head = ["run", "verdict", *(METRICS[name].heading for name in columns)]
    runs = [_wrapped(names[run].replace("_", "_ "), 22).replace("_ ", "_") for run in table.run]
    said = [_wrapped("valid" if ok else why(row), 31) + (f"<br><i>{_wrapped(row.flags, 31)}</i>" if row.flags else "")
            for row, ok in zip(table.itertuples(), valid)]
    cells = [runs, said]
    figures = [[smaller(cell or word or "–") for cell, word in zip(_cells(table[name].where(measured), table),
                                                                    instead(table, name))] for name in columns]
    cells += figures
    inks = ["#111111" if ok else GREY_INK for ok in valid]
    if nulls is not None and len(nulls):
        runs += [_wrapped(run, 22) for run in nulls.run]
        said += [_wrapped(without or "null", 31) for without in nulls.without]
        for name, column in zip(columns, figures):
            column += [smaller(cell or "–") for cell in _cells(nulls[name], nulls)]
        inks += [GREY_INK] * len(nulls)
    fig = go.Figure(go.Table(
        columnwidth=[2.2, 3, *[1.5] * len(columns)],
        header={"values": [f"<b>{text}</b>" for text in head], "align": "left", "fill_color": "#E9EEF2",
                "font_size": 13},
        cells={"values": cells, "align": "left", "fill_color": "white", "height": 28, "line_color": "#CCCCCC",
               "font": {"size": 13, "color": [inks] * len(head)}}))
    heights = [30 + 19 * max(text.count("<br>") for text in row) for row in zip(*cells)]
    if any("<br>" in cell for column in figures for cell in column):
        caption += f"; {WITHIN}"
    return dress(fig, "Comparison (↑ higher is better, ↓ lower is better)", caption, width=460 + 140 * len(columns),
                 height=70 + 110 + sum(heights) + 100, top=70, side=30)


def instead(table: pd.DataFrame, metric: str) -> pd.Series:
    """For each run the word that stands for a metric its evaluation did not give (``failed``); empty for others."""
    why = table.get(f"no_figure/{EVALUATION.get(metric)}", pd.Series("", table.index))
    return why.fillna("").str.partition(":")[0]


def readable(table: pd.DataFrame, nulls: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table for the page: verdicts, then every metric with its direction; no figures of runs not valid.

    Below a figure, its interval "within this SAE", where its evaluation drew one; a word where the evaluation failed.
    Rows of ``nulls`` (``null_table.collect``) come last; their verdict is ``null``.
    """
    shown = table[["run", "status", "reasons", "flags"]].rename(columns={"status": "verdict"})
    of_nulls = pd.DataFrame() if nulls is None or nulls.empty else pd.DataFrame(
        {"run": nulls.run, "verdict": "null", "reasons": nulls.without, "flags": ""})
    for name, metric in METRICS.items():
        words = instead(table, name)
        if name in table and (table[name].notna() | (words != "")).any():
            cells = _cells(table[name].where(table.status.isin(("valid", "null"))), table)
            shown[metric.called] = [word or cell for word, cell in zip(words, cells)]
            if len(of_nulls) and name in nulls:
                of_nulls[metric.called] = [cell or "" for cell in _cells(nulls[name], nulls)]
    for name in (column for column in table if column.startswith("no_figure/")):
        shown[f"no {name.removeprefix('no_figure/')}"] = table[name].fillna("")
    shown["library"] = ["another" if row.get("stale") is True else "" for _, row in table.iterrows()]
    return pd.concat([shown, of_nulls.assign(library="")], ignore_index=True) if len(of_nulls) else shown


def grey(shown: pd.DataFrame, nulls: pd.DataFrame) -> pd.DataFrame:
    """Of the shape of ``readable``: which cells are no results."""
    last = len(shown) - len(nulls)
    return shown.apply(lambda column: (column.index >= last) | (shown.verdict != "valid").to_numpy())


def claims(differences: pd.DataFrame) -> pd.DataFrame:
    """The differences for the page: metrics by their labels and directions."""
    return differences.assign(metric=differences.metric.map(
        lambda name: f"{METRICS[name].label} ({METRICS[name].reading})")).rename(
        columns={"all_metrics": "once all metrics are counted"})


def all_figures(comparison) -> dict[str, go.Figure]:
    """The figures of this file by name."""
    table, text = comparison.table, note(comparison.table, comparison.study)
    return {"comparison_table": comparison_table(table, text, comparison.nulls),
            "training_curves_by_run": training_curves_by_run(comparison.histories, table, text),
            "final_losses": final_losses(table, text), "compression_panels": compression_panels(table, text)}


def _cells(values: pd.Series, table: pd.DataFrame) -> list[str | None]:
    """Figures of a metric's column with their intervals within each SAE."""
    ends = [table.get(f"within/{values.name}/{side}", pd.Series(np.nan, table.index)) for side in ("low", "high")]
    return [value_within(*row) for row in zip(values, *ends)]


def _wrapped(text: str, width: int = 36) -> str:
    lines, line = [], ""
    for word in text.replace("<", "&lt;").split():
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join([*lines, line])


def mark_apart(fig: go.Figure, bad: pd.DataFrame, names: dict[str, str], longest: int = 90) -> None:
    """Say on the row of each run that is not valid what it is, and why, in grey, in ``longest`` characters at most."""
    for row in bad.itertuples():
        reason = why(row)
        reason = reason if len(reason) <= longest else reason[:longest - 3] + "..."
        fig.add_scatter(y=[names[row.run]], x=[None], showlegend=False)
        fig.add_annotation(y=names[row.run], x=0.01, xref="paper", text=reason.replace("<", "&lt;"),
                           showarrow=False, xanchor="left", font={"color": GREY_INK, "size": 12})
