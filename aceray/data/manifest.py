"""The manifest of a particle dataset: what the images are, and the digest of every file."""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aceray.data.location import Location
from aceray.data.storage import storage_error, written_atomically
from aceray.errors import DataError

FORMAT = "aceray-particles"
VERSION = 1
MANIFEST_NAME = "manifest.json"
IMAGE_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class ImageLayout:
    """What all images of a dataset have in common."""

    box: int
    pixel_size_angstrom: float
    ctf: bool
    image_dtype: str

    @property
    def image_bytes(self) -> int:
        return self.box * self.box * IMAGE_BYTES[self.image_dtype]


@dataclass(frozen=True)
class StoredFile:
    """A file beside the manifest."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(StoredFile):
    """A Parquet file of the dataset."""

    particles: int
    row_groups: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a dataset that is not a row of it. `noise_std` is measured from the images as written."""

    particles: int
    box: int
    pixel_size_angstrom: float
    noise_std: float
    ctf: bool
    image_dtype: str
    shards: tuple[Shard, ...]
    source: dict[str, Any]
    truth_volume: StoredFile | None

    @property
    def layout(self) -> ImageLayout:
        """The part that says how to decode an image."""
        return ImageLayout(self.box, self.pixel_size_angstrom, self.ctf, self.image_dtype)

    @property
    def sha256(self) -> str:
        """Digest of the particles: of the digests of the shards in their order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, folder: Location) -> None:
        """Write manifest.json into a folder. Raises DataError when that fails."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        with written_atomically(folder / MANIFEST_NAME) as temporary:
            temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Location) -> "Manifest":
        """Read and check manifest.json.

        Raises DataError when the folder or the file is missing, is no manifest of aceray, is of a newer version, or
        lacks a field.
        """
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            missing = f"{folder}: there is no such folder" if isinstance(folder, Path) else folder.missing()
            raise DataError(f"{missing}; make a dataset with `aceray simulate`.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{folder}: holds no {MANIFEST_NAME}, so it is not a dataset of aceray.") from error
        except OSError as error:
            raise storage_error(path, error, "read") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON ({error}); make the dataset again.") from error
        return Manifest._checked(values, path)

    @staticmethod
    def _checked(values: Any, path: Location) -> "Manifest":
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f'{path}: is not a manifest of aceray (its "format" is not "{FORMAT}").')
        version = _field(values, "version", int, path)
        if version != VERSION:
            raise DataError(f"{path}: is of version {version}, this aceray reads version {VERSION}: upgrade aceray.")
        shards = tuple(_shard(entry, path) for entry in _field(values, "shards", list, path))
        truth = values.get("truth_volume")
        manifest = Manifest(
            particles=_field(values, "particles", int, path),
            box=_field(values, "box", int, path),
            pixel_size_angstrom=_field(values, "pixel_size_angstrom", float, path),
            noise_std=_field(values, "noise_std", float, path),
            ctf=_field(values, "ctf", bool, path),
            image_dtype=_field(values, "image_dtype", str, path),
            shards=shards,
            source=_field(values, "source", dict, path),
            truth_volume=None if truth is None else _stored_file(truth, path),
        )
        return manifest._consistent(path)

    def _consistent(self, path: Location) -> "Manifest":
        wrong = None
        if self.image_dtype not in IMAGE_BYTES:
            wrong = f"image_dtype {self.image_dtype!r} is neither float16 nor float32"
        elif self.box < 1 or not self.pixel_size_angstrom > 0 or not self.noise_std >= 0:
            wrong = f"box {self.box}, pixel size {self.pixel_size_angstrom} A or noise {self.noise_std} is out of range"
        elif sum(shard.particles for shard in self.shards) != self.particles:
            wrong = f"the shards do not add up to {self.particles} particles"
        if wrong:
            raise DataError(f"{path}: {wrong}; make the dataset again.")
        return self


def _field(values: dict[str, Any], name: str, kind: type, path: Location) -> Any:
    value: Any = values.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not good or (kind is float and not math.isfinite(value)):
        raise DataError(f"{path}: field {name} is missing or not of type {kind.__name__}; make the dataset again.")
    return value


def _stored_file(entry: Any, path: Location) -> StoredFile:
    if not isinstance(entry, dict):
        raise DataError(f"{path}: describes a file by {entry!r}; make the dataset again.")
    name = _field(entry, "file", str, path)
    # a manifest may come from anywhere: it must not lead out of its own folder
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise DataError(f"{path}: file name {name!r} is not a plain name in the dataset's folder.")
    return StoredFile(name, _field(entry, "bytes", int, path), _field(entry, "sha256", str, path))


def _shard(entry: Any, path: Location) -> Shard:
    stored = _stored_file(entry, path)
    particles, row_groups = _field(entry, "particles", int, path), _field(entry, "row_groups", int, path)
    return Shard(stored.file, stored.bytes, stored.sha256, particles, row_groups)
