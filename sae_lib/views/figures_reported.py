"""What earlier studies reported, as separate tables and figures: never beside what is measured here.

Pure functions from ``evaluation.reported``. What is no result is grey; what does not compare with its study's baseline
has a separate table.
"""

from __future__ import annotations

import html
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.evaluation.reported import Judged, Study
from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import name_rows, span
from sae_lib.views.template import COLOURS, GREY, dress

COLUMNS = ("mean_absorption_score", "mean_num_split_features", "sae_top_1_test_accuracy", "sae_test_accuracy",
           "scr_metric_threshold_10", "unlearning_score", "kl_div_score", "core/explained_variance",
           "core/mse", "core/l0")
PANELS = ("mean_absorption_score", "sae_top_1_test_accuracy", "unlearning_score", "scr_metric_threshold_10",
          "core/explained_variance", "mean_num_split_features", "sae_test_accuracy", "kl_div_score")
MOST_PANELS = 4
PLACES = {"layer": "layer {}", "d_sae": "F {}", "k": "k {}", "steps": "{} steps", "samples": "{:,} samples"}
HEADING = """## As reported

What earlier studies reported of these variants on {model}, as they published it, and what is wrong with it by rules
over the records. None of it was measured here, and none enters a table or figure above. Grey: no result, or not to be
compared; in brackets: by the study's description, not in the record. {about}"""


class Shown(NamedTuple):
    """A table for the page."""

    sentence: str
    """What stands above it."""
    frame: pd.DataFrame
    grey: pd.DataFrame
    """Of the frame's shape: which cells are no results."""


def tables(studies: list[Study]) -> list[Shown]:
    """The section's tables, one for what may stand in one column; none where no study reported anything."""
    if not studies:
        return []
    models = dict.fromkeys(one.record.model for study in studies for one in study.records)
    heading = HEADING.format(model=", ".join(models), about=_plain(studies[0].about))
    shown = [Shown(heading, pd.DataFrame(), pd.DataFrame())]
    for study in studies:
        for number, part in enumerate(study.parts):
            text = f"**{study.name}**" if number == 0 else f"**{study.name}, apart**"
            wanted = ", ".join(f"{METRICS[name].label} {target.sign} {target.value:g}"
                               for name, target in study.targets.items())
            if number == 0 and wanted:
                text += f"; its aim: {wanted}"
            shown.append(Shown(text + (f": {_plain(part.why)}" if part.why else ""), *_table(part.records)))
    return shown


def _table(records: list[Judged]) -> tuple[pd.DataFrame, pd.DataFrame]:
    names = [name for name in COLUMNS if any(name in one.record.figures for one in records)]
    rows, grey = [], []
    for one in records:
        record = one.record
        row = {"study": record.study, "run": record.run, "variant": record.variant, "status": one.status,
               "what is wrong": one.wrong or "–"}
        row |= {METRICS[name].called: f"{record.figures[name]:.4g}" if name in record.figures else "–"
                for name in names}
        row |= {"letters": str(len(record.letters) or "–"), "trained": _place(record), "as noted": record.note}
        rows.append(row)
        faulty = {METRICS[name].called for name in names if one.faulty(name)}
        grey.append({key: one.status != "reported" or key in faulty for key in row})
    return pd.DataFrame(rows), pd.DataFrame(grey)


def _place(record) -> str:
    """Layer, width, k, steps and samples; in brackets what the study says and the record does not."""
    said = []
    for key, text in PLACES.items():
        value = getattr(record, key)
        if value is not None:
            text = text.format(value)
            said.append(f"({text})" if {"samples": "steps"}.get(key, key) in record.by_study else text)
    return ", ".join(said) or "–"


def _plain(text: str) -> str:
    """Text whose signs mean nothing in Markdown."""
    return text.replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")


def all_figures(studies: list[Study]) -> dict[str, go.Figure]:
    """A figure per study by file name."""
    return {f"reported_{study.name.replace('-', '_')}": figure(study) for study in studies}


def panels(study: Study) -> list[str]:
    """The metrics that are drawn: those that the study had targets for, or else those that it has figures of."""
    held = {name for one in study.records for name in one.record.figures}
    return list(study.targets) or [name for name in PANELS if name in held][:MOST_PANELS]


def figure(study: Study) -> go.Figure:
    """A panel a metric, a row a record: filled by its record, hollow from prose alone, a grey cross for no result.

    A dashed line is the study's own target. Nothing is averaged or ranked; rows are in the study's order.
    """
    names, rows = panels(study), {one.record.run: _label(one) for one in study.records}
    fig = make_subplots(rows=1, cols=len(names), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=[
        METRICS[name].stacked.replace(")</span>", f"{_wanted(study, name)})</span>") for name in names])
    for col, name in enumerate(names, 1):
        held = [one for one in study.records if name in one.record.figures]
        kinds = {"circle": [one for one in held if one.stands(name) and one.record.of[name] != "prose"],
                 "circle-open": [one for one in held if one.stands(name) and one.record.of[name] == "prose"],
                 "x-thin": [one for one in held if not one.stands(name)]}
        for symbol, own in kinds.items():
            ink = GREY if symbol == "x-thin" else COLOURS[col - 1]
            fig.add_scatter(x=[one.record.figures[name] for one in own], y=[rows[one.record.run] for one in own],
                            mode="markers", showlegend=False, row=1, col=col, cliponaxis=False,
                            hovertext=[html.escape(f"{one.record.run}: {one.wrong}") for one in own],
                            marker={"symbol": symbol, "size": 12, "color": ink, "line": {"width": 2, "color": ink}})
        values = [one.record.figures[name] for one in held]
        if name in study.targets:
            values.append(study.targets[name].value)
            fig.add_vline(x=values[-1], line={"color": "#111111", "dash": "dash", "width": 1.5}, row=1, col=col)
        ends = span(pd.Series(values, dtype=float)) if any(values) else (-0.05, 0.05)
        fig.update_xaxes(title={"text": METRICS[name].axis, "font_size": 13}, range=ends, nticks=5, tickangle=0, row=1,
                         col=col)
    name_rows(fig, list(rows.values()))
    text = "Figures of an earlier study, none measured here; filled: from an evaluation record; hollow: from prose " \
           "alone; grey crosses: no result, or not to be compared with the baseline (the table says why)"
    return dress(fig, f"As reported: {study.name}", text, width=290 + 290 * len(names),
                 height=290 + 34 * len(rows), top=110, side=270)


def _wanted(study: Study, name: str) -> str:
    target = study.targets.get(name)
    return f"; target {target.sign.replace('<', '&lt;')} {target.value:g}" if target else ""


def _label(one: Judged) -> str:
    return one.record.run if one.status == "reported" else \
        f"<span style='color:{GREY}'>{one.record.run} ({one.status})</span>"
