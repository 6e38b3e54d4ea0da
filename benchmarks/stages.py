"""Where a study's wall time went, stage by stage, read from its executed notebooks.

    python benchmarks/stages.py quickstart

Start-up is from papermill's start to the first cell; imports is what the first two cells take; figures are the cells
that show one; the rest is the stage's work. Runs of a study share the cores and overlap in time.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import nbformat
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sae_lib import runs, studies
from sae_lib.params import activations_name, check


def times(path: Path) -> dict[str, float]:
    """Seconds of one executed notebook, by kind."""
    notebook = nbformat.read(path, as_version=4)
    said, found = notebook.metadata.papermill, {"whole": notebook.metadata.papermill.duration, "imports": 0.0,
                                                "figures": 0.0, "work": 0.0}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and "papermill" in cell.metadata]
    for number, cell in enumerate(cells):
        kind = "imports" if number < 4 and "import" in cell.source or "params.read" in cell.source else \
            "figures" if "show.figure" in cell.source else "work"
        found[kind] += cell.metadata.papermill.duration or 0.0
    first = min(datetime.fromisoformat(cell.metadata.papermill.start_time) for cell in cells)
    found["start-up"] = (first - datetime.fromisoformat(said.start_time)).total_seconds()
    found["begin"], found["end"] = said.start_time, said.end_time
    return found


def main(study: str) -> None:
    """Print the table as Markdown."""
    members = studies.expand(study)
    paths = {f"extract, {name}": runs.home() / "activations" / f"{name}.01_extract.ipynb" for name in dict.fromkeys(
        activations_name(check("extract", member.params, member.origin)) for member in members)}
    for member in members:
        for stage in ("02_train_variant", "03_eval", "04_letter_absorption"):
            paths[f"{stage}, {member.name}"] = runs.folder_of(member.name) / f"notebooks/{stage}.ipynb"
    paths["05_compare"] = runs.home() / "runs" / study / "compare/05_compare.ipynb"
    table = pd.DataFrame({name: times(path) for name, path in paths.items() if path.exists()}).T
    whole = (datetime.fromisoformat(table.end.max()) - datetime.fromisoformat(table.begin.min())).total_seconds()
    print(table[["whole", "start-up", "imports", "work", "figures"]].astype(float).round(1).to_markdown())
    print(f"\nfrom the first notebook's start to the last one's end: {whole / 60:.1f} min")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
