"""What `aceray prepare` may be told about an input of real particles; its command line has one option for each."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from aceray.config import Model
from aceray.errors import ConfigError


class Preparation(Model):
    """How the particles of other programs become a dataset."""

    box: int | None = Field(None, ge=8, le=2048, description="Fourier-crop to this box, pixels; else as they are")
    datadir: str | None = Field(None, description="folder that holds the stacks, if they are not where the input says")
    subset: str | None = Field(None, description="so many at random, FIRST:LAST, or a file of rows from 0")
    invert: bool = Field(False, description="protein is dark in the images: turn their sign")
    half: Literal["random", "rlnRandomSubset"] = Field("random", description="half sets: drawn, or the input's own")
    strict: bool = Field(False, description="any image that would be refused is an error")
    normalise: Literal["background", "none"] = Field(
        "background", description="mean 0, deviation 1 outside the circle of the box; none: as they are"
    )
    pixel_size: float | None = Field(None, gt=0, le=1000, description="angstrom; overrules the input's")
    passthrough: tuple[str, ...] = Field((), description="further .cs files with columns of the same particles")
    ctf: str | None = Field(None, description="cryoDRGN's ctf.pkl, for stacks without a metadata file")
    poses: str | None = Field(
        None, description="reference poses for evaluation alone: `input`, those of the input, or cryoDRGN's pose.pkl"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored pixels")
    seed: int = Field(1, ge=0, description="of the order, the subset and random half sets")
    shard_mib: int = Field(128, ge=1, le=4096, description="size of a shard; a task needs 0.5 GiB and 8 shards")
    workers: int = Field(0, ge=0, le=4096, description="Ray tasks at once; 0: in this process, without Ray")
    address: str | None = Field(None, description="of a running Ray cluster; else a local one")


def preparation(**options: Any) -> Preparation:
    """Validated options. Raises ConfigError, one line, for an unknown one or a value out of range."""
    try:
        return Preparation(**options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}; found {first['input']!r}") from error
