"""What a worker's particles need in memory and what there is: whether they are held or streamed."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from aceray.build import final_box, lane_count, training_box
from aceray.config import Config
from aceray.data.particles import ROWS_PER_GROUP, ParticleSet, ParticleStack, RowGroup
from aceray.data.stream import StreamedImages
from aceray.em.fourier import HalfDisc
from aceray.errors import ConfigError

_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")
_PIXEL_BYTES, _COEFFICIENT_BYTES = 4, 8


def bytes_in_memory(particles: int, box: int) -> int:
    """Memory of so many particles of a box that are not streamed: their images and their half-disc coefficients."""
    return particles * (_PIXEL_BYTES * box**2 + _COEFFICIENT_BYTES * len(HalfDisc(box)))


def bytes_held(stack: ParticleStack) -> int:
    """What a stack takes of data.memory_gib for good: nothing where it is streamed."""
    count, box = stack.images.shape[:2]
    return 0 if isinstance(stack.images, StreamedImages) else bytes_in_memory(count, box)


def fits(
    config: Config, particles: ParticleSet, groups: Sequence[RowGroup], box: int, device: str, held: int = 0
) -> bool:
    """Whether a worker holds the particles of these row groups in memory; `held` bytes are taken already.

    Without data.memory_gib it does, whatever they need. A refinement at a larger box than that of the training keeps
    half of the bound for itself.

    Raises:
        ConfigError: there is no bound, and clearly not as much memory as they need.
    """
    stored, count = particles.manifest.box, _count(particles, groups)
    need, later = bytes_in_memory(count, box), final_box(config, stored)
    if config.data.memory_gib is None:
        if box == training_box(config, stored) < later:
            need += bytes_in_memory(count, later)
        _check_available(need, count, later)
        return True
    return need <= room(config, held) // (1 if box == later else 2) and _fits_device(count, box, device)


def room(config: Config, held: int = 0) -> int:
    """Bytes that a worker may hold of its images beside those that it holds already."""
    assert config.data.memory_gib is not None
    return int(config.data.memory_gib * _GIB) - held


def check_bound(config: Config, particles: ParticleSet, groups: Sequence[RowGroup], device: str = "cpu") -> None:
    """Refuse a bound in which a worker, that of these row groups, can neither hold nor stream its images.

    Raises:
        ConfigError: it does not hold two row groups of each of the worker's lanes at the box of the training.
    """
    if config.data.memory_gib is None:
        return
    box, lanes = training_box(config, particles.manifest.box), lane_count(config) // max(1, config.resources.workers)
    least = 2 * lanes * ROWS_PER_GROUP * _PIXEL_BYTES * box**2
    if room(config) < least and not fits(config, particles, groups, box, device):
        raise ConfigError(
            f"data.memory_gib: {config.data.memory_gib:g} GiB do not hold two row groups ({ROWS_PER_GROUP} images of "
            f"{box} px) for each of a worker's {lanes} lanes; give it at least {least / _GIB + 5e-5:.4f}"
        )


def bounded(config: Config, particles: ParticleSet) -> Config:
    """Settings for all particles in this one process: with half of its memory as the bound if they clearly do not fit.

    For what is the same whether images are held or streamed, as the evaluation of a run that many workers trained.
    """
    try:
        fits(config, particles, particles.row_groups(), training_box(config, particles.manifest.box), "cpu")
    except ConfigError:
        data = config.data.model_copy(update={"memory_gib": available_bytes() / 2 / _GIB})
        return config.model_copy(update={"data": data})
    return config


def available_bytes() -> int:
    """Memory that processes can still have: what the system has, and no more than any control group of ours leaves."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What the control groups (version 2) of this process leave below their limits; file cache counts as free."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = _CGROUPS / own.removeprefix("0::").strip("/")
    return [left for each in (group, *group.parents) if (left := _left_in(each)) is not None]


def _left_in(group: Path) -> int | None:
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - int(used) + int(statistics.get("inactive_file", 0))


def _check_available(need: int, count: int, box: int) -> None:
    there = available_bytes()
    if need > there:
        raise ConfigError(
            f"data.memory_gib: null holds all images in memory, {need / _GIB:.1f} GiB for {count} particles of {box} "
            f"px, and {there / _GIB:.1f} GiB are available; set data.memory_gib={max(there / 2 / _GIB, 0.1):.1f} to "
            "stream them, or use a smaller box (data.box, refine.box) or more workers"
        )


def _fits_device(count: int, box: int, device: str) -> bool:
    """Whether the coefficients fit a GPU; those of a stream are made there from images in the main memory."""
    if not device.startswith("cuda"):
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return _COEFFICIENT_BYTES * count * len(HalfDisc(box)) <= free // 2


def _count(particles: ParticleSet, groups: Sequence[RowGroup]) -> int:
    """Particles in the row groups; of a half set about half of them."""
    shards = particles.manifest.shards
    rows = [min(ROWS_PER_GROUP, shards[each.shard].particles - ROWS_PER_GROUP * each.group) for each in groups]
    return sum(rows) if particles.half_set is None else -(-sum(rows) // 2)
