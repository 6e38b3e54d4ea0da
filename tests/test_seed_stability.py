"""Latents of several seeds: planted ones are all found again, random ones are not; matching as the dense matrix'."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from test_ranking import table

from sae_lib import runs
from sae_lib.evaluation import matching, seed_stability
from sae_lib.runs import RunError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.views import figures_stability


def rows(count, wide=48, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, wide, generator=draw), dim=1)


@pytest.mark.parametrize("largest", [4096, 10])
def test_permuted_rows_are_all_found_and_random_ones_are_not(monkeypatch, largest):
    monkeypatch.setattr(seed_stability, "LARGEST", largest)
    one = rows(200)
    found = seed_stability.likeness(one, one[torch.randperm(200)])
    assert found.share == 1 and np.allclose(found.best, 1, atol=1e-5)
    assert found.by == ("Hungarian" if largest == 4096 else "mutual nearest")
    other = seed_stability.random_likeness(200, 48)
    assert other.share < 0.02 and 0.2 < other.best.mean() < 0.5 and len(other.best) == 400
    half = torch.cat([one[:100], rows(100, seed=5)])
    assert seed_stability.likeness(one, half).share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("largest", [4096, 10])
def test_likeness_is_that_of_the_dense_matrix(monkeypatch, largest):
    monkeypatch.setattr(seed_stability, "LARGEST", largest)
    monkeypatch.setattr(matching, "ROWS", 7)
    one, draw = rows(60, 8), torch.Generator().manual_seed(9)
    other = torch.nn.functional.normalize(one[:45] + 0.5 * torch.randn(45, 8, generator=draw) / 8 ** 0.5, dim=1)
    other = other[torch.randperm(45, generator=draw)]
    cosines = one.numpy().astype(float) @ other.numpy().astype(float).T
    if largest == 4096:
        matched = cosines[linear_sum_assignment(-cosines)]
    else:
        matched = [cosines[i, j] for i, j in enumerate(cosines.argmax(1)) if cosines[:, j].argmax() == i]
    found = seed_stability.likeness(one, other)
    assert found.share == pytest.approx(2 * np.sum(np.array(matched) >= 0.7) / 105) and 0.3 < found.share < 0.95
    assert np.allclose(found.best, [*cosines.max(1), *cosines.max(0)], atol=1e-5)
    with pytest.raises(RunError, match="not of one model"):
        seed_stability.likeness(one, rows(5, 9))


def test_the_interval_is_a_jackknife_over_seeds_and_covers():
    values = {(0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.4}
    mean, (low, high) = seed_stability.jackknife(values, 3)
    without = np.array([0.4, 0.6, 0.5])  # without seed 0, 1, 2
    reach = stats.t.ppf(0.975, 2) * np.sqrt(2 / 3 * ((without - 0.5) ** 2).sum())
    assert mean == pytest.approx(0.5) and (low, high) == pytest.approx((max(0, 0.5 - reach), min(1, 0.5 + reach)))
    assert seed_stability.jackknife({(0, 1): 0.5}, 2) == (0.5, None)
    draw, hits, n = np.random.default_rng(0), 0, 1500
    for _ in range(n):  # each seed has an effect of its own, and each pair a little noise
        seeds = 0.5 + 0.05 * draw.normal(size=5)
        pairs = {(i, j): (seeds[i] + seeds[j]) / 2 + 0.01 * draw.normal() for i in range(5) for j in range(i + 1, 5)}
        low, high = seed_stability.jackknife(pairs, 5)[1]
        hits += low <= 0.5 <= high
    assert 0.93 < hits / n < 0.985


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Three seeds of a variant whose decoders are one, permuted; two of another whose are random; one of a third."""
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    one = rows(64, 32)
    for place, name in enumerate(("topk-s1", "topk-s2", "topk-s3", "other-s1", "other-s2", "third-s1")):
        own = one[torch.randperm(64)] if name.startswith("topk") else rows(64, 32, seed=100 + place)
        run = runs.folder_of(f"s/m-{name}")
        made = architectures.get("topk")(k=4)
        SparseAutoencoder(own.clone(), torch.zeros(64), own, torch.zeros(32), made).save(run / "sae")
        fires = np.arange(64) % 16 > 0 if name == "other-s1" else np.ones(64, dtype=bool)
        if name != "topk-s3":
            (run / "latents").mkdir()
            kept = pd.DataFrame({"latent": range(64), "firings": fires.astype(int)})
            kept.to_parquet(run / "latents/latents.parquet")
    return tmp_path


def test_variants_of_two_seeds_are_measured_and_unused_latents_left_out(home):
    held = table({"topk": [1.0, 2.0, 3.0], "other": [1.0, 2.0], "third": [1.0]})
    found = {one.variant: one for one in seed_stability.stability(held, "topk")}
    assert set(found) == {"m-topk", "m-other"}
    assert (found["m-topk"].share, found["m-topk"].interval) == (1, (1, 1)) and found["m-topk"].seeds == 3
    assert "m-topk-s3: not known which latents fire" in found["m-topk"].note
    other = found["m-other"]
    assert other.interval is None and other.share < 0.2 and len(other.best) == 60 + 64
    assert other.note == "4 of 128 latents fire on no evaluated token and are left out"
    assert found["m-topk"].random is other.random
    page = figures_stability.table(list(found.values()))
    assert page.iloc[0, 3] == "1" and page.pairs.tolist() == [3, 1]
    fig = figures_stability.nearest_by_variant(list(found.values()), "note")
    assert [trace.name.partition(":")[0] for trace in fig.data] == ["random rows", "m-topk", "m-other"]
    assert fig.data[1].y[-1] == 1 and fig.data[1].y[150] == 0 and fig.data[0].y[150] > 0.9
    (home / "runs/s/m-other-s2/sae/cfg.json").write_text("{")
    assert [one.variant for one in seed_stability.stability(held, "topk")] == ["m-topk"]
    assert "no variant has two" in figures_stability.nearest_by_variant([]).layout.annotations[0].text
