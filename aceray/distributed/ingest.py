"""Particles from the shards on disk into the memory of the worker that trains on them, in this process or by Ray Data.

Both ways read the same row groups with the same functions and give the same stack, ordered by particle, or the same
parts of a stream.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aceray.data.location import Location
from aceray.data.particles import (
    ParticleSet,
    ParticleStack,
    ReadGroups,
    RowGroup,
    open_particles,
    parts_here,
    stack_from_table,
)
from aceray.data.stream import Portion, ReadParts
from aceray.em.ctf import CtfParameters
from aceray.errors import DataError

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# One task decodes about so much: long enough to outweigh its start, short enough to spread over many cores.
BYTES_A_TASK = 64 * 2**20
# A plan of Ray Data takes about a second to begin: fewer tasks' worth of a stream is read in this process meanwhile.
_TASKS_WORTH_A_PLAN = 4
# Reading tasks live in the share of the cores that workers leave free (cluster.SHARE_OF_TASKS).
CPUS_A_TASK = 0.05
CTF_COLUMNS = tuple(field.name for field in dataclasses.fields(CtfParameters))


def read_here(particles: ParticleSet, groups: list[RowGroup], box: int) -> ParticleStack:
    """Read the row groups in this process, Fourier-cropped to `box`.

    Raises:
        DataError: a shard is missing or damaged.
    """
    return ordered(
        stack_from_table(particles.read(part), particles.manifest, box) for part in tasks(particles, groups, box)
    )


def plan_reading(particles: ParticleSet, groups: list[RowGroup], box: int, tasks_at_once: int) -> "Dataset":
    """A Ray data set, not executed yet, whose tasks read, verify, decode and crop the row groups of one worker."""
    import ray

    from aceray.distributed.cluster import prepare_ray_data

    prepare_ray_data(in_order=True)  # a stream takes its parts as they were asked for
    portions = [{"groups": [dataclasses.astuple(group) for group in part]} for part in tasks(particles, groups, box)]
    # from_items places the plan in the object store; reading a data source would need a task with a whole core.
    planned = ray.data.from_items(portions, override_num_blocks=len(portions))
    return planned.map_batches(
        read_portion,  # pyright: ignore[reportArgumentType]
        fn_args=(particles.path, particles.half_set, box),
        batch_size=1,
        num_cpus=CPUS_A_TASK,
        compute=ray.data.TaskPoolStrategy(size=tasks_at_once),
    )


def parts_by_ray_data(tasks_at_once: int) -> ReadGroups:
    """How a worker on Ray streams: windows by the tasks of Ray Data, a few row groups in this process."""

    def reader(particles: ParticleSet, groups: Sequence[RowGroup], box: int) -> ReadParts:
        here = parts_here(particles, groups, box)

        def read(parts: Sequence[int]) -> Iterator[Portion]:
            wanted = [groups[part] for part in parts]
            if sum(1 for _ in tasks(particles, wanted, box)) < _TASKS_WORTH_A_PLAN:
                yield from here(parts)
                return
            for stack in _stacks(plan_reading(particles, wanted, box, tasks_at_once).iterator()):
                assert isinstance(stack.images, torch.Tensor)
                yield stack.particle_id, stack.images

        return read

    return reader


def read_portion(portion: dict[str, Any], path: Location, half_set: int | None, box: int) -> dict[str, np.ndarray]:
    """What one task does: the columns of some row groups, decoded and cropped."""
    particles = open_particles(path, half_set)
    groups = [RowGroup(int(shard), int(group)) for shard, group in portion["groups"][0]]
    return columns_of(stack_from_table(particles.read(groups), particles.manifest, box))


def collect(iterator: "DataIterator") -> ParticleStack:
    """Execute the reading and keep its result in the memory of this worker."""
    return ordered(_stacks(iterator))


def _stacks(iterator: "DataIterator") -> Iterator[ParticleStack]:
    batches: Any = iterator.iter_batches(batch_size=None, batch_format="numpy")  # pyright: ignore[reportArgumentType]
    return (_stack(batch) for batch in batches)


def ordered(stacks: Iterable[ParticleStack]) -> ParticleStack:
    """One stack in the order of the particles, however the parts arrived; DataError when they hold none."""
    parts = [stack for stack in stacks if len(stack)]
    if not parts:
        raise DataError("data.half_set: no particle that was to be read is in that half set; set it to null")
    stack = ParticleStack.concatenate(parts)
    order = torch.argsort(stack.particle_id)
    return stack if bool((order[1:] > order[:-1]).all()) else stack.take(order)


def tasks(particles: ParticleSet, groups: list[RowGroup], box: int) -> Iterator[list[RowGroup]]:
    """The row groups in portions of about BYTES_A_TASK of decoded images, stored or cropped, whichever is larger."""
    bytes_a_group = 256 * max(box, particles.manifest.box) ** 2 * 4
    size = max(1, BYTES_A_TASK // bytes_a_group)
    for start in range(0, len(groups), size):
        yield groups[start : start + size]


def columns_of(stack: ParticleStack) -> dict[str, np.ndarray]:
    """A stack as arrays under the names of their columns, which Ray can share; the memory is the stack's own."""
    columns = {"particle_id": stack.particle_id.numpy(), "image": stack.images.numpy()}
    if stack.ctf is not None:
        columns |= {name: getattr(stack.ctf, name).numpy() for name in CTF_COLUMNS}
    return columns


def shared_stack(columns: dict[str, np.ndarray]) -> ParticleStack:
    """A stack in the memory of the arrays, which belongs to others too: to be read, never written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
    ctf = CtfParameters(**{name: tensors[name] for name in CTF_COLUMNS}) if CTF_COLUMNS[0] in tensors else None
    return ParticleStack(images=tensors["image"], ctf=ctf, particle_id=tensors["particle_id"])


def _stack(columns: dict[str, np.ndarray]) -> ParticleStack:
    # A batch is a read-only view of Ray's shared memory: copied, so that the memory is freed.
    return shared_stack({name: np.array(values) for name, values in columns.items()})
