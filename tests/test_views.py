"""Figures reach their readers: files are whole and stand alone, axes carry titles, a browser cannot hold up a page."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from sae_lib.views import figures, figures_frontier, figures_pairs, further, pictures, show, template


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


def test_html_stands_alone_and_png_is_written_where_a_browser_is(tmp_path, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH")
    show.figures({"a": go.Figure(go.Scatter(y=[1, 2])), "b": go.Figure()}, folder=tmp_path, mode="batch")
    for name in "ab":
        page = (tmp_path / f"{name}.html").read_text()
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?https?:", page) and len(page) > 1_000_000
        if pictures.browser():
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
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


def test_intervals_within_an_sae_stand_small_beside_or_below_their_values():
    within = {"level": 0.95, "by": "b", "l0": [7.5, 8.5], "explained_variance": [0.75, 0.85]}
    core = {"metrics": {"explained_variance": 0.8, "l0": 8.0, "frac_alive": 1.0}, "within_this_sae": within}
    page = figures.evaluation({"core": core}).set_index("metric")
    assert page["within this SAE"].to_dict() == {
        "Explained variance": "[0.75 to 0.85]", "L0 (SAEBench)": "[7.5 to 8.5]", "Alive latents": ""}
    assert page.value["L0 (SAEBench)"] == 8
    del core["within_this_sae"]  # of an evaluation before there were any
    assert "within this SAE" not in figures.evaluation({"core": core})
    report = {"metrics": {"sae_test_accuracy": 0.9, "llm_test_accuracy": 0.95}, "raw": {"eval_result_details": [
        {"dataset_name": "a_results", "sae_test_accuracy": 0.9, "llm_test_accuracy": 0.95}]},
        "within_this_sae": {"level": 0.95, "by": "b", "sae_test_accuracy": [0.8, 0.97]}}
    rows = further.tables({"sparse_probing": report})["sparse_probing"]
    assert rows["SAE, all"].tolist() == [0.9, "0.9 [0.8 to 0.97]"] and rows["LLM, all"].tolist() == [0.95, "0.95"]
    html = template.as_html(rows)
    assert "0.9<br><span style='font-size:11px" in html and "0.8 to 0.97</span></td>" in html and "<td>0.9</td>" in html


def histogram(edges, seed):
    pairs = np.random.default_rng(seed).integers(0, 5000, len(edges) - 1)
    return {"edges": list(edges), "pairs": pairs.tolist()}


def some_phases(seed=0):
    return [{"phase": name, "step": 10 * number, "cosines": histogram(np.linspace(0, 1, 11), seed + number),
             "overlap": histogram([0, *np.logspace(-4, 0, 9)], seed - number + 9)}
            for number, name in enumerate(("early", "middle", "late"), 1)]


def test_phases_are_shares_of_all_pairs():
    one = some_phases()[0]
    x, y = figures_pairs.shares(one["cosines"])
    assert np.nansum(y) == pytest.approx(1) and np.allclose(x, np.linspace(0.05, 0.95, 10))
    x, _ = figures_pairs.shares(one["overlap"])
    assert (np.diff(x) > 0).all() and x[0] == pytest.approx(5e-5)
    fig = figures_pairs.phases({"phases": some_phases()})
    assert len(fig.data) == 6 and all(np.nansum(trace.y) == pytest.approx(1) for trace in fig.data)
    assert isinstance(figures_pairs.phases({"phases": []}), go.Figure)


def compared(**columns):
    count = len(columns["run"])
    plain = {"status": "valid", "role": "normal", "apart": "", "model": "m", "hook": "h", "samples": 10, "d_sae": 64,
             "activations": "a", "evaluation": "e", "letters": "l", "sae_bench": "0.6", "flags": "", "reasons": ""}
    return pd.DataFrame({key: [value] * count for key, value in plain.items()} | columns)


def test_phases_by_run_average_seeds_and_leave_out_what_is_apart():
    table = compared(run=["s/m-a-s1", "s/m-a-s2", "s/m-b-s1"], variant=["m-a", "m-a", "m-b"],
                     status=["valid", "valid", "invalid"])
    found = {run: some_phases(n) for n, run in enumerate(table.run)}
    fig = figures_pairs.phases_by_run(found, table)
    assert len(fig.data) == 6 and {trace.name for trace in fig.data} == {"a"}
    assert all(len(trace.y) and np.allclose(trace.y, 1) for trace in fig.data)


def test_phases_by_run_are_beside_the_baseline_s():
    table = compared(run=["s/m-a-s1", "s/m-b-s1"], variant=["m-a", "m-b"])
    found = {run: some_phases(n) for n, run in enumerate(table.run)}
    fig = figures_pairs.phases_by_run(found, table, "a")
    own, base = (np.array(found[run][2]["cosines"]["pairs"]) for run in ("s/m-b-s1", "s/m-a-s1"))
    kept = (own >= figures_pairs.FEWEST) & (base >= figures_pairs.FEWEST)
    drawn = next(trace for trace in fig.data[2:] if trace.name == "b" and trace.xaxis == "x3")
    assert np.allclose(drawn.y, (own / own.sum() / (base / base.sum()))[kept]) and 0 < kept.sum() < len(kept)


def test_the_frontier_lets_l0_differ_and_nothing_else():
    runs = [f"s/m-a-k={k}-s1" for k in (8, 16, 32)] + ["s/m-b-s1"]
    table = compared(run=runs, variant=["m-a-k=8", "m-a-k=16", "m-a-k=32", "m-b"], l0=[8.0, 16.0, 32.0, 16.0],
                     explained_variance=[0.5, 0.6, 0.7, 0.9], samples=[10, 10, 10, 99])
    one = SimpleNamespace(frontier="l0", table=table)
    fig = figures_frontier.frontier(one, "note")
    marks, line = fig.data
    assert list(marks.x) == [8, 16, 32] and list(line.y) == [0.5, 0.6, 0.7]
    assert "1 valid runs left out" in fig.layout.annotations[-1].text
    swept = SimpleNamespace(frontier="d_sae", table=table.assign(along=[64, 128, 256, 64], d_sae=[64, 128, 256, 64]))
    assert list(figures_frontier.frontier(swept).data[0].x) == [64, 128, 256]
