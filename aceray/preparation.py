"""What `aceray prepare` and `aceray predict` may be told; their command lines have one option for each field."""

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from aceray.errors import ConfigError
from aceray.schema import Model


class InputParts(Model):
    """Where the parts of an input are that its own file does not say."""

    datadir: str | None = Field(None, description="folder that holds the stacks, if they are not where the input says")
    pixel_size: float | None = Field(None, gt=0, le=1000, description="angstrom; overrules the input's")
    passthrough: tuple[str, ...] = Field((), description="further .cs files with columns of the same particles")
    ctf: str | None = Field(None, description="cryoDRGN's ctf.pkl, for stacks without a metadata file")
    workers: int = Field(0, ge=0, le=4096, description="Ray tasks at once; 0: in this process, without Ray")
    address: str | None = Field(None, description="of a running Ray cluster; else a local one")


class Preparation(InputParts):
    """How the particles of other programs become a dataset."""

    box: int | None = Field(None, ge=8, le=2048, description="Fourier-crop to this box, pixels; else as they are")
    subset: str | None = Field(None, description="so many at random, FIRST:LAST, or a file of rows from 0")
    invert: bool = Field(False, description="protein is dark in the images: turn their sign")
    half: Literal["random", "rlnRandomSubset"] = Field("random", description="half sets: drawn, or the input's own")
    strict: bool = Field(False, description="any image that would be refused is an error")
    normalise: Literal["background", "none"] = Field(
        "background", description="mean 0, deviation 1 outside the circle of the box; none: as they are"
    )
    poses: str | None = Field(
        None, description="reference poses for evaluation alone: `input`, those of the input, or cryoDRGN's pose.pkl"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored pixels")
    seed: int = Field(1, ge=0, description="of the order, the subset and random half sets")
    shard_mib: int = Field(128, ge=1, le=4096, description="size of a shard; a task needs 0.5 GiB and 8 shards")


class Prediction(InputParts):
    """How poses are assigned to new particles."""

    refine: bool | None = Field(
        None, description="refine the encoder's poses against the run's map; else as the run itself did"
    )
    eightfold: bool | None = Field(
        None,
        description="keep the best pose of an image's eight turns and mirrors, and their spread; else unless refined",
    )


Options = TypeVar("Options", bound=InputParts)


def preparation(**options: Any) -> Preparation:
    """Validated options. Raises ConfigError, one line, for an unknown one or a value out of range."""
    return _validated(Preparation, options)


def prediction(**options: Any) -> Prediction:
    """Validated options. Raises ConfigError, one line, for an unknown one or a value out of range."""
    return _validated(Prediction, options)


def _validated(kind: type[Options], options: dict[str, Any]) -> Options:
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}; found {first['input']!r}") from error
