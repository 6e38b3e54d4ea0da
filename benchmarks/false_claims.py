"""How often 05 would call equal variants different, on a planted world.

    python benchmarks/false_claims.py --pairs 100       # 600 trainings of about 2 s
    python benchmarks/false_claims.py --pairs 4

A pair is one variant trained with three seeds, and again with three others; no run is in two pairs. The nominal rate of
one metric is 5 %; that of any metric is what a reader of a whole table meets. Written: benchmarks/results/
false_claims-cpu.json.
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


def main() -> None:
    """Train, compare, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each of the two, at least 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from sae_lib import runs
    from sae_lib.data import planted
    from sae_lib.evaluation import false_claims

    tables = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["SAE_WORKBOOK_HOME"] = home
        store, truth = planted.open_world(planted.World(**WORLD))
        for number in range(asked.pairs):
            tables.append(runs_of(number, asked.seeds, store, truth, asked.threads))
            print(f"pair {number + 1} of {asked.pairs}", flush=True)
    found = false_claims.rate(tables, METRICS)
    print(found.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    runs.write_json(asked.out / "false_claims-cpu.json", {
        "world": WORLD, "variant": VARIANT, "seeds": asked.seeds, "pairs": asked.pairs, "nominal": 0.05,
        "invalid_runs": int(sum((table.status != "valid").sum() for table in tables)),
        "not_counted": asked.pairs - int(found.pairs.max()) if len(found) else asked.pairs,
        "rates": found.to_dict("records"), "provenance": runs.provenance()})


if __name__ == "__main__":
    main()
