"""Writing particle datasets: into a hidden sibling folder that takes the final name when it is complete."""

import fcntl
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from aceray.data.location import Location, location
from aceray.data.manifest import MANIFEST_NAME, ImageLayout, Manifest, Shard, StoredFile
from aceray.data.mrc import write_volume
from aceray.data.particles import ROWS_PER_GROUP, ParticleSet, open_particles, particle_schema, with_identity
from aceray.data.storage import (
    flush_to_disk,
    hidden_sibling,
    local_copy,
    remove_folder,
    sha256_of_file,
    storage_error,
    written_atomically,
)
from aceray.em.formation import background_std
from aceray.errors import DataError

MAX_SHARD_BYTES = 256 * 2**20
TRUTH_VOLUME_NAME = "truth.mrc"

_OWN_FILE = re.compile(
    r"manifest\.json|truth\.mrc|particles-\d{5,}\.parquet"
    r"|source\.(star|cs|txt)|refused\.csv|report\.md|(particles|power_spectra|defocus|view_directions)\.png"
)


@dataclass(frozen=True)
class WrittenShard:
    """A shard on disk and the noise variance measured on its images."""

    shard: Shard
    background_variance: float


def max_rows_per_shard(layout: ImageLayout) -> int:
    """Images of whole row groups that fit in the largest shard."""
    return max(1, MAX_SHARD_BYTES // layout.image_bytes // ROWS_PER_GROUP) * ROWS_PER_GROUP


def write_shard(
    folder: Location, index: int, layout: ImageLayout, images: Float[Tensor, "n d d"], columns: Mapping[str, np.ndarray]
) -> WrittenShard:
    """Write images and their columns (`particle_id`, `half_set`, CTF, truth; absent ones become null) as one shard.

    Shards of real particles also have the columns of IDENTITY_UNITS.

    Safe to call from several processes with different indices. Raises DataError when the disk refuses, or a pixel is
    not finite in the stored type.
    """
    path = folder / f"particles-{index:05d}.parquet"
    # torch converts to float16 with vector instructions, NumPy one number after the other
    stored = images.float().to(getattr(torch, layout.image_dtype)).contiguous()
    if not torch.isfinite(stored).all():
        largest = float(images.abs().max())
        raise DataError(f"{path}: pixels up to {largest:.3g} do not fit {layout.image_dtype}; rescale or use float32.")
    pixels = stored.numpy().astype(f"<{np.dtype(layout.image_dtype).str[1:]}", copy=False)
    schema = particle_schema(layout)
    if "source_row" in columns:
        schema = with_identity(schema)
    image = pa.FixedSizeBinaryArray.from_buffers(schema.field("image").type, len(pixels), [None, pa.py_buffer(pixels)])
    arrays = [image]
    for field in list(schema)[1:]:
        values = columns.get(field.name)
        arrays.append(pa.nulls(len(pixels), field.type) if values is None else pa.array(values, field.type))
    shard = _write_table(path, pa.Table.from_arrays(arrays, schema=schema))
    # measured on what was stored, rounding included
    measured = background_std(stored.float())
    return WrittenShard(shard, float(measured) ** 2)


def renumber_shard(folder: Location, written: WrittenShard, first_id: int) -> WrittenShard:
    """Write a shard again with its particles numbered from `first_id` on: the bytes `write_shard` would have written.

    Raises DataError when the shard is damaged or the disk refuses.
    """
    path = folder / written.shard.file
    try:
        with local_copy(path) as copy:
            table = pq.read_table(copy, page_checksum_verification=True, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: the shard is damaged ({error}); delete it and repeat the command.") from error
    identifiers = pa.array(np.arange(first_id, first_id + len(table)), pa.int64())
    position = table.schema.get_field_index("particle_id")
    table = table.set_column(position, table.schema.field(position), identifiers)
    return WrittenShard(_write_table(path, table), written.background_variance)


def _write_table(path: Location, table: pa.Table) -> Shard:
    with written_atomically(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=ROWS_PER_GROUP,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
        size, digest = temporary.stat().st_size, sha256_of_file(temporary)
    groups = math.ceil(len(table) / ROWS_PER_GROUP)
    return Shard(path.name, size, digest, len(table), groups)


class ParticleWriter:
    """Context manager that builds a dataset and gives it its name at the end.

    Entering makes a hidden folder beside `path` (`.folder`; shards may be written there by other processes with
    `write_shard` and handed in with `add`). `finish` writes the manifest and renames. Leaving without `finish`, for
    whatever reason, removes the hidden folder and leaves what was at `path` as it was.

    Object stores rename nothing: there `folder` is `path` itself, the manifest is written last, and without it there is
    no dataset. One that is overwritten is gone from the beginning; leaving without `finish` deletes what was written.

    existing="error": `path` must be absent or empty. existing="overwrite": a dataset of aceray at `path` is replaced;
    a folder that holds anything else is refused. Raises DataError in these cases and when the disk refuses.
    """

    def __init__(
        self, path: Location | str, layout: ImageLayout, existing: Literal["error", "overwrite"] = "error"
    ) -> None:
        self.path = location(path).expanduser().resolve()
        self.layout = layout
        self.existing: Literal["error", "overwrite"] = existing
        self.folder = hidden_sibling(self.path) if isinstance(self.path, Path) else self.path
        self._written: dict[int, WrittenShard] = {}
        self._truth: StoredFile | None = None
        self._finished = False

    def __enter__(self) -> "ParticleWriter":
        check_replaceable(self.path, self.existing)
        try:
            _make_room(self.path, self.folder)
        except OSError as error:
            raise storage_error(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # a remote folder is the dataset itself, once it is finished
        if isinstance(self.folder, Path) or not self._finished:
            remove_folder(self.folder)

    def write(self, images: Float[Tensor, "n d d"], columns: Mapping[str, np.ndarray]) -> None:
        """Append a shard."""
        index = len(self._written)
        self.add(index, write_shard(self.folder, index, self.layout, images, columns))

    def add(self, index: int, written: WrittenShard) -> None:
        """Count in a shard that `write_shard` has put into `folder`."""
        self._written[index] = written

    @property
    def shards(self) -> int:
        """Shards so far."""
        return len(self._written)

    def write_truth_volume(self, volume: Float[Tensor, "d d d"]) -> None:
        """Put the volume that the images are projections of beside them."""
        with written_atomically(self.folder / TRUTH_VOLUME_NAME) as path:
            write_volume(path, volume, self.layout.pixel_size_angstrom)
            self._truth = StoredFile(TRUTH_VOLUME_NAME, path.stat().st_size, sha256_of_file(path))

    def finish(self, source: dict[str, Any]) -> ParticleSet:
        """Write the manifest with the measured noise level, give the folder its name, and open it."""
        written = [self._written[index] for index in sorted(self._written)]
        particles = sum(part.shard.particles for part in written)
        variance = sum(part.background_variance * part.shard.particles for part in written) / max(particles, 1)
        manifest = Manifest(
            particles=particles,
            box=self.layout.box,
            pixel_size_angstrom=self.layout.pixel_size_angstrom,
            noise_std=math.sqrt(variance),
            ctf=self.layout.ctf,
            image_dtype=self.layout.image_dtype,
            shards=tuple(part.shard for part in written),
            source=source,
            truth_volume=self._truth,
        )
        manifest.write(self.folder)
        self._finished = True
        try:
            if isinstance(self.path, Path) and isinstance(self.folder, Path):
                flush_to_disk(self.folder)
                self._take_name(self.path, self.folder)
        except OSError as error:
            raise storage_error(self.path, error) from error
        return open_particles(self.path)

    def _take_name(self, path: Path, folder: Path) -> None:
        if self.existing == "error" or not path.exists():
            os.rename(folder, path)
            return
        previous = hidden_sibling(path)
        os.rename(path, previous)
        try:
            os.rename(folder, path)
        except OSError:
            os.rename(previous, path)
            raise
        remove_folder(previous)


class ResumableWriter(ParticleWriter):
    """A ParticleWriter whose unfinished work is found again: `key` says what is being made.

    The shards are in `.NAME.preparing` beside `path`, what is known of them in `work` (`.NAME.preparing.work`), which
    the caller fills. Leaving without `finish` keeps both. Raises DataError on entering when another process is writing
    there, or when the unfinished work has another key; existing="overwrite" throws that away. On an object store the
    shards are at `path`, without a manifest, and nothing keeps a second process out.
    """

    def __init__(
        self, path: Location | str, layout: ImageLayout, key: str, existing: Literal["error", "overwrite"] = "error"
    ) -> None:
        super().__init__(path, layout, existing)
        self.key = key
        self.work: Location = self.path.with_name(f".{self.path.name}.preparing.work")
        if isinstance(self.path, Path):
            self.folder = self.path.with_name(f".{self.path.name}.preparing")
        self._lock: int | None = None

    def __enter__(self) -> "ResumableWriter":
        marker = self.work / "key"
        if isinstance(self.path, Path) or not marker.exists():
            check_replaceable(self.path, self.existing)
        try:
            self._lock_out_others()
        except BlockingIOError as error:
            self._release()
            raise DataError(f"{self.path}: another process is writing this dataset; wait for it.") from error
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            self._take_over()
        except BaseException:
            self._release()
            raise
        return self

    def _lock_out_others(self) -> None:
        if isinstance(self.work, Path):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.work, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _take_over(self) -> None:
        """Keep what is left of the same work, throw other work away or refuse it."""
        marker = self.work / "key"
        began = marker.exists()
        if marker.exists() and marker.read_text() != self.key:
            if self.existing == "error":
                raise DataError(
                    f"{self.folder}: holds an unfinished conversion of other settings or files; repeat the command "
                    "that began it, delete the folder, or --existing overwrite."
                )
            remove_folder(self.folder)
            for left in self.work.iterdir():
                left.unlink()
            began = False
        if isinstance(self.folder, Path):
            self.folder.mkdir(exist_ok=True)
        elif not began:
            remove_folder(self.folder)
        with written_atomically(marker) as temporary:
            temporary.write_text(self.key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finish(self, source: dict[str, Any]) -> ParticleSet:
        """As ParticleWriter.finish; what was known of the work is deleted after the folder has its name."""
        particles = super().finish(source)
        remove_folder(self.work)
        return particles


def _make_room(path: Location, folder: Location) -> None:
    if isinstance(folder, Path):
        path.parent.mkdir(parents=True, exist_ok=True)  # pyright: ignore
        folder.mkdir()
        return
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    remove_folder(path)


def check_replaceable(path: Location, existing: Literal["error", "overwrite"]) -> None:
    """Raise DataError unless a dataset may be written at `path`: it is absent, empty, or a dataset to be replaced."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(path, error) from error
    if not names:
        return
    if existing == "error":
        raise DataError(
            f"{path}: the folder exists and is not empty; choose another one, or --existing keep or overwrite."
        )
    foreign = sorted(name for name in names if not _OWN_FILE.fullmatch(name))
    if foreign or MANIFEST_NAME not in names:
        found = foreign[0] if foreign else "no manifest"
        raise DataError(f"{path}: holds {found}, so it is not just a dataset of aceray and is not overwritten.")
    with suppress(DataError):
        Manifest.read(path)
        return
    raise DataError(f"{path}: its manifest is not one of aceray's; remove the folder yourself or choose another one.")
