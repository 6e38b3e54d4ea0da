"""One training as a curve: what the SAEs kept on the way score, over the samples that each had seen.

Pure functions from evals/over_training.json and evals/absorption_over_training.json to plotly. Each line is one
training. The SAE before the first step is a null baseline and joined to nothing; one that has no score is a grey cross
at the foot, and the caption says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.metrics import METRICS
from sae_lib.views.figures_compare import labels, main, why
from sae_lib.views.template import GREY, dress, mark, style

QUALITY = ("explained_variance", "loss_recovered", "l0")
LETTERS = ("mean_full_absorption_score", "mean_absorption_fraction_score", "mean_num_split_features")
WITHIN = "bars: 95 % within each SAE (none for L0 and split latents)"
UNTRAINED, NO_SCORE = "untrained (null baseline)", "no score"
SAID = 3
"""Reasons for missing scores that a caption spells out."""


class Course(NamedTuple):
    """What is known of one training."""

    label: str
    """The run."""
    group: str
    """What the legend calls it: its variant, which all its seeds share."""
    number: int
    """Of the group's style."""
    reports: tuple[dict[str, Any], ...]
    """The contents of the two files, as far as they are there."""
    apart: str = ""
    """Why the run does not stand beside the others; then it is grey."""
    thin: bool = False
    """Whether other seeds have the same style."""

    @property
    def no_result(self) -> str:
        """Why none of its figures is a result; empty where they are."""
        return next((report["not_a_result"] for report in self.reports if report.get("not_a_result")), "")

    def points(self, metric: str) -> list[dict[str, Any]]:
        """Points of the report that measures ``metric``, in the order of training."""
        named = "absorption over training" if metric in LETTERS else "over training"
        return [point for report in self.reports if report.get("eval") == named for point in report["points"]]


def of_run(label: str, report: dict[str, Any], caption: str = "") -> dict[str, go.Figure]:
    """The figure of 03's or 04's page by name, for the content of its file; none for an empty or failed one."""
    if "points" not in report:
        return {}
    letters = report["eval"] == "absorption over training"
    text = f"{caption}; {WITHIN}: one training, no claim about the variant"
    return {"absorption_over_training" if letters else "over_training":
            over_training([Course(label, label, 0, (report,))], text, LETTERS if letters else QUALITY)}


def of_study(comparison, caption: str = "") -> dict[str, go.Figure]:
    """The figure of 05 by name, of the runs that hold such points: a style a variant, seeds as thin lines of it."""
    table, names, kept = comparison.table, labels(comparison.table), main(comparison.table)
    variants, courses = list(dict.fromkeys(table.variant)), []
    for row in table[table.run.isin(list(comparison.over_training))].itertuples():
        group = names[row.run].rpartition("-s")[0] or names[row.run]
        courses.append(Course(names[row.run], group, variants.index(row.variant), comparison.over_training[row.run],
                              "" if kept[row.Index] else why(row), (table.variant == row.variant).sum() > 1))
    if not courses:
        return {}
    panels = tuple(name for name in (*QUALITY, *LETTERS) if any(course.points(name) for course in courses))
    return {"over_training": over_training(courses, f"{caption}; {WITHIN}", panels or QUALITY)}


def over_training(courses: list[Course], caption: str, metrics: tuple[str, ...] = QUALITY) -> go.Figure:
    """A panel a metric over training samples (log; 0 at the left end), a line a training."""
    cols = min(3, len(metrics))
    rows = -(-len(metrics) // cols)
    fig = make_subplots(rows=rows, cols=cols, subplot_titles=[METRICS[name].stacked for name in metrics],
                        horizontal_spacing=0.27 / cols, vertical_spacing=0.26 / rows)
    seen = sorted({point["samples"] for course in courses for name in metrics for point in course.points(name)} - {0})
    zero = seen[0] / 3 if seen else 1.0
    for place, name in enumerate(metrics):
        at = {"row": place // cols + 1, "col": place % cols + 1}
        for course in courses:
            _line(fig, course, name, zero, at)
        _without_score(fig, courses, name, zero, at)
        fig.update_yaxes(title={"text": METRICS[name].axis, "font": {"size": 13}, "standoff": 12}, **at)
    _axis(fig, [zero, *seen])
    fig.update_xaxes(title="Training samples (log)", row=rows)
    if not seen:
        fig.add_annotation(text="no result", showarrow=False, font={"size": 20, "color": GREY}, xref="paper",
                           yref="paper", x=0.5, y=0.5)
    names = [trace.name for trace in fig.data if trace.showlegend is not False]
    fig.update_layout(legend={"x": 1.02, "y": 1, "yanchor": "top"}, showlegend=True)
    return dress(fig, "Over training", _said(courses, metrics, caption), top=110,
                 width=130 + 330 * cols + 60 + 8 * max(map(len, names), default=0),
                 height=max(150 + 330 * rows, 300 + 23 * len(names)))


# -- within ------------------------------------------------------------------------------------------------------

def _line(fig: go.Figure, course: Course, metric: str, zero: float, at: dict[str, int]) -> None:
    """The line of one training, and the mark of its SAE before the first step."""
    scored = [point for point in course.points(metric) if metric in point["metrics"]]
    own = [point for point in scored if point["samples"] or course.apart]
    line = style(course.number) | {"width": 1.2 if course.thin else 2}
    marks = mark(course.number, 6 if course.thin else 8)
    name = course.group
    if course.apart:
        line, marks = {"color": GREY, "dash": "dot", "width": 1.5}, marks | {"color": GREY}
        name = f"{course.label} ({course.apart.partition(':')[0]})"
    said = f"{course.label}: {course.apart}" if course.apart else course.label
    _marks(fig, own, metric, zero, name, at, mode="lines+markers", line=line, marker=marks, said=said)
    first = [point for point in scored if point not in own]
    _marks(fig, first, metric, zero, UNTRAINED, at, mode="markers", said=said,
           marker={"size": 9, "symbol": "circle-open", "color": GREY, "line": {"width": 2}})


def _marks(fig: go.Figure, points: list[dict[str, Any]], metric: str, zero: float, name: str, at: dict[str, int],
           said: str, **look) -> None:
    if not points:
        return
    values = [point["metrics"][metric] for point in points]
    spans = [point["interval"].get(metric) or (value, value) for point, value in zip(points, values)]
    if any(metric in point["interval"] for point in points):
        look["error_y"] = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                           "array": [max(0, high - value) for (_, high), value in zip(spans, values)],
                           "arrayminus": [max(0, value - low) for (low, _), value in zip(spans, values)]}
    fig.add_scatter(x=[point["samples"] or zero for point in points], y=values, name=name, legendgroup=name,
                    showlegend=not any(trace.name == name for trace in fig.data), hovertext=said, **at, **look)


def _without_score(fig: go.Figure, courses: list[Course], metric: str, zero: float, at: dict[str, int]) -> None:
    """Grey crosses at the foot of a panel, which they do not stretch."""
    none = [(course, point) for course in courses for point in course.points(metric) if metric not in point["metrics"]]
    if not none:
        return
    held = [value for trace in fig.select_traces(**at) for value in (
        *trace.y, *(y - low for y, low in zip(trace.y, trace.error_y.arrayminus or ())))]
    room = 0.05 * (max(held) - min(held)) or 0.05 if held else 0.05
    foot = min(held, default=0) - 2 * room
    fig.add_scatter(x=[point["samples"] or zero for _, point in none], y=[foot] * len(none), mode="markers", **at,
                    name=NO_SCORE, legendgroup=NO_SCORE, showlegend=not any(t.name == NO_SCORE for t in fig.data),
                    hovertext=[f"{course.label}: {point['not_a_result']}".replace("<", "&lt;")
                               for course, point in none],
                    marker={"size": 11, "symbol": "x-thin", "line": {"width": 2, "color": GREY}})


def _axis(fig: go.Figure, places: list[float]) -> None:
    """A log axis whose left end stands for 0; ticks at the points, as far as they have room."""
    ticks, apart = [places[0]], (places[-1] / places[0]) ** 0.12
    for place in places[1:]:
        if place / ticks[-1] > apart:
            ticks.append(place)
    fig.update_xaxes(type="log", tickmode="array", tickvals=ticks, tickangle=0, tickfont_size=12,
                     ticktext=["0", *(_short(tick) for tick in ticks[1:])])


def _short(number: float) -> str:
    """Two digits of a number for a tick: 1,998,848 as 2M, 200,704 as 200k."""
    number = float(f"{number:.2g}")
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= size), (1, ""))
    return f"{number / size:g}{unit}"


def _said(courses: list[Course], metrics: tuple[str, ...], caption: str) -> str:
    """The caption with what has no score, and why."""
    left = [f"{course.label} ({course.no_result})" for course in courses if course.no_result]
    none: dict[str, None] = {}
    for course in courses:
        for name in metrics:
            for point in course.points(name):
                if name not in point["metrics"] and point["not_a_result"]:
                    none[f"{course.label} after {point['samples']:,} samples ({point['not_a_result']})"] = None
    more = f" and {len(none) - SAID} more" if len(none) > SAID else ""
    text = caption + (f"; no results, left out: {', '.join(left)}" if left else "")
    return text + (f"; no score: {', '.join([*none][:SAID])}{more}" if none else "")
