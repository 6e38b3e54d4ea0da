"""SAEBench's absorption where the truth is known: parents of a planted world in place of letters, rows of words.

By SAEBench's own functions: probes, sparse probes, split latents, and the score of each row. Features are not
exclusive, as letters are; so each sparse probe tells one parent from all else, and probes are fitted side by side.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae_lib.data.language_model import PLANTED
from sae_lib.data.planted import HOOK, Truth
from sae_lib.evaluation.saebench.absorption import PRESETS, PROBE_F1, sparse_batch
from sae_lib.evaluation.saebench.adapter import import_sae_bench, in_place, quiet, seeded, wrap
from sae_lib.evaluation.saebench.letter_words import BATCH, EPOCHS, LEARNING_RATE

JUMP = 0.03
"""By how much one more latent must raise a sparse probe's F1 to count as split (SAEBench's default)."""
MOST_ROWS = 200
"""Test rows of a parent that are scored, at most: SAEBench goes through them one by one."""
COLUMNS = ("feature", "kept", "reason", "probe_f1", "true_positives", "full_absorption", "full_absorption_with_child",
           "absorption_fraction", "split_latents", "f1_by_k")


class Material(NamedTuple):
    """What an evaluation needs of a world alone; half of the held-out rows train probes, the others test."""

    x: Tensor
    """(N, D) activations, training rows first."""
    train: int
    """Rows that probes are trained on."""
    parents: list[int]
    """The P features that have children."""
    on: Tensor
    """(N, P) bool: the parent fires."""
    with_child: Tensor
    """(N, P) bool: and so does a child of it."""
    weight: Tensor
    """(P, D) of the parents' probes on activations."""
    score: Tensor
    """(N - train, P) of the probes on test rows; above 0 says that the parent fires."""
    f1: list[float]
    """Of each probe on test rows."""


def prepare(x: Tensor, truth: Truth, seed: int = 0) -> Material:
    """Probes of every parent by SAEBench's logistic regression, on ``x`` (N, D), the truth's rows."""
    import_sae_bench()
    from sae_bench.evals.absorption import probing
    from sklearn.metrics import f1_score

    parents = truth.parent[truth.parent >= 0].unique().tolist()
    on = truth.features[:, parents] > 0
    child = torch.stack([(truth.features[:, truth.parent == parent] > 0).any(1) for parent in parents], 1)
    half = len(x) // 2
    with seeded(seed), in_place(probing, tqdm=quiet()):
        probe = probing.train_multi_probe(x[:half], on[:half].float(), batch_size=BATCH, num_epochs=EPOCHS,
                                          lr=LEARNING_RATE, weight_decay=1e-4, show_progress=False,
                                          device=torch.device("cpu"))
    with torch.no_grad():
        score = probe(x[half:])
    f1 = [float(f1_score(on[half:, place], score[:, place] > 0)) for place in range(len(parents))]
    return Material(x, half, parents, on, on & child, probe.weights.detach().clone(), score, f1)


def absorption(sae, material: Material, seed: int = 0, preset: str = "default") -> tuple[dict, pd.DataFrame]:
    """SAEBench's figures of ``sae`` (a SparseAutoencoder for raw activations), and a row per parent.

    ``full_absorption`` is of the test rows where the parent fires and its probe says so, as SAEBench counts;
    ``full_absorption_with_child`` of those among them where a child fires too. Means are over the parents kept: those
    with a probe of F1 above PROBE_F1 and true positives. They are None, with a note, where no parent is kept or no
    latent predicts any of them, which would look like a perfect score.
    """
    wrapped = wrap(sae, PLANTED, HOOK, device=torch.device("cpu"), dtype=torch.float32, context=1)
    rows = []
    with seeded(seed), contextlib.ExitStack() as stack:
        for place, probed in enumerate(_sparse(wrapped, material, preset, stack)):
            rows.append(_of_parent(wrapped, material, place, *probed))
    table = pd.DataFrame(rows, columns=COLUMNS)
    kept = table[table.kept]
    note = None
    if kept.empty:
        note = "no parent has a probe that is good enough"
    elif not any(scores[0] for scores in kept.f1_by_k):
        note = "no latent predicts any parent, so that an absorption of 0 is no score"
    names = ("full_absorption", "full_absorption_with_child", "absorption_fraction")
    means = {name: None if note else float(kept[name].mean()) for name in names}
    return means | {"parents_kept": len(kept), "note": note}, table


def _sparse(wrapped, material: Material, preset: str, stack: contextlib.ExitStack) -> list[tuple[list[float], list]]:
    """F1 on test rows by number of latents, and the split latents, of each parent."""
    from sae_bench.evals.absorption import k_sparse_probing, probing
    from sklearn.metrics import f1_score

    for module in (k_sparse_probing, probing):
        stack.enter_context(in_place(module, tqdm=quiet()))
    asked, half, count = PRESETS[preset], material.train, len(material.parents)
    with torch.no_grad():
        train, test = (k_sparse_probing._get_sae_acts(wrapped, part) for part in
                       material.x.split([half, len(material.x) - half]))
    joint = k_sparse_probing.train_sparse_multi_probe(
        train, material.on[:half].float(), device=torch.device("cpu"), num_epochs=asked.epochs, show_progress=False,
        batch_size=sparse_batch(half, half, preset))
    ks, found = range(1, asked.max_k + 1), []
    for place in range(count):
        one = probing.LinearProbe(train.shape[1], 2)
        one.fc.weight.data = torch.stack([torch.zeros(train.shape[1]), joint.weights[place].detach()])
        labels = [("", int(on)) for on in material.on[:half, place]]
        with in_place(k_sparse_probing, train_sparse_multi_probe=lambda *_, one=one, **__: one,
                      _get_sae_acts=lambda *_, **__: train):
            probes = {k: by_label[1] for k, by_label in k_sparse_probing.train_k_sparse_probes(
                wrapped, labels, train, ks, precalc_sae_acts=True).items()}
        f1 = [float(f1_score(material.on[half:, place], probes[k](test) > 0)) for k in ks]
        table = pd.DataFrame([{"letter": place} | {f"f1_sparse_sae_{k}": f1[k - 1] for k in ks} | {
            f"sparse_sae_k_{k}_feats": probes[k].feature_ids.numpy() for k in ks}])
        with in_place(k_sparse_probing, LETTERS=[place]):
            k_sparse_probing.add_feature_splits_to_metrics_df(table, asked.max_k, JUMP)
        found.append((f1, [int(latent) for latent in table.split_feats[0]]))
    return found


def _of_parent(wrapped, material: Material, place: int, f1: list[float], split: list[int]) -> dict:
    """The row of one parent: SAEBench's score of each test row where it fires and its probe knows it."""
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    half, row = material.train, {"feature": material.parents[place], "probe_f1": material.f1[place], "f1_by_k": f1,
                                 "split_latents": split, "kept": False, "reason": ""}
    known = (material.on[half:, place] & (material.score[:, place] > 0)).nonzero()[:, 0][:MOST_ROWS] + half
    if material.f1[place] <= PROBE_F1 or not len(known):
        return row | {"reason": f"probe F1 {material.f1[place]:.2f}, above {PROBE_F1} is needed"
                      if len(known) else "no true positives of the probe"}

    def run_with_cache(prompts, names_filter):
        return None, {names_filter[0]: material.x[[int(prompt) for prompt in prompts]][:, None]}

    model = SimpleNamespace(to_tokens=lambda prompt: torch.zeros(1, 1), run_with_cache=run_with_cache)
    calculator = FeatureAbsorptionCalculator(model, [], base_template="{word}", answer_formatter=str, word_token_pos=0,
                                             batch_size=len(known))
    words = calculator.calculate_absorption(wrapped, [str(int(number)) for number in known], material.weight[place],
                                            split, 0, show_progress=False).word_results
    full = pd.Series([word.is_full_absorption for word in words], dtype=float)
    child = pd.Series(material.with_child[known, place].numpy())
    return row | {"kept": True, "true_positives": len(words), "full_absorption": full.mean(),
                  "full_absorption_with_child": full[child].mean(),
                  "absorption_fraction": float(sum(word.absorption_fraction for word in words) / len(words))}
