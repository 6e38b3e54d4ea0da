"""Every dashboard on good runs and on bad ones, every control moved, without a browser."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from sae_lib import params, runs
from sae_lib.evaluation import compare, foreign_run, latents, validity
from sae_lib.training import trainer
from sae_lib.training.ingredients import load_sae
from sae_lib.views import dashboards, pictures, show
from sae_lib.views.dashboards import base, figure_widget
from sae_lib.views.dashboards.curves import RunCurves

SMALL = {"d_sae": 128, "k": 6, "samples": 12_000, "batch_size": 128, "lr": 2e-3, "warmup_steps": 10, "threads": 1,
         "dead_after": 4000}
RUNS = {"boards/topk-s1": {}, "boards/topk-s2": {"seed": 2}, "boards/wide-s1": {"d_sae": 192},
        "boards/dead-s1": {"architecture": "standard", "l1": 3000.0, "l1_warmup": 0.0, "lr": 0.02},
        "boards/untrained-s1": {"stop_after_steps": 0}, "boards/onestep-s1": {"samples": 128},
        "boards/cut-s1": {"stop_after_steps": 40},
        "boards/nan-s1": {"lr": 1e30}}
KINDS = ("latents", "coactivation", "splits", "curves")


@pytest.fixture(scope="module")
def study(tiny, tiny_store):
    """Runs of one study: valid, dead, untrained, of one step, not finite; and an SAE made elsewhere."""
    for name, values in RUNS.items():
        p = params.check("train", tiny().model_dump() | SMALL | values | {"run": name})
        run = runs.start(p)
        trainer.train(p, tiny_store, run)
        latents.record(run, tiny_store)
        validity.update(run)
    elsewhere = {"run": "boards/foreign-s1", "sae": str(runs.Run("boards/topk-s1").path / "sae"), "mode": "batch",
                 "activations": tiny_store.name}
    foreign_run.bring_in(params.check("eval", elsewhere))
    validity.update(runs.Run("boards/foreign-s1"))
    return compare.compare(params.check("compare", {"study": "boards", "baseline": "topk", "mode": "batch"}))


def options_of(control):
    return [option[1] if isinstance(option, tuple) else option for option in control.options]


def move_everything(board):
    """Give every control each (or several) of its values, as a hand would; every part must be drawn each time."""
    assert board.widget
    for key, control in board.controls.items():
        if hasattr(control, "options") and isinstance(control.value, tuple):
            values = [tuple(options_of(control)), control.value]
        elif hasattr(control, "options"):
            values = [*options_of(control), control.value]
        elif isinstance(control.value, bool):
            values = [not control.value, control.value]
        else:
            values = [control.max, control.min, control.value]
        for value in values:
            control.value = value
            assert board.state[key] == value
            for part, panel in board.panels.items():
                assert panel.box.children, (part, key, value)


def text_of(board):
    return " ".join([*board.notices, *(drawn for drawn in board.figures().values() if isinstance(drawn, str))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*RUNS, "boards/foreign-s1", "boards/not-there"])
def test_every_dashboard_opens_on_every_run(study, kind, name):
    """With figures where there are any, with a sentence where not; never with a fault."""
    board = getattr(dashboards, kind)(name)
    move_everything(board)
    status = (runs.Run(name).json("validity.json") or {}).get("status")
    if kind == "splits":
        assert "run 04_letter_absorption" in text_of(board)
    elif status is None:
        assert isinstance(board, base.Sentence) and name in text_of(board)
    elif status == "invalid":
        assert f"This run is {status}" in text_of(board) and "not a result" in text_of(board)
    elif kind == "curves" and "foreign" in name:
        assert "made elsewhere" in text_of(board)
    else:
        assert any(isinstance(drawn, go.Figure) for drawn in board.figures().values())


def test_an_sae_whose_latents_never_fire_says_so(study):
    assert "there are no pairs" in text_of(dashboards.coactivation("boards/nan-s1"))
    assert "fires on none of the tokens" in text_of(dashboards.latents("boards/nan-s1", 3))


def test_a_training_that_was_cut_shows_its_last_weights(study):
    board = dashboards.coactivation("boards/cut-s1")
    assert board.names == ["early", "late"]
    weights = load_sae(runs.Run("boards/cut-s1").path / "sae").W_dec
    rows = torch.nn.functional.normalize(weights, dim=1)
    np.testing.assert_allclose(board.snapshot.rows, rows, atol=1e-6)
    near = dashboards.latents("boards/cut-s1", 5).by_cosine(3)
    np.testing.assert_allclose(near, (rows @ rows[5])[near.index.to_numpy()], atol=1e-6)


def test_the_study_s_dashboards(study):
    for board in (dashboards.compare(study), dashboards.curves_by_run(study), dashboards.coactivation_by_run(study)):
        move_everything(board)


def test_controls_change_the_figure_s_data(study):
    board = dashboards.coactivation("boards/topk-s1")
    assert board.widget
    board.set(latent=5, size=32)
    drawn = board.panels["block"].figure
    assert drawn.data[0].z.shape[0] == len(drawn.data[1].x) <= 32 and "5" in drawn.data[0].x
    before = np.array(board.panels["overview"].figure.data[0].z)
    board.controls["snapshot"].value = "early"
    assert not np.array_equal(before, board.panels["overview"].figure.data[0].z, equal_nan=True)
    board.set(snapshot="late", other="boards/topk-s2")
    assert "less that of boards/topk-s2" in drawn.layout.title.text
    assert board.controls["other"].value == "boards/topk-s2"
    assert "latents matched" in board.panels["overview"].figure.layout.annotations[0].text


def test_a_click_on_a_cell_opens_its_strongest_pair(study):
    board = dashboards.coactivation("boards/topk-s1")
    assert board.widget
    cells = np.nan_to_num(board.draw("overview").data[0].z, nan=-9)
    np.fill_diagonal(cells, -9)
    row, column = np.unravel_index(np.argmax(cells), cells.shape)
    board.clicked("overview", {"trace": 0, "place": [row, column], "x": column, "y": row, "customdata": None})
    assert board.cell[board.latent] in (row, column)
    board.clicked("block", {"trace": 1, "place": 0, "customdata": 7, "x": 1.0, "y": 1.0})
    assert board.latent == 7 and board.inspector.latent == 7 and board.slot.children


def test_the_row_of_the_table_opens_the_latent(study):
    board = dashboards.latents("boards/topk-s1")
    assert board.widget and len(board.listing.df) == 128
    board.listing.selected_rows = [11]
    assert board.latent == 11 and board.panels["latent"].figure.layout.title.text.startswith("Latent 11")


def test_a_mark_opens_its_run_with_all_dashboards(study):
    board = dashboards.compare(study)
    assert board.widget and "seed: 2 (baseline 1" not in board.comparison.parameters["boards/topk-s2"]
    assert "d_sae: 192 (baseline 128)" in board.comparison.parameters["boards/wide-s1"]
    board.clicked("explore", {"trace": 0, "customdata": "boards/wide-s1", "x": 0, "y": 0, "place": 0})
    assert board.state["run"] == "boards/wide-s1" and "d_sae: 192" in board.figures()["run"]
    for number in range(4):
        board.tabs.widget.selected_index = number
    assert list(board.tabs.boards) == list(board.tabs.makers)


def test_runs_that_are_no_results_are_drawn_only_when_asked_for(study):
    board = dashboards.compare(study)
    drawn = [trace.customdata for trace in board.draw("explore").data if trace.customdata is not None]
    names = {name for part in drawn for name in part}
    assert names == {"boards/topk-s1", "boards/topk-s2"}
    board.state["apart"] = True
    apart = board.draw("explore").data[-1]
    assert "boards/dead-s1" in apart.customdata and any("invalid" in text for text in apart.hovertext)


def test_bands_are_mean_and_range_over_seeds(study):
    board = dashboards.curves_by_run(study)
    board.state |= {"shown": ("explained_variance",), "bands": True}
    band, mean = board.draw("curves").data[:2]
    histories = [study.histories[f"boards/topk-s{seed}"].explained_variance.to_numpy() for seed in (1, 2)]
    np.testing.assert_allclose(mean.y, np.mean(histories, 0))
    np.testing.assert_allclose(band.y[:len(mean.y)], np.max(histories, 0))


def test_smoothing_is_an_exponential_moving_average():
    history = pd.DataFrame({"step": [0, 1, 2], "samples": [1, 2, 3], "loss/reconstruction": [4.0, 0.0, 0.0]})
    from sae_lib.views import figures_curves

    found = figures_curves.smoothed(history, 0.5)
    assert found["loss/reconstruction"].tolist() == pytest.approx([4, 4 * 0.5 / 1.5, 4 * 0.25 / 1.75])
    assert found.step.tolist() == [0, 1, 2] and figures_curves.smoothed(history, 0) is history


def test_live_curves_keep_to_their_share_and_never_stop_a_training(capsys):
    board, rows = RunCurves("r", pd.DataFrame()), []
    assert board.widget
    columns = {"samples": 1, "loss/reconstruction": 1.0, "explained_variance": 0.5, "l0": 8.0, "dead_share": 0.0,
               "lr": 1e-3}
    board.began -= 1e6
    for step in range(9):
        rows.append({"step": step, **columns})
        board.last = -1e9
        board(rows)
    board([*rows, rows[-1]])  # too soon
    assert len(board.panels["curves"].figure.data[0].x) == 9
    board.spent = 1e9
    board([*rows, {"step": 9, **columns}])
    assert len(board.history) == 9
    board.spent, board.last = 0.0, -1e9
    board.redrawn = 0
    board([{"nothing": 1}, {"nothing": 2}])
    board(rows)
    assert "live curves stopped" in capsys.readouterr().out
    idle = RunCurves("r", pd.DataFrame())
    idle(rows)
    assert idle.history.empty and not idle.panels


def test_matrices_are_sent_as_rows_of_bytes():
    values = np.array([[1.0, np.nan], [3.0, 4.0]])
    figure = figure_widget.FigureWidget(go.Figure(go.Heatmap(z=values)))
    rows = figure.get_state()["_widget_data"][0]["z"]
    assert [row["dtype"] for row in rows] == ["float32", "float32"]
    assert np.frombuffer(rows[1]["buffer"], np.float32).tolist() == [3, 4]
    with figure.batch_update():
        figure.data[0].z = values.T


def test_figures_of_a_page_share_one_copy_of_plotly():
    one, two = (figure_widget.FigureWidget(go.Figure()) for _ in range(2))
    states = [figure.get_state() for figure in (one, two)]
    assert states[0]["_plotly"] == states[1]["_plotly"] == f"IPY_MODEL_{one._plotly.model_id}"
    assert len(one._plotly.value) > 3_000_000 and sum(map(len, map(str, states))) < 50_000
    one._plotly.close()
    three = figure_widget.FigureWidget(go.Figure())
    assert three._plotly is not one._plotly and three._plotly.value == one._plotly.value


def test_without_a_browser_a_page_holds_plotly_once(study, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "browser", lambda: None)
    monkeypatch.setattr(show, "_page", show._Page())
    shown = []
    monkeypatch.setattr(show, "display", lambda item, **_: shown.append(item))
    show.dashboard(dashboards.coactivation("boards/topk-s1"), "pairs", folder=tmp_path, mode="batch")
    show.dashboard(dashboards.latents("boards/topk-s1"), "latents", folder=tmp_path, mode="batch")
    pages = [item.data for item in shown if hasattr(item, "data")]
    assert [len(page) > 3_000_000 for page in pages] == [True] + 5 * [False]
    assert sum(map(len, pages)) < 8_000_000
    assert {path.suffix for path in tmp_path.iterdir()} == {".html"}


def test_pictures_in_a_notebook_have_few_colours(tmp_path):
    import io

    import PIL.Image

    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    picture = PIL.Image.open(io.BytesIO(pictures.small(tmp_path / "a.png")))
    assert picture.size == (90, 90) and picture.mode == "P"
