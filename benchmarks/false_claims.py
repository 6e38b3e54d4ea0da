"""How often 05 would call equal variants different; and whether it tells a trained SAE from a random one.

    python benchmarks/false_claims.py --pairs 100       # on a planted world: 600 trainings of about 1 s
    python benchmarks/false_claims.py --embedded        # on SmolLM2: three pairs, and random SAEs; some 40 min

A pair is one variant trained with three seeds, and again with three others; no run is in two pairs. The nominal rate of
one metric is 5 %; that of any metric is what a reader of a whole table meets. On the embedded default 03's core and
sparse probing measure each run, and as many random SAEs of the same shape stand against the trained ones. With --home a
later call goes on where this one ended.
Written: benchmarks/results/false_claims-cpu.json, or false_claims_embedded-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from planted_truth import trained

# Features that fire often: rows on which none does are all alike, so that L0 would move in leaps, over the 10 % within
# which runs compare.
WORLD = {"d_in": 32, "features": 64, "rows": 50_000, "heldout": 4000, "parents": 4, "children": 4, "highest": 0.3,
         "lowest": 0.06}
VARIANT = {"architecture": "topk", "d_sae": 96, "k": 4, "samples": 150_000}
EMBEDDED = {"model": "smollm2", "architecture": "topk", "d_sae": 2048, "k": 32, "samples": 400_000, "mode": "batch"}
EVALUATED = {"evals": ["core", "sparse_probing"], "eval_preset": "default", "mode": "batch", "nulls": []}
TOLD_APART = ("explained_variance", "ce_loss_score", "sae_top_1_test_accuracy", "sae_top_5_test_accuracy")
METRICS = ("explained_variance", "mse", "l0", "dead_share", "unused_share", "mean_cos2", "norm_ratio", "mcc",
           "recovered")


def runs_of(number: int, seeds: int, store, truth, threads: int) -> pd.DataFrame:
    """Two times ``seeds`` trainings of the variant as a table of 05's, MCC and recovery beside it, as one pair."""
    from sae_lib.evaluation import false_claims, results
    from sae_lib.evaluation import truth as truths

    names, found = [], {}
    for place in range(2 * seeds):
        seed = 2 * seeds * number + place
        names.append(f"pairs/p{number}-s{seed}")
        result, _ = trained(VARIANT | {"run": names[-1], "seed": seed}, store, threads)
        found[names[-1]] = truths.measure(result.sae, store.heldout().x, truth)[0]
    table = results.collect(names)
    table = table.assign(**{key: [found[name][key] for name in names] for key in ("mcc", "recovered")})
    return false_claims.pair(table, names[:seeds], names[seeds:])


def embedded_runs(folder: str, changes: dict, seeds: list[int], threads: int) -> list[str]:
    """Runs of EMBEDDED with ``changes``, each trained (or begun) and evaluated where it is not yet; their names."""
    from sae_lib import params, runs
    from sae_lib.data.activations import extract, source
    from sae_lib.evaluation import evaluate, validity
    from sae_lib.training import trainer

    names = []
    for seed in seeds:
        names.append(f"{folder}/s{seed}")
        run = runs.Run(names[-1])
        if all(run.json(f"evals/{name}.json", {}).get("metrics") for name in EVALUATED["evals"]):
            continue
        p = params.check("train", EMBEDDED | changes | {"run": names[-1], "seed": seed, "threads": threads,
                                                        "overwrite": True})
        extract(params.check("extract", {key: value for key, value in EMBEDDED.items() if key in
                                         params.STAGES["extract"].model_fields}))
        run = runs.start(p)
        trainer.train(p, source(p), run)
        validity.update(run)
        evaluate.evaluate(params.check("eval", EVALUATED | {"run": names[-1], "threads": threads}))
        print(f"{names[-1]}: {run.json('validity.json')['status']}", flush=True)
    return names


def embedded(pairs: int, seeds: int, threads: int) -> dict:
    """False claims over pairs on SmolLM2, and what is said of random SAEs beside the trained ones."""
    from sae_lib.evaluation import false_claims, results

    tables = []
    for number in range(pairs):
        names = embedded_runs(f"pair{number}", {}, [2 * seeds * number + place for place in range(2 * seeds)], threads)
        tables.append(false_claims.pair(results.collect(names), names[:seeds], names[seeds:]))
    rates = false_claims.rate(tables)
    trained = [name for table in tables for name in table.run]
    random = embedded_runs("random", {"samples": 0, "initial_encoder": "random", "role": "null"},
                           list(range(1000, 1000 + len(trained))), threads)
    # A null baseline is kept out of every comparison by its role and its samples: here it is let in.
    table = results.collect([*trained, *random]).assign(status="valid", role="normal", samples=EMBEDDED["samples"])
    told = results.differences(false_claims.pair(table, trained, random), "first", TOLD_APART)
    print(rates.to_string(index=False), told.to_string(index=False), sep="\n")
    return {"variant": EMBEDDED, "evaluated": EVALUATED, "seeds": seeds, "pairs": pairs,
            "rates": rates.to_dict("records"), "random_against_trained": told.to_dict("records"),
            "runs": pd.concat(tables)[["run", "status", *TOLD_APART, "l0"]].to_dict("records")}


def planted_worlds(pairs: int, seeds: int, threads: int) -> dict:
    """False claims over pairs on the planted world WORLD."""
    from sae_lib.data import planted
    from sae_lib.evaluation import false_claims

    store, truth = planted.open_world(planted.World(**WORLD))
    tables = []
    for number in range(pairs):
        tables.append(runs_of(number, seeds, store, truth, threads))
        print(f"pair {number + 1} of {pairs}", flush=True)
    found = false_claims.rate(tables, METRICS)
    print(found.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    return {"world": WORLD, "variant": VARIANT, "seeds": seeds, "pairs": pairs, "nominal": 0.05,
            "invalid_runs": int(sum((table.status != "valid").sum() for table in tables)),
            "not_counted": pairs - int(found.pairs.max()) if len(found) else pairs, "rates": found.to_dict("records")}


def main() -> None:
    """Train, compare, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=None, help="100, or 3 with --embedded")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each of the two, at least 3")
    parser.add_argument("--embedded", action="store_true", help="on SmolLM2 instead of a planted world")
    parser.add_argument("--threads", type=int, default=None, help="1, or all with --embedded")
    parser.add_argument("--home", default=None, help="folder for runs and activations; a temporary one if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    from sae_lib import runs

    with tempfile.TemporaryDirectory() as home:
        os.environ["SAE_WORKBOOK_HOME"] = asked.home or home
        if asked.embedded:
            found = embedded(asked.pairs or 3, asked.seeds, asked.threads or 0)
        else:
            torch.set_num_threads(asked.threads or 1)
            found = planted_worlds(asked.pairs or 100, asked.seeds, asked.threads or 1)
    name = f"false_claims{'_embedded' * asked.embedded}-cpu"
    runs.write_json(asked.out / f"{name}.json", found | {"provenance": runs.provenance()})


if __name__ == "__main__":
    main()
