"""Letter recovery against its definition, word by word."""

import sys

import pytest
import torch

from sae_lib import runs

sys.path.insert(0, str(runs.project() / "benchmarks"))

from recovery import f1_by_letter


def f1(said, right):
    return 2 * (said & right).sum().item() / max(1, said.sum().item() + right.sum().item())


def by_hand(latents, labels, train, letter):
    """Every latent and every threshold tried on the training words; F1 of the best on the others."""
    right, best = labels == letter, (-1.0, None)
    for latent in range(latents.shape[1]):
        for threshold in latents[:train, latent].unique():
            if threshold > 0:
                found = f1(latents[:train, latent] >= threshold, right[:train])
                best = max(best, (found, (latent, threshold)), key=lambda pair: pair[0])
    latent, threshold = best[1]
    return f1(latents[train:, latent] >= threshold, right[train:])


def test_f1_is_that_of_the_best_latent_and_threshold():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    latents = torch.rand(90, 12, generator=draw) * (torch.rand(90, 12, generator=draw) < 0.3)
    latents[:, 4] = (labels == 1) * (1 + torch.rand(90, generator=draw))
    found = f1_by_letter(latents, labels, 60)
    assert found.tolist() == pytest.approx([by_hand(latents, labels, 60, letter) for letter in range(3)])
    assert found[1] == 1 and found[0] < 1
