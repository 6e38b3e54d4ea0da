"""What reading a store needs of its manifest.json, typed: damage is one error that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sae_lib.runs import RunError

FORMAT = 1


class Shard(BaseModel):
    """A file of rows, in the folder itself."""

    model_config = ConfigDict(strict=True)

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    rows: int = Field(ge=0)
    sha256: str


class Shards(BaseModel):
    """Both splits."""

    train: list[Shard]
    heldout: list[Shard]


class Inputs(BaseModel):
    """What was asked for; more is kept."""

    model_config = ConfigDict(strict=True)

    model: str
    hook: str


class Identity(BaseModel):
    """The model that was read; more is kept."""

    identity: str


class Told(BaseModel):
    """What reading a store needs of its manifest; more is kept there for the page."""

    model_config = ConfigDict(strict=True)

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


def told_by(manifest: Any, file: Path) -> Told:
    """A manifest's content, checked. Raises RunError naming ``file`` and the key that is missing or wrong."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{file}: not a store of format {FORMAT}; delete the folder and run 01_extract again")
    try:
        return Told.model_validate(manifest)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise RunError(f"{file}: damaged ({key}: {fault['msg']}); delete the folder and run 01_extract again") from None
