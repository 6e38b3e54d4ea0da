"""Figures reach their readers: files are whole and stand alone, axes carry titles, a browser cannot hold up a page."""

import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from sae_lib.training import terms
from sae_lib.views import figures, show


def history(rows=5):
    steps = np.arange(rows)
    return pd.DataFrame({"step": steps, "samples": 10 * (steps + 1), "loss/reconstruction": 10.0 / (steps + 1),
                         "loss/auxk": 0.0, "share/auxk": 0.0, "explained_variance": 0.5, "l0": 8.0, "dead_share": 0.0,
                         "lr": 1e-3, "value/x.weight": 0.1})


def axes(fig):
    """Every axis that draws its own ticks."""
    return [axis for name, axis in fig.layout.to_plotly_json().items() if re.fullmatch(r"[y]axis\d*", name)]


@pytest.mark.parametrize("draw", [figures.training_curves, figures.schedules])
def test_axes_carry_titles_and_a_run_without_steps_is_a_figure_too(draw):
    assert all(axis.get("title", {}).get("text") for axis in axes(draw(history(), "r", "c")))
    assert isinstance(draw(pd.DataFrame(), "r", "c"), go.Figure)


def test_the_lines_of_the_figure_are_the_gate_s():
    assert (figures.INERT, figures.DOMINATING) == (terms.INERT, terms.DOMINATING)


def test_html_stands_alone_and_png_is_written_where_a_browser_is(tmp_path):
    show.figures({"a": go.Figure(go.Scatter(y=[1, 2])), "b": go.Figure()}, folder=tmp_path, mode="batch")
    for name in "ab":
        page = (tmp_path / f"{name}.html").read_text()
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?https?:", page) and len(page) > 1_000_000
        if show.browser():
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", ["/bin/false", "/nonexistent/chrome"])
def test_a_browser_that_does_not_start_costs_the_picture_alone(tmp_path, monkeypatch, capsys, path):
    monkeypatch.setenv("BROWSER_PATH", path)
    (tmp_path / "a.png").write_bytes(b"of an earlier run")
    show.figure(go.Figure(), "a", folder=tmp_path, mode="batch")
    assert "PNG skipped" in capsys.readouterr().err
    assert (tmp_path / "a.html").exists() and not (tmp_path / "a.png").exists()


def test_tables_escape_their_text(monkeypatch):
    shown = []
    monkeypatch.setattr(show, "display", shown.append)
    show.table(pd.DataFrame({"a": ["<script>x</script>"]}))
    assert "<script>" not in shown[0].data
