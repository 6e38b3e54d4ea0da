"""Extraction beside the bare model cut off at its hook, in one process.

    python benchmarks/extract.py [--model smollm2 --layer 8 --tokens 24000 --rounds 3]

Both read the same blocks with the same precision and batch; the two take turns. Extraction's time is what its shards
took: the model, dropping BOS and outliers, statistics, writing and hashing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sae_lib import params, runs
from sae_lib.data import activations, capture, language_model
from sae_lib.memory import keep_freed_memory


def main() -> None:
    """Measure, print, and write benchmarks/results/extract-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    keep_freed_memory()
    p = params.check("extract", {"model": asked.model, "layer": asked.layer, "tokens": asked.tokens, "mode": "batch"})
    model = language_model.load(p.model, hook=p.hook, dtype=p.dtype, device=p.device)
    p = p.model_copy(update={"dtype": str(model.dtype).removeprefix("torch.")})
    rates = {"bare": [], "extraction": []}
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as home:
            os.environ["SAE_WORKBOOK_HOME"] = home
            store = activations.extract(p)
            rates["extraction"].append(store.manifest["tokens_per_second"])
            blocks = torch.cat([store.train_blocks(), store.heldout_blocks()])
            shutil.rmtree(store.path)
        size, began = capture.blocks_per_batch(model, p.context), time.perf_counter()
        for part in blocks.split(size):
            model.residual(part)
        rates["bare"].append(blocks.numel() * (p.context - 1) / p.context / (time.perf_counter() - began))
    middle = {name: sorted(found)[len(found) // 2] for name, found in rates.items()}
    result = {"model": p.model, "hook": p.hook, "dtype": p.dtype, "tokens_per_second": rates,
              "extraction_of_bare": middle["extraction"] / middle["bare"], "threads": torch.get_num_threads()}
    print(json.dumps(result, indent=1))
    runs.write_json(Path(__file__).parent / "results" / f"extract-{model.device.type}.json",
                    result | {"provenance": runs.provenance()})


if __name__ == "__main__":
    main()
