"""Data sets that the trials of a study share: each is read once and lies in Ray's object store."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from aceray.build import training_box
from aceray.config import Config
from aceray.data.location import location
from aceray.data.particles import ParticleSet, ParticleStack, open_particles
from aceray.distributed.failures import known_error
from aceray.distributed.ingest import columns_of, read_here, shared_stack


class Shelf:
    """Reads each data set at its first call and keeps it for the others; an actor without a core of its own.

    Trials hold their cores while they wait for it, so it must not need one.
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple[str, int | None, int], ray.ObjectRef] = {}

    def fetch(self, path: str, half_set: int | None, box: int) -> list[ray.ObjectRef]:
        """Where the columns of all particles lie: in a list, so that they are not sent along."""
        key = (path, half_set, box)
        if key not in self._stacks:
            particles = open_particles(path, half_set)
            self._stacks[key] = ray.put(columns_of(read_here(particles, particles.row_groups(), box)))
        return [self._stacks[key]]


def open_shelf() -> Any:
    """A shelf for one study; it is started again when its node is lost, and kept until it is killed."""
    return ray.remote(Shelf).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def reader(shelf: Any) -> Callable[[Config], tuple[ParticleSet, ParticleStack]]:
    """How a trial gets its particles: read-only, in the memory of its node that all trials there share.

    Raises:
        DataError: the data set is missing or damaged.
    """

    def read_stack(config: Config) -> tuple[ParticleSet, ParticleStack]:
        particles = open_particles(config.data.path, config.data.half_set)
        box = training_box(config, particles.manifest.box)
        path = str(location(config.data.path).absolute())
        try:
            columns: dict[str, np.ndarray] = ray.get(ray.get(shelf.fetch.remote(path, config.data.half_set, box))[0])
        except RayError as error:
            raise known_error(error) or error from error
        return particles, shared_stack(columns)

    return read_stack
