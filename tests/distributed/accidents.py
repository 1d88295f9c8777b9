"""Shares of a run to which something happens; workers find them here by name."""

import os
import signal
import time
from collections.abc import Callable, Generator

from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack
from aceray.distributed.share import Place, Share, train_share
from aceray.errors import NonFiniteLoss
from aceray.folder import RunFolder
from aceray.train.loop import Progress

STEP = 25


def after_the_step(
    progress: Generator[Progress, None, Share], happens: Callable[[], None]
) -> Generator[Progress, None, Share]:
    """The same steps; something happens when step 25 has been handed on."""
    while True:
        try:
            event = next(progress)
        except StopIteration as end:
            return end.value
        yield event
        if event.step == STEP:
            happens()


def killed_once(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """The worker is killed, as by the kernel, when it has done a step; its successor is left alone."""
    mark = folder.path / "killed"

    def kill() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return (yield from after_the_step(train_share(config, folder, particles, stack, place), kill))


def killed_always(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """As on a node without memory."""
    yield next(train_share(config, folder, particles, stack, place))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def diverging_on_the_second_worker(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """One of two workers raises while the other waits for it; each start leaves a mark."""
    (folder.path / f"start-{place.rank}-{os.getpid()}").touch()
    for event in train_share(config, folder, particles, stack, place):
        if event.step == 23 and place.rank == 1:
            raise NonFiniteLoss("training step 23: loss_pip is nan; nothing was updated in this step.")
        yield event
    raise AssertionError("the other worker should have stopped this one")


def told_once(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """The second worker is sent SIGTERM when it has done a step; each start leaves a mark with its first step."""
    progress = train_share(config, folder, particles, stack, place)
    first = True
    while True:
        try:
            event = next(progress)
        except StopIteration as end:
            return end.value
        if first:
            (folder.path / f"begun-{place.rank}-{event.step}").touch()
        first = False
        yield event
        mark = folder.path / "told"
        if place.rank == 1 and event.step == STEP and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)


def hungry(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """The worker takes memory until somebody stops it."""
    yield next(train_share(config, folder, particles, stack, place))
    taken = []
    while True:
        taken.append(bytearray(b"1") * 2**26)
        time.sleep(0.05)


def stopped_once(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """The second worker answers nothing any more, as on a node that hangs; its successor is left alone."""
    mark = folder.path / "stopped"

    def stop() -> None:
        if place.rank == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    return (yield from after_the_step(train_share(config, folder, particles, stack, place), stop))


def asleep_always(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """The second worker is alive, but does not compute any more, as when its storage hangs."""
    yield next(train_share(config, folder, particles, stack, place))
    if place.rank == 1:
        time.sleep(3600)
    yield from train_share(config, folder, particles, stack, place)
    raise AssertionError


def asleep_for_a_while(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """A worker makes no step for ten seconds, though its process answers."""
    progress = train_share(config, folder, particles, stack, place)
    return (yield from after_the_step(progress, lambda: time.sleep(10.0)))


def stopped_always(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """Every second worker does."""
    yield next(train_share(config, folder, particles, stack, place))
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    yield from train_share(config, folder, particles, stack, place)
    raise AssertionError
