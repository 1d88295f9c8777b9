"""Particle datasets: a folder of Parquet shards and a manifest, read by row groups and never trusted blindly."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.location import Location, location
from aceray.data.manifest import ImageLayout, Manifest, Shard, StoredFile
from aceray.data.mrc import read_volume
from aceray.data.storage import sha256_of_file, storage_error
from aceray.data.stream import Portion, ReadParts, StreamedImages
from aceray.em.ctf import CtfParameters
from aceray.em.fourier import crop_images
from aceray.em.rotation import rotation_from_relion
from aceray.errors import DataError

CTF_UNITS = {
    "defocus_u_angstrom": "angstrom, underfocus positive",
    "defocus_v_angstrom": "angstrom, underfocus positive",
    "astigmatism_deg": "degree, from x towards y to the direction of defocus u",
    "phase_shift_deg": "degree",
    "voltage_kv": "kilovolt",
    "spherical_aberration_mm": "millimetre",
    "amplitude_contrast": "fraction",
}
TRUTH_UNITS = {
    "true_rot_deg": "degree, RELION ZYZ",
    "true_tilt_deg": "degree, RELION ZYZ",
    "true_psi_deg": "degree, RELION ZYZ",
    "true_origin_x_angstrom": "angstrom, minus the content's shift along x",
    "true_origin_y_angstrom": "angstrom, minus the content's shift along y",
}
# only in sets of real particles: how their own program knows them
IDENTITY_UNITS = {
    "stack_name": "stack as the input names it",
    "stack_index": "position in the stack, from 0",
    "source_row": "row of the input, from 0",
}
_IDENTITY_TYPES = (pa.string(), pa.int64(), pa.int64())
OBSERVED_COLUMNS = ("image", "particle_id", "half_set", *CTF_UNITS)
TRUTH_COLUMNS = tuple(TRUTH_UNITS)

ROWS_PER_GROUP = 256  # of a shard's row groups, but for its last one

_CHUNK = 1024  # images decoded and cropped at a time


def particle_schema(layout: ImageLayout) -> pa.Schema:
    """Arrow schema of a shard; the metadata of each column names its unit, that of the image its shape and type."""
    image = {
        "shape": f"[{layout.box}, {layout.box}]",
        "axes": "y, x",
        "dtype": layout.image_dtype,
        "byte_order": "little",
    }
    fields = [
        pa.field("image", pa.binary(layout.image_bytes), nullable=False, metadata=image),
        pa.field("particle_id", pa.int64(), nullable=False, metadata={"unit": "position in the dataset, from 0"}),
        pa.field("half_set", pa.int8(), nullable=False, metadata={"unit": "1 or 2"}),
        *(pa.field(name, pa.float32(), metadata={"unit": unit}) for name, unit in CTF_UNITS.items()),
        *(pa.field(name, pa.float64(), metadata={"unit": unit}) for name, unit in TRUTH_UNITS.items()),
    ]
    return pa.schema(fields, metadata={"pixel_size_angstrom": repr(layout.pixel_size_angstrom)})


def with_identity(schema: pa.Schema) -> pa.Schema:
    """The schema of a shard of real particles: with the columns of IDENTITY_UNITS."""
    for (name, unit), kind in zip(IDENTITY_UNITS.items(), _IDENTITY_TYPES, strict=True):
        schema = schema.append(pa.field(name, kind, nullable=False, metadata={"unit": unit}))
    return schema


@dataclass(frozen=True)
class RowGroup:
    """The smallest part of a dataset that is read: row group `group` of shard `shard`."""

    shard: int
    group: int


@dataclass(frozen=True)
class ParticleStack:
    """Images, in memory or streamed, with what the microscope is known to have done, and nothing of their poses."""

    images: Float[Tensor, "n d d"] | StreamedImages
    ctf: CtfParameters | None
    particle_id: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.particle_id)

    def take(self, index: Tensor) -> "ParticleStack":
        """A selection of the particles."""
        ctf = None if self.ctf is None else self.ctf.take(index)
        return ParticleStack(self.images[index], ctf, self.particle_id[index])

    @staticmethod
    def concatenate(parts: "Sequence[ParticleStack]") -> "ParticleStack":
        """Several stacks in memory in one; all of them with a CTF, or none."""
        ctf = [part.ctf for part in parts if part.ctf is not None]
        if ctf and len(ctf) != len(parts):
            raise ValueError("stacks with and without a CTF cannot be joined")
        images = torch.cat([part.images for part in parts])
        identifiers = torch.cat([part.particle_id for part in parts])
        return ParticleStack(images, CtfParameters.concatenate(ctf) if ctf else None, identifiers)


@dataclass(frozen=True)
class Truth:
    """The poses a simulation used: rotations, and shifts in pixels of the stored box."""

    rotation: Float[Tensor, "n 3 3"]
    shift_px: Float[Tensor, "n 2"]
    particle_id: Int[Tensor, "n"]


@dataclass(frozen=True)
class ParticleSet:
    """A dataset on disk, or one of its half sets: then the other half is never read. Open with `open_particles`.

    The manifest and the row groups are those of the whole set.
    """

    path: Location
    manifest: Manifest
    half_set: int | None = None

    def row_groups(self) -> list[RowGroup]:
        """All row groups in the order of their particles."""
        shards = enumerate(self.manifest.shards)
        return [RowGroup(index, group) for index, shard in shards for group in range(shard.row_groups)]

    def read(self, groups: Sequence[RowGroup], columns: Sequence[str] = OBSERVED_COLUMNS) -> pa.Table:
        """Rows of the row groups (those of the half set, if this is one), in their order; page checksums are verified.

        The columns default to what a method may see; TRUTH_COLUMNS are read only when named.
        Raises DataError naming the file when a shard is missing, damaged or not of this dataset.
        """
        tables = []
        for shard, members in groupby(groups, key=lambda member: member.shard):
            table = self._read_shard(shard, [member.group for member in members], list({*columns, "half_set"}))
            if self.half_set is not None:
                table = table.filter(pc.equal(table["half_set"], pa.scalar(self.half_set, pa.int8())))
            tables.append(table.select(list(columns)))
        empty = self._schema.empty_table().select(list(columns))
        return pa.concat_tables([empty, *tables])

    def _read_shard(self, index: int, groups: list[int], columns: list[str]) -> pa.Table:
        shard = self.manifest.shards[index]
        path = self.path / shard.file
        try:
            with pq.ParquetFile(_parquet(path), page_checksum_verification=True) as file:
                self._check_schema(file, shard, path)
                table = file.read_row_groups(groups, columns=columns, use_threads=False)
        except FileNotFoundError as error:
            raise DataError(f"{path}: the shard is missing; restore it or make the dataset again.") from error
        except (OSError, pa.ArrowException, EOFError) as error:
            raise DataError(f"{path}: the shard is damaged ({error}); restore it or make the dataset again.") from error
        # the schema of our own version, so that tables of all shards can be joined
        return table.cast(pa.schema([self._schema.field(name) for name in columns]))

    def group_of_particle(self) -> Int[Tensor, " n"]:
        """Which of `row_groups()` each particle of the whole set is in, by its number."""
        found, before = [], 0
        for shard in self.manifest.shards:
            found.append(before + torch.arange(shard.particles) // ROWS_PER_GROUP)
            before += shard.row_groups
        return torch.cat(found)

    @property
    def _schema(self) -> pa.Schema:
        return with_identity(particle_schema(self.manifest.layout))

    def _check_schema(self, file: pq.ParquetFile, shard: Shard, path: Location) -> None:
        expected = particle_schema(self.manifest.layout)
        found = file.schema_arrow
        rows, groups = file.metadata.num_rows, file.metadata.num_row_groups
        if (rows, groups) != (shard.particles, shard.row_groups):
            raise DataError(
                f"{path}: holds {rows} particles in {groups} row groups, the manifest says {shard.particles} in "
                f"{shard.row_groups}; the file is not of this dataset."
            )
        for field in expected:
            position = found.get_field_index(field.name)
            if field.name in TRUTH_COLUMNS and position < 0:
                continue
            if position < 0 or found.field(position).type != field.type:
                raise DataError(f"{path}: column {field.name} is missing or not {field.type}; the file is not ours.")

    def read_truth(self) -> Truth | None:
        """True poses of all particles (of this half set), or None when any is unknown. For evaluation alone."""
        table = self._truth_table()
        if table is None or any(table[name].null_count for name in TRUTH_COLUMNS):
            return None
        values = {name: torch.from_numpy(table[name].to_numpy()) for name in (*TRUTH_COLUMNS, "particle_id")}
        rotation = rotation_from_relion(values["true_rot_deg"], values["true_tilt_deg"], values["true_psi_deg"])
        origin = torch.stack([values["true_origin_x_angstrom"], values["true_origin_y_angstrom"]], dim=-1)
        shift_px = -origin / self.manifest.pixel_size_angstrom
        return Truth(rotation.float(), shift_px.float(), values["particle_id"])

    def _truth_table(self) -> pa.Table | None:
        for shard in self.manifest.shards:
            path = self.path / shard.file
            try:
                names = pq.read_schema(_parquet(path)).names
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: the shard cannot be read ({error}); make the dataset again.") from error
            if not set(TRUTH_COLUMNS) <= set(names):
                return None
        return self.read(self.row_groups(), ["particle_id", *TRUTH_COLUMNS])

    def read_truth_volume(self) -> Float[Tensor, "d d d"] | None:
        """The volume the images were projected from, or None. Raises DataError when its digest is wrong."""
        stored = self.manifest.truth_volume
        if stored is None:
            return None
        self._check_digest(stored)
        return read_volume(self.path / stored.file)[0]

    def verify(self) -> None:
        """Read every file whole and compare its SHA-256 with the manifest's. Raises DataError naming the file."""
        truth = self.manifest.truth_volume
        for stored in (*self.manifest.shards, *((truth,) if truth else ())):
            self._check_digest(stored)

    def _check_digest(self, stored: StoredFile) -> None:
        if sha256_of_file(self.path / stored.file) != stored.sha256:
            raise DataError(
                f"{self.path / stored.file}: is damaged (its SHA-256 is not the manifest's); restore it or make the "
                "dataset again."
            )


def open_particles(path: Location | str, half_set: int | None = None) -> ParticleSet:
    """Open a dataset or one of its half sets (1 or 2): its manifest is checked, and that every file has its size.

    Raises DataError when the folder is missing, foreign, of a newer version, or lacks a file.
    """
    folder = location(path).expanduser().absolute()
    manifest = Manifest.read(folder)
    sizes = {} if isinstance(folder, Path) else folder.sizes()  # all at once, instead of a question for each shard
    truth = manifest.truth_volume
    for stored in (*manifest.shards, *((truth,) if truth else ())):
        file = folder / stored.file
        try:
            size = sizes[stored.file] if stored.file in sizes else file.stat().st_size
        except FileNotFoundError as error:
            raise DataError(f"{file}: is missing; restore it or make the dataset again.") from error
        except OSError as error:
            raise storage_error(file, error, "read") from error
        if size != stored.bytes:
            raise DataError(
                f"{file}: has {size} bytes, the manifest says {stored.bytes}; restore it or make the dataset again."
            )
    return ParticleSet(folder, manifest, half_set)


def _parquet(path: Location) -> Any:
    """What pyarrow reads: a local path, or a file that is open for reading."""
    return path if isinstance(path, Path) else path.open_input()


def stack_from_table(table: pa.Table, manifest: Manifest, box: int) -> ParticleStack:
    """Decode rows to float32 images, Fourier-cropped to `box`, with their CTF parameters.

    Raises DataError when `box` is larger than the stored box, or a row holds no finite image or lacks a CTF value.
    """
    if box > manifest.box:
        raise DataError(
            f"data.box: {box} px is larger than the stored images ({manifest.box} px); choose a smaller one."
        )
    identifiers = torch.from_numpy(np.array(table["particle_id"].to_numpy()))
    images = torch.empty(len(table), box, box)
    for start in range(0, len(table), _CHUNK):
        images[start : start + _CHUNK] = crop_images(_decode(table["image"].slice(start, _CHUNK), manifest.layout), box)
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        first = int(identifiers[~finite][0])
        raise DataError(
            f"particle {first}: its image holds values that are not finite numbers; make the dataset again."
        )
    return ParticleStack(images, _ctf_parameters(table) if manifest.ctf else None, identifiers)


def parts_here(particles: ParticleSet, groups: Sequence[RowGroup], box: int) -> ReadParts:
    """How row groups are read in this process, one after the other."""

    def read(parts: Sequence[int]) -> Iterator[Portion]:
        for part in parts:
            stack = stack_from_table(particles.read([groups[part]]), particles.manifest, box)
            assert isinstance(stack.images, Tensor)
            yield stack.particle_id, stack.images

    return read


ReadGroups = Callable[[ParticleSet, Sequence[RowGroup], int], ReadParts]
"""How row groups are read at a box, in the order they are asked for: `parts_here`, or by other processes."""


def streamed_stack(
    particles: ParticleSet, groups: Sequence[RowGroup], box: int, most_bytes: int, read: ReadGroups = parts_here
) -> ParticleStack:
    """The particles of row groups, of whose images at most `most_bytes` are held at a time; all else is in memory.

    Raises:
        DataError: a shard is missing or damaged, or no particle is of the half set.
    """
    table = particles.read(sorted(groups, key=dataclasses.astuple), ["particle_id", *CTF_UNITS])
    number = torch.from_numpy(np.array(table["particle_id"].to_numpy()))
    if not len(number):
        raise DataError("data.half_set: no particle that was to be read is in that half set; set it to null")
    found, counts = particles.group_of_particle()[number].unique_consecutive(return_counts=True)
    every = particles.row_groups()
    reader = read(particles, [every[group] for group in found.tolist()], box)
    images = StreamedImages(number, counts.tolist(), box, reader, most_bytes)
    return ParticleStack(images, _ctf_parameters(table) if particles.manifest.ctf else None, number)


def _decode(column: pa.ChunkedArray, layout: ImageLayout) -> Float[Tensor, "n d d"]:
    parts = []
    for chunk in column.chunks:
        if not len(chunk):
            continue
        start, stop = chunk.offset * layout.image_bytes, (chunk.offset + len(chunk)) * layout.image_bytes
        pixels = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)[start:stop].view(
            f"<f{layout.image_bytes // layout.box**2}"
        )
        parts.append(pixels.reshape(-1, layout.box, layout.box).astype(np.float32))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, layout.box, layout.box)


def _ctf_parameters(table: pa.Table) -> CtfParameters:
    for name in CTF_UNITS:
        if table[name].null_count:
            raise DataError(f"column {name}: a particle has no value, though the manifest says the set has CTFs.")
    return CtfParameters(**{name: torch.from_numpy(np.array(table[name].to_numpy())) for name in CTF_UNITS})
