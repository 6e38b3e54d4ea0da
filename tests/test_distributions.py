"""Distributions of a run: what its kept latents count to, and the figures of them."""

import numpy as np
import pytest
from test_latents import trained  # noqa: F401

from sae_lib.evaluation import distributions, results, validity
from sae_lib.training.ingredients import load_sae
from sae_lib.views import figures_distributions

QUALITY = {"dims": 128, "of": 576, "pairs": 10, "eps": 0.7, "lost": 0.78, "threshold": 0.05,
           "distortion": {"p99": 0.3, "worst": 0.4, "edges": [-1.0, 0.0, 1.0], "counts": [4.0, 6.0]},
           "cosine_noise": {"std": 0.08, "expected": 0.078, "edges": [-0.5, 0.0, 0.5], "counts": [5.0, 5.0]}}


def test_counts_are_those_of_the_dense_latents(trained):  # noqa: F811
    run, held, store = trained
    found = distributions.sparsity(run.name)
    codes = load_sae(run.path / "sae").encode(store.heldout(len(held.tokens)).x).numpy() > 0
    np.testing.assert_allclose(found.l0, np.bincount(codes.sum(1)) / len(codes))
    assert found.l0.sum() == pytest.approx(1) and found.never == (~codes.any(0)).mean()
    assert found.density.sum() + found.never == pytest.approx(1)
    middle = codes.mean(0)[codes.any(0)]
    edges = 10 ** found.edges
    assert found.density[-1] == pytest.approx(((middle >= edges[-2]) & (middle <= 1)).mean() * codes.any(0).mean())


def test_figures_show_valid_runs_alone(trained):  # noqa: F811
    run, *_ = trained
    validity.update(run)
    table = results.compared(results.collect([run.name]), None)
    found = {run.name: distributions.sparsity(run.name)}
    fig = figures_distributions.sparsity(found, table)
    assert len(fig.data) == 2 and fig.layout.yaxis.title.text and fig.layout.xaxis2.title.text
    none = figures_distributions.sparsity(found, table.assign(status="invalid"))
    assert len(none.data) == 0 and "no run here" in str(none.layout.annotations)


@pytest.mark.parametrize("threshold, told", [(0.05, "more than that"), (0.4, "less than that"), (None, "no threshold")])
def test_projection_tells_whether_its_noise_exceeds_the_threshold(threshold, told):
    fig = figures_distributions.projection({"study/a": QUALITY | {"threshold": threshold}})
    text = " ".join(fig.layout.annotations[-1].text.replace("<br>", " ").split())
    assert told in text and "0.080" in text and "±0.70" in text and "1 of 1 runs" in text
    assert np.sum(fig.data[0].y) == pytest.approx(1)


def test_a_run_without_a_projection_has_none(trained):  # noqa: F811
    assert distributions.projection(trained[0].name) is None
    assert distributions.sparsity("latents/nowhere") is None
