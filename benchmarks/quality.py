"""How good a TopK SAE is after equal data: the workbook beside the libraries that train them, each by its own settings.

    python benchmarks/quality.py                        # three seeds of each, 1 M samples: half an hour on two cores
    python benchmarks/quality.py --samples 200000 --seeds 42

All are given one store, the same batches in the same order, the same width and k. The store is the embedded default's,
extracted if it is not there. Explained variance on its held-out rows, letter recovery (recovery.py), the share of
latents that no held-out row activates, and the seconds of the training are measured by the same code for all.
Written: benchmarks/results/quality-cpu.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import peers
import recovery
import torch
from scipy import stats

from sae_lib import metrics, params, runs
from sae_lib.data import activations
from sae_lib.data.language_model import import_transformers
from sae_lib.evaluation import contrasts
from sae_lib.training.trainer import Trainer

MEASURED = {"explained_variance": ".4f", "letter_recovery": ".3f", "unused_share": ".2%", "seconds": ".0f"}
OURS = "workbook"


def own(p: params.Train, store) -> peers.Trained:
    """The workbook's training, by its defaults."""
    trainer = Trainer(p, store)
    trainer.fit()
    sae = trainer.sae.folded(store.scale)
    return peers.Trained(sae.encode, sae.decode, {"optimiser": "Adam", "lr": trainer.lr,
                                                  "warmup_steps": p.warmup, "lr_decay": p.lr_decay,
                                                  "aux_dead_after": p.aux_dead_after})


def task(p: params.Train, store) -> peers.Task:
    """What the peers are given: the batches that the workbook's training reads."""
    batches = store.batches(p.batch_size, p.samples, order=p.order, seed=p.seed)
    norms = next(iter(store.batches(4096, 4096, seed=p.seed))).x.norm(dim=1)
    return peers.Task((batch.x for batch in batches), store.d_in, p.d_sae, p.k, p.batch_size, p.samples // p.batch_size,
                      p.seed, float(norms.square().mean()), float(norms.mean()))


@torch.no_grad()
def measured(trained: peers.Trained, x: torch.Tensor, words) -> dict[str, float]:
    """Of held-out activations ``x`` (N, D) and of the letters' words."""
    fired, parts = False, []
    for part in x.split(2048):
        latents = trained.encode(part)
        fired = fired | (latents > 0).any(0)
        parts.append(trained.decode(latents))
    return {"explained_variance": metrics.explained_variance(x, torch.cat(parts)),
            "letter_recovery": recovery.letter_recovery(trained.encode, words),
            "unused_share": float((~fired).double().mean())}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds by library, half the width of its 95 % interval, and the difference from the workbook."""
    rows, seeds = [], table.seed.nunique()
    for name in MEASURED:
        fitted = contrasts.fit(table[name], table.library, table.seed)
        for library, of in table.groupby("library", sort=False):
            reach = stats.t.ppf(0.975, seeds - 1) * of[name].std() / seeds ** 0.5 if seeds > 1 else float("nan")
            than = fitted.contrast(OURS, library) if library != OURS else {}
            rows.append({"measure": name, "library": library, "mean": of[name].mean(), "reach": reach,
                         "workbook_less_this": than.get("difference"), "low": than.get("low"),
                         "high": than.get("high")})
    return pd.DataFrame(rows)


def as_table(summed: pd.DataFrame) -> str:
    """One row per library, for a page."""
    rows = {}
    for one in summed.itertuples():
        form = MEASURED[one.measure]
        rows.setdefault(one.library, {})[one.measure] = f"{one.mean:{form}} ± {one.reach:{form}}"
    return pd.DataFrame(rows).T.to_markdown()


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--layer", type=int, help="of the model; the embedded default's where none is named")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality-cpu.json")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    import_transformers()
    peers.install()
    folder = runs.project() / "params"
    values = params.load_yaml(folder / "models/smollm2.yaml") | params.load_yaml(folder / "variants/topk.yaml") | {
        "samples": asked.samples, "threads": asked.threads, "device": "cpu", "coactivation_window": 0, "mode": "batch",
        "run": "quality", **({} if asked.layer is None else {"layer": asked.layer})}
    store = activations.extract(params.check("extract", values))
    words = recovery.material(params.check("train", values), store)
    x, rows = store.heldout().x, []
    for seed in asked.seeds:
        p = params.check("train", values | {"seed": seed})
        for library in (OURS, *peers.TRAINED):
            began = time.perf_counter()
            trained = own(p, store) if library == OURS else peers.TRAINED[library](task(p, store))
            seconds = time.perf_counter() - began
            rows.append({"library": library, "seed": seed, **measured(trained, x, words), "seconds": seconds,
                         "settings": trained.settings})
            print(rows[-1], flush=True)
    summed = summary(pd.DataFrame(rows))
    print(as_table(summed))
    runs.write_json(asked.out, {
        "store": store.name, "samples": asked.samples, "d_sae": p.d_sae, "k": p.k, "batch_size": p.batch_size,
        "heldout": len(x), "words": len(words.words), "threads": torch.get_num_threads(), "runs": rows,
        "summary": summed.astype(object).where(summed.notna(), None).to_dict("records"),
        "provenance": runs.provenance()})


if __name__ == "__main__":
    main()
