"""Tables of the page about what was extracted: counts and examples, from a manifest."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sae_lib.data.manifest import check_described

LABELS = {"blocks": "blocks", "text_tokens": "tokens in blocks, without BOS", "bos_dropped": "BOS dropped",
          "special_dropped": "special tokens dropped", "outliers_dropped": "outliers dropped", "rows": "rows kept"}


def counts(manifest: dict[str, Any]) -> pd.DataFrame:
    """What was read, dropped and kept, a column per split."""
    columns = {"training": manifest["counts"]["train"], "held out": manifest["counts"]["heldout"]}
    rows = {label: [column[name] for column in columns.values()] for name, label in LABELS.items()}
    for source in manifest["shares"]:
        rows |= {f"tokens of {source}": [column["tokens"].get(source, 0) for column in columns.values()],
                 f"documents of {source}": [column["documents"].get(source, 0) for column in columns.values()]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).rename_axis("count").reset_index()


def facts(manifest: dict[str, Any]) -> pd.DataFrame:
    """Model, place, sizes and speed, as name and value. Raises RunError for a manifest that the page cannot show."""
    check_described(manifest)
    model, speed = manifest["model"], manifest.get("tokens_per_second")
    rows = {"model": model["identity"], "architecture": f"{model['architecture']}, {model['n_layers']} layers",
            "hook": manifest["hook"], "width d_in": str(manifest["d_in"]), "dtype": manifest["dtype"],
            "median norm": f"{manifest['median_norm']:.1f}", "root mean square norm": f"{manifest['rms_norm']:.1f}",
            "scale": f"{manifest['scale']:.5f} (times x: mean squared norm = d_in)",
            "tokens per second": f"{speed:,.0f}" if speed else "streamed", "content": manifest["content_hash"]}
    return pd.DataFrame({"fact": rows.keys(), "value": rows.values()})


def examples(manifest: dict[str, Any]) -> pd.DataFrame:
    """A few blocks as text, with their sources."""
    return pd.DataFrame([{"block": e["block"], "sources": ", ".join(e["sources"]), "text": e["text"]}
                         for e in manifest["examples"]])
