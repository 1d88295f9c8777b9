"""What the trials of a study on Ray share: data sets, each read once, and what they and the study tell each other."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from aceray.build import training_box
from aceray.config import Config
from aceray.data.location import location
from aceray.data.particles import ParticleSet, ParticleStack, open_particles
from aceray.distributed import notice
from aceray.distributed.failures import known_error
from aceray.distributed.ingest import columns_of, read_here, shared_stack

SECONDS_BETWEEN_CALLS = 1.0


@dataclass
class News:
    """What the study's process learns of its trials, by name."""

    kept: set[str] = field(default_factory=set)
    """Those that were told to end and have nothing more to keep."""
    silent_seconds: dict[str, float] = field(default_factory=dict)
    """How long ago each has called; they do about once a second."""
    warnings: list[tuple[str, str]] = field(default_factory=list)


class Shelf:
    """Reads each data set at its first call and keeps it for the others; an actor without a core of its own.

    Trials hold their cores while they wait for it, so it must not need one. Calls are answered while it reads.
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple[str, int | None, int], ray.ObjectRef] = {}
        self._told = False
        self._kept: set[str] = set()
        self._called: dict[str, float] = {}
        self._warnings: list[tuple[str, str]] = []

    @ray.method(concurrency_group="calls")
    def call(self, trial: str, warnings: list[str], kept: bool) -> bool:
        """Called by a trial: it lives, and what it warns of; whether it shall end, or (`kept`) has."""
        self._called[trial] = time.monotonic()
        self._warnings += [(trial, text) for text in warnings]
        if kept:
            self._kept.add(trial)
        return self._told

    @ray.method(concurrency_group="calls")
    def news(self, told: bool) -> News:
        """Called by the study's process, which may have been `told` to end: then so are the trials."""
        self._told = self._told or told
        now, warnings = time.monotonic(), self._warnings
        self._warnings = []
        return News(set(self._kept), {trial: now - at for trial, at in self._called.items()}, warnings)

    def fetch(self, path: str, half_set: int | None, box: int) -> list[ray.ObjectRef]:
        """Where the columns of all particles lie: in a list, so that they are not sent along."""
        key = (path, half_set, box)
        if key not in self._stacks:
            particles = open_particles(path, half_set)
            self._stacks[key] = ray.put(columns_of(read_here(particles, particles.row_groups(), box)))
        return [self._stacks[key]]


def open_shelf() -> Any:
    """A shelf for one study; it is started again when its node is lost, and kept until it is killed."""
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    shelf: Any = ray.remote(concurrency_groups={"calls": 1}, **options)(Shelf)
    return shelf.remote()


@contextlib.contextmanager
def in_touch(shelf: Any, trial: str) -> Iterator[threading.Event]:
    """In a trial's process: it calls, hands on its warnings, and is given notice when its study ends.

    What it yields is to be set when nothing is left to keep; where nobody heeds a notice nothing ever was.
    """
    over, kept, waiting = threading.Event(), threading.Event(), SimpleQueue[logging.LogRecord]()

    def call() -> None:
        pause = 0.0
        while not over.wait(pause):
            pause = SECONDS_BETWEEN_CALLS
            texts = [waiting.get().getMessage() for _ in range(waiting.qsize())]
            with contextlib.suppress(RayError):
                if ray.get(shelf.call.remote(trial, texts, kept.is_set())) and not notice.given():
                    if not notice.heeding():
                        kept.set()
                        pause = 0.0
                    notice.give()

    handler, log = QueueHandler(waiting), logging.getLogger("aceray")
    handler.setLevel(logging.WARNING)
    log.addHandler(handler)
    threading.Thread(target=call, name="aceray-touch", daemon=True).start()
    try:
        yield kept
    finally:
        over.set()
        log.removeHandler(handler)


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
