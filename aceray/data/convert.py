"""Real particles to shards of a dataset: what is done is planned once, then every shard is a function of the plan.

The particles are permuted once, for the whole set, so that any part of it is a random sample. A shard reads each of its
images from the image's own place in the stacks: one pass over the input, and a shard is the same bytes whoever makes
it, in whatever order.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.images import Field, Normalise, brightness, common_field, prepared
from aceray.data.location import Location
from aceray.data.manifest import ImageLayout
from aceray.data.particle_table import Findings, ParticleTable
from aceray.data.particles import IDENTITY_UNITS
from aceray.data.source import Source, refused_by_header, subset_rows
from aceray.data.stacks import StackFile, read_images
from aceray.data.storage import sha256_of_file
from aceray.data.writer import ROWS_PER_GROUP, WrittenShard, write_shard
from aceray.em.random import named_generator
from aceray.errors import DataError

Half = Literal["random", "rlnRandomSubset"]

# Changes of the images that a recipe gives make older sets of the same recipe different ones.
_METHOD = 1
_BYTES_AT_ONCE = 32 * 2**20  # raw images that are read and transformed together
_SAMPLE = 256
_SAMPLE_BYTES = 64 * 2**20
_DARK = -3.0  # standard errors


@dataclass(frozen=True)
class Treatment:
    """What is done to the images, and how they are stored; see `aceray.preparation.Preparation`."""

    box: int | None = None
    invert: bool = False
    normalise: Normalise = "background"
    image_dtype: str = "float16"
    half: Half = "random"
    subset: str | None = None
    keep_poses: bool = False
    seed: int = 1
    shard_mib: int = 128


@dataclass(frozen=True)
class Conversion:
    """What all shards share. `table` is in the order of the dataset, refused rows left out as far as they are known.

    `group` is the index of each particle's box and pixel size in `field.crop_px`.
    """

    treatment: Treatment
    table: ParticleTable
    stacks: tuple[StackFile | None, ...]
    field: Field
    group: Int[np.ndarray, "n"]
    half_set: Int[np.ndarray, "n"]
    refused: tuple[tuple[int, str], ...]  # source row, reason
    sha256: str

    @property
    def layout(self) -> ImageLayout:
        """What the images have in common."""
        ctf = self.table.ctf is not None
        return ImageLayout(self.field.box, self.field.pixel_size_angstrom, ctf, self.treatment.image_dtype)

    @property
    def shards(self) -> list[range]:
        """Places of each shard's particles in `table`."""
        rows = self.treatment.shard_mib * 2**20 // self.layout.image_bytes // ROWS_PER_GROUP * ROWS_PER_GROUP
        rows = max(ROWS_PER_GROUP, rows)
        return [range(start, min(start + rows, len(self.table))) for start in range(0, len(self.table), rows)]


@dataclass(frozen=True)
class ConvertedShard:
    """A shard on disk: its first particle's number, and the source rows that were refused, with the reason."""

    written: WrittenShard
    first_id: int
    refused: tuple[tuple[int, str], ...]


def plan_conversion(source: Source, treatment: Treatment, findings: Findings) -> Conversion:
    """Choose the rows, their common field of view and their order.

    What is wrong goes to `findings`. Raises DataError where nothing can be converted at all: no particles, no common
    field of view, unknown half sets.
    """
    table = source.table
    rows = subset_rows(treatment.subset, len(table), treatment.seed)
    lost = refused_by_header(source)
    refused = tuple((int(table.source_row[row]), lost[row]) for row in np.intersect1d(rows, list(lost)).astype(int))
    there = np.array([stack is not None for stack in source.stacks])[table.stack]
    usable = np.setdiff1d(rows, np.array(list(lost), dtype=np.int64))
    usable = usable[there[usable] & np.isfinite(table.pixel_size_angstrom[usable])]
    if len(usable) == 0:
        findings.raise_errors()
        raise DataError(f"{source.files.path}: no image can be read; check the stacks.")
    order = torch.randperm(len(usable), generator=named_generator("prepare/order", treatment.seed)).numpy()
    chosen = table.take(usable[order])
    box = np.array([0 if stack is None else stack.box for stack in source.stacks])[chosen.stack]
    kinds, group = np.unique(np.stack([box, chosen.pixel_size_angstrom.round(6)], axis=1), axis=0, return_inverse=True)
    field = common_field([(int(side), float(size)) for side, size in kinds], treatment.box)
    half = _half_sets(source, chosen, treatment.half)
    if treatment.keep_poses and chosen.pose is None:
        findings.errors.append(f"{source.files.path}: has no poses to keep; leave out --poses, or give a file of them.")
    digest = _digest(source, treatment, chosen)
    if not treatment.keep_poses:
        chosen = chosen.replace(pose=None)
    return Conversion(treatment, chosen, source.stacks, field, group.ravel(), half, refused, digest)


def _half_sets(source: Source, table: ParticleTable, half: Half) -> Int[np.ndarray, "n"]:
    if half == "random":
        return 1 + np.arange(len(table)) % 2  # of permuted particles
    if table.half_set is None or not np.isin(table.half_set, (1, 2)).all():
        raise DataError(
            f"{source.files.path}: has no rlnRandomSubset (cryoSPARC: alignments3D/split) of 1 and 2 for every "
            "particle; give --half random."
        )
    return table.half_set


def _digest(source: Source, treatment: Treatment, chosen: ParticleTable) -> str:
    """Of everything the dataset depends on: settings, the input's files, sizes of the stacks, rows and their order."""
    files = source.files
    named = (files.path, *files.passthrough, *(path for path in (files.ctf, files.poses) if path is not None))
    stacks = [None if stack is None else (str(stack.path), stack.path.stat().st_size) for stack in source.stacks]
    listed = [path for path in named if path.suffix in (".star", ".cs", ".txt", ".pkl")]
    contents = [sha256_of_file(path) for path in listed]
    text = json.dumps([_METHOD, dataclasses.asdict(treatment), files.pixel_size_angstrom, contents, stacks])
    return hashlib.sha256(text.encode() + chosen.source_row.tobytes()).hexdigest()


def convert_shard(plan: Conversion, shard: int, first_id: int, folder: Location) -> ConvertedShard:
    """Read, treat and write the images of one shard; particles are numbered from `first_id` on.

    Images that are not finite or constant are left out and named. Raises DataError when a stack or the disk fails.
    """
    places = np.array(plan.shards[shard])
    images = torch.empty(len(places), plan.field.box, plan.field.box)
    reasons = [""] * len(places)
    for rows, treated, why in treated_images(plan, places):
        images[rows] = treated
        for row, reason in zip(rows, why, strict=True):
            reasons[row] = reason
    good = np.flatnonzero([not reason for reason in reasons])
    if len(good) == 0:
        raise DataError(f"{plan.table.label(int(places[0]))}: {reasons[0]}, and so with the {len(places)} next images.")
    if len(good) < len(places):
        images = images[torch.from_numpy(good)]
    written = write_shard(folder, shard, plan.layout, images, _columns(plan, places[good], first_id))
    row_of = plan.table.source_row[places]
    refused = tuple((int(row_of[row]), reason) for row, reason in enumerate(reasons) if reason)
    return ConvertedShard(written, first_id, refused)


def treated_images(plan: Conversion, places: Int[np.ndarray, "n"]) -> Iterator[tuple[np.ndarray, Tensor, list[str]]]:
    """Images of those places of the plan's table, some at a time: rows of `places`, treated images, why refused."""
    stack_of, index_of, group_of = (column[places] for column in (plan.table.stack, plan.table.stack_index, plan.group))
    for number, group in np.unique(np.stack([stack_of, group_of], axis=1), axis=0).tolist():
        stack = plan.stacks[number]
        assert stack is not None
        rows = np.flatnonzero((stack_of == number) & (group_of == group))
        rows = rows[np.argsort(index_of[rows], kind="stable")]  # forward through the file
        size = max(1, _BYTES_AT_ONCE // (4 * stack.box**2))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            raw = torch.from_numpy(read_images(stack, index_of[part]))
            treated, reasons = prepared(
                raw,
                plan.field.crop_px[group],
                plan.field.box,
                invert=plan.treatment.invert,
                normalise=plan.treatment.normalise,
            )
            yield part, treated, reasons


def _columns(plan: Conversion, places: Int[np.ndarray, "n"], first_id: int) -> dict[str, np.ndarray]:
    table = plan.table
    columns: dict[str, np.ndarray] = {
        "particle_id": np.arange(first_id, first_id + len(places)),
        "half_set": plan.half_set[places].astype(np.int8),
        "stack_name": np.array(table.stack_names, dtype=object)[table.stack[places]],
        "stack_index": table.stack_index[places],
        "source_row": table.source_row[places],
    }
    assert set(IDENTITY_UNITS) <= set(columns)
    if table.ctf is not None:
        columns |= {name: values[places].astype(np.float32) for name, values in table.ctf.items()}
    if table.pose is not None:
        columns |= {f"true_{name}": values[places] for name, values in table.pose.items()}
    return columns


@dataclass(frozen=True)
class Sample:
    """A few images of the set before the work begins, as they will be stored, and how bright their centres are."""

    images: Float[Tensor, "n b b"]
    refused: int
    brightness: float
    brightness_error: float


def take_sample(plan: Conversion, findings: Findings, path: object) -> Sample:
    """Read and treat up to 256 images (any part of the permuted set is random) and check that protein is bright."""
    # a packed stack cannot be read in the middle
    packed = np.array([stack is not None and stack.compression is not None for stack in plan.stacks])[plan.table.stack]
    places = np.flatnonzero(~packed)[: max(1, min(_SAMPLE, _SAMPLE_BYTES // (4 * plan.field.box**2)))]
    count = len(places)
    stored = torch.empty(count, plan.field.box, plan.field.box)
    good = torch.ones(count, dtype=torch.bool)
    for rows, treated, reasons in treated_images(plan, places):
        stored[rows] = treated
        good[rows] = torch.tensor([not reason for reason in reasons])
    refused = int((~good).sum())
    kept = stored[good]
    if refused:
        findings.warnings.append(f"{path}: {refused} of {count} images looked at will be refused (see refused.csv).")
    bright, error = brightness(kept) if len(kept) else (0.0, float("inf"))
    if bright < _DARK * error:
        findings.warnings.append(
            f"{path}: the particles look dark ({bright:.3f} +- {error:.3f} of the background's deviation); protein "
            f"must be bright: {'leave out' if plan.treatment.invert else 'give'} --invert."
        )
    return Sample(kept, refused, bright, error)
