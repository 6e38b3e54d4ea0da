"""What reading a store needs of its manifest.json, typed: damage is one error that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sae_lib.runs import RunError

FORMAT = 1


class Part(BaseModel):
    """A part of a manifest: a number is no word, nor a word a number."""

    model_config = ConfigDict(strict=True)


class Shard(Part):
    """A file of rows, in the folder itself."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    rows: int = Field(ge=0)
    sha256: str


class Shards(Part):
    """Both splits."""

    train: list[Shard]
    heldout: list[Shard]


class Inputs(Part):
    """What was asked for; more is kept."""

    model: str
    hook: str


class Identity(Part):
    """The model that was read; more is kept."""

    identity: str


class Told(Part):
    """What reading a store needs of its manifest; more is kept there for the page."""

    shards: Shards
    inputs: Inputs
    model: Identity
    hook: str
    dtype: Literal["float32", "bfloat16", "float16"]
    d_in: int = Field(ge=1)
    scale: float = Field(gt=0, allow_inf_nan=False)
    mean: list[Annotated[float, Field(allow_inf_nan=False)]]
    content_hash: str

    @model_validator(mode="after")
    def _widths_agree(self):
        if len(self.mean) != self.d_in:
            raise ValueError(f"mean has {len(self.mean)} numbers, d_in is {self.d_in}")
        return self


class Split(Part):
    """What was read, dropped and kept of one split; documents and tokens by source."""

    blocks: int
    text_tokens: int
    bos_dropped: int
    special_dropped: int
    outliers_dropped: int
    rows: int
    documents: dict[str, int]
    tokens: dict[str, int]


class Splits(Part):
    """Both splits."""

    train: Split
    heldout: Split


class Histogram(Part):
    """Edges and counts of the norms."""

    edges: list[float] = Field(min_length=2)
    counts: list[int] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_empty(self):
        if len(self.edges) != len(self.counts) + 1 or not any(self.counts) or min(self.counts) < 0:
            raise ValueError("expected one edge more than counts, and a count above 0")
        return self


class Example(Part):
    """A block as text."""

    block: int
    sources: list[str]
    text: str


class Architecture(Identity):
    """The model, for people."""

    architecture: str
    n_layers: int


class Limits(Part):
    """What decides which tokens were dropped."""

    max_norm_ratio: float


class Described(Part):
    """What the page shows of a manifest beside what reading needs."""

    name: str
    model: Architecture
    inputs: Limits
    shares: dict[str, float]
    counts: Splits
    median_norm: float = Field(gt=0, allow_inf_nan=False)
    rms_norm: float = Field(gt=0, allow_inf_nan=False)
    norm_histogram: Histogram
    tokens_per_second: float | None = None
    examples: list[Example]


def check_described(manifest: dict[str, Any]) -> None:
    """Raises RunError naming the store and the key where 01's page could not be drawn of a manifest."""
    _valid(Described, manifest, f"activations/{manifest.get('name')}/manifest.json")


def told_by(manifest: Any, file: Path) -> Told:
    """A manifest's content, checked. Raises RunError naming ``file`` and the key that is missing or wrong."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{file}: not a store of format {FORMAT}; delete the folder and run 01_extract again")
    return _valid(Told, manifest, file)


def _valid(kind: type[Part], manifest: dict[str, Any], file: Path | str):
    """The manifest as ``kind``. Raises RunError naming ``file`` and the first key that is missing or wrong."""
    try:
        return kind.model_validate(manifest)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise RunError(f"{file}: damaged ({key}: {fault['msg']}); delete the folder and run 01_extract again") from None
