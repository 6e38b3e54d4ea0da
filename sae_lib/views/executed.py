"""Executed notebooks of a batch: figures that were HTML when their cell ran become pictures once those are drawn.

Notebooks of one study so share one browser, and none waits for it. A notebook that was not filled in, as something was
killed or drew nothing, holds its figures as HTML, to be moved.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
from pathlib import Path
from typing import Any

from sae_lib import params, runs, studies
from sae_lib.views import pictures

TAG = "workbook"
"""Key of an output's metadata: ``figure``, its HTML file under the home, and ``width``; or ``script``, plotly.js."""


def of_figure(file: Path, width: int) -> dict[str, Any]:
    """Metadata of an output that shows a figure as HTML."""
    return {TAG: {"figure": Path(os.path.relpath(file, runs.home())).as_posix(), "width": width}}


def fill_in(notebook: Path) -> int:
    """Put pictures in the place of a notebook's HTML figures, as far as they are drawn; how many."""
    import nbformat

    held, filled = nbformat.read(notebook, as_version=4), 0
    outputs = [output for cell in held.cells for output in cell.get("outputs", [])]
    for output in outputs:
        about = output.get("metadata", {}).get(TAG, {})
        if "figure" not in about:
            continue
        picture = (runs.home() / about["figure"]).with_suffix(".png")
        if picture.exists():
            output.data = {"image/png": base64.b64encode(pictures.small(picture)).decode(), "text/plain": "a picture"}
            output.metadata = {"image/png": {"width": about["width"]}}
            filled += 1
    if not filled:
        return 0
    if not any("figure" in output.get("metadata", {}).get(TAG, {}) for output in outputs):  # none needs plotly.js
        for cell in held.cells:
            if cell.get("outputs"):
                cell.outputs = [output for output in cell.outputs
                                if "script" not in output.get("metadata", {}).get(TAG, {})]
    with runs.whole(notebook) as temporary:
        nbformat.write(held, temporary)
    return filled


def draw(name: str) -> int:
    """Draw what lacks pictures of a study (its stores too) or a run, and fill in its executed notebooks."""
    folder, began = runs.folder_of(name), time.monotonic()
    if not folder.is_dir():
        raise runs.RunError(f"{folder}: not there; run `snakemake --config study={name}` first")
    stores = _stores(name)
    files = [*sorted(folder.glob("**/figures/*.html")), *(file for store in stores for file in
                                                          sorted(store.glob("figures/*.html")))]
    asked = pictures.undrawn(files)
    print(f"{name}: {len(files)} figures, {len(asked)} to draw", flush=True)
    pictures.say(pictures.draw(asked))
    books = [*folder.glob("**/*.ipynb"), *(store.with_name(f"{store.name}.01_extract.ipynb") for store in stores)]
    filled = sum(_filled(book) for book in books if book.exists())
    print(f"{len(asked) - len(pictures.undrawn(asked))} drawn, {filled} put into executed notebooks, "
          f"{time.monotonic() - began:.0f} s", flush=True)
    return 0


def _filled(notebook: Path) -> int:
    try:
        return fill_in(notebook)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # no reason to leave the others
        print(f"{notebook}: not filled in ({type(error).__name__}: {error})", flush=True)
        return 0


def _stores(study: str) -> list[Path]:
    """Folders of the stores that a study's runs read; none for what is no study."""
    with contextlib.suppress(params.ParameterError):
        asked = [params.check("extract", member.params, member.origin) for member in studies.expand(study)]
        return [runs.home() / "activations" / name for name in dict.fromkeys(map(params.activations_name, asked))]
    return []
