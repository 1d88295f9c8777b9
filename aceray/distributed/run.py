"""A whole run: train in this process or on Ray, follow its progress, evaluate, leave its folder and its MLflow run.

Without workers this needs neither Ray nor MLflow installed.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TypeVar

import torch

from aceray.build import final_box, lane_count, last_step, row_groups_of_lanes, training_box
from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack, RowGroup, open_particles
from aceray.data.storage import append_line, exclusive
from aceray.distributed.ingest import read_here
from aceray.distributed.memory import bounded, check_bound
from aceray.distributed.monitor import RunMonitor, overseen
from aceray.distributed.notice import ended_by_sigterm
from aceray.distributed.results import oracle_metrics, write_half_maps, write_results
from aceray.distributed.share import Place, Share, load, predict_share, train_share, within_memory
from aceray.errors import AcerayError, ClusterError, DataError
from aceray.folder import (
    Existing,
    RunFolder,
    RunResult,
    create_run_folder,
    finite_or_none,
    open_run_folder,
    run_path,
)
from aceray.presets import load_config
from aceray.tracking.run import Tracker, presets_tag, software_tags, start_tracking
from aceray.train.evaluate import MaskKind
from aceray.train.loop import Progress
from aceray.train.oracle import OracleProgress

_log = logging.getLogger("aceray")
OnProgress = Callable[[Progress], None]
OnSearch = Callable[[OracleProgress], None]
ReadStack = Callable[[Config], tuple[ParticleSet, ParticleStack]]
"""The data set of a run, as `open_particles` opens it, and all its particles, as `read_here` reads them."""
Track = Callable[[Config, RunFolder, Mapping[str, str]], Tracker]
Event = TypeVar("Event")
Result = TypeVar("Result")


def run(config: Config, existing: Existing = "error", on_progress: OnProgress | None = None) -> RunResult:
    """Train, evaluate and leave everything in runs/<name>; `on_progress` is called after every step.

    An interrupt (Ctrl-C, SIGTERM) ends the run on all machines; it can be resumed from its newest checkpoint, on
    SIGTERM that of the step which was in the making.

    Raises:
        DataError: the data set or the run folder is missing, damaged, foreign or not free.
        ConfigError: the run to resume had other settings; the tracking store cannot be used.
        ClusterError: Ray cannot give the workers, or lost one too often.
        NonFiniteLoss: a loss is not a number.
    """
    with ended_by_sigterm(), threads(config):
        return exhaust(run_steps(config, existing), on_progress)


def run_steps(
    config: Config,
    existing: Existing = "error",
    read_stack: ReadStack | None = None,
    track: Track = start_tracking,
) -> Generator[Progress, None, RunResult]:
    """The same as a generator that yields after every step, for what advances several runs in turns.

    Signals and the number of threads are left to the caller. `read_stack` gives the particles of a run in this process
    when they are in memory already, and is not asked under data.memory_gib; `track` the run's tracker.
    """
    if read_stack is not None and config.resources.workers == 0 and config.data.memory_gib is None:
        particles, stack = read_stack(config)
    else:
        particles, stack = open_particles(config.data.path, config.data.half_set), None
    workers, lanes = max(1, config.resources.workers), lane_count(config)
    groups = [row_groups_of_lanes(particles, range(worker, lanes, workers), lanes) for worker in range(workers)]
    check_bound(config, particles, groups[0])
    with exclusive(run_path(config)):
        return (yield from _in_folder(config, create_run_folder(config, existing), particles, groups, stack, track))


def _in_folder(
    config: Config,
    folder: RunFolder,
    particles: ParticleSet,
    groups: list[list[RowGroup]],
    stack: ParticleStack | None,
    track: Track,
) -> Generator[Progress, None, RunResult]:
    try:
        _check_data(folder, particles)
        with within_memory(), track(config, folder, _tags(config, particles.manifest.sha256)) as tracker:
            folder.cut_history(_newest_whole(folder))
            steps = overseen(_train(config, folder, particles, groups, stack), config.name, config.train.steps)
            with _timed(folder), contextlib.closing(steps) as progress:
                shares = yield from follow(progress, folder, tracker)
            return write_results(config, folder, particles, shares, tracker)
    except AcerayError:
        folder.remove_if_nothing_done()
        raise


def _newest_whole(folder: RunFolder) -> int:
    """The step from which the run goes on: that of the newest checkpoint that can be read and is in the history."""
    aside = folder.set_aside_damaged()
    unrecorded = folder.drop_unrecorded()
    steps = folder.checkpoint_steps()
    if aside:
        _log.warning(
            "%s: the checkpoint is damaged and was renamed to %s; the run goes on from step %d",
            folder.checkpoints, ", ".join(path.name for path in aside), steps[-1],
        )  # fmt: skip
    if unrecorded:
        _log.warning(
            "%s: the run was killed before step %d was written to history.jsonl; it goes on from step %d",
            folder.checkpoints, unrecorded[-1], steps[-1],
        )  # fmt: skip
    return steps[-1] if steps else 0


def exhaust(steps: Generator[Event, None, Result], on_event: Callable[[Event], None] | None) -> Result:
    """Follow a generator to its end, hand on what it yields, return what it returns.

    What the caller's function raises is raised inside the generator, so that it ends as interrupted or as failed.
    """
    with contextlib.closing(steps):
        while True:
            try:
                event = next(steps)
            except StopIteration as end:
                return end.value
            try:
                if on_event is not None:
                    on_event(event)
            except BaseException as error:
                steps.throw(error)


def read_particles(path: str, half_set: int | None, box: int | None) -> tuple[ParticleSet, ParticleStack]:
    """A data set or a half set, and all its particles, Fourier-cropped to at most `box`, read in this process."""
    particles = open_particles(path, half_set)
    stored = particles.manifest.box
    return particles, read_here(particles, particles.row_groups(), min(box or stored, stored))


def evaluate_run(path: str | Path, on_progress: OnProgress | None = None) -> RunResult:
    """Predict, evaluate and write the results of an earlier run again, from its newest checkpoint, in this process.

    What an earlier evaluation found of the oracle, which depends on the data set alone, is kept.

    Raises:
        DataError: the folder holds no run or no checkpoint, or the data set is not that of the run.
    """
    folder = open_run_folder(path)
    before = json.loads(folder.metrics.read_text()) if folder.metrics.exists() else {}
    kept = {name: value for name, value in before.items() if name.startswith("oracle/") and value is not None}
    return _evaluate(folder, on_progress, lambda particles, stack, device: kept)


def evaluate_run_with_oracle(
    path: str | Path, on_progress: OnProgress | None = None, on_search: OnSearch | None = None
) -> RunResult:
    """The same, with the oracle's metrics on the run's particles beside those of the run; `on_search` sees it search.

    Raises:
        DataError: as for `evaluate_run`, or the data set's truth is not known.
    """
    return _evaluate(
        open_run_folder(path),
        on_progress,
        lambda particles, stack, device: oracle_metrics(particles, stack, device, on_search),
    )


def compare_half_runs(path: str | Path, other_path: str | Path, mask: MaskKind = "none") -> RunResult:
    """FSC between the volumes of two runs, one on each half set of one data set; written to the first run alone.

    Raises:
        DataError: a folder holds no finished run, or the runs share particles, or differ in data set or box.
    """
    folder, other = open_run_folder(path), open_run_folder(other_path)
    config = load_config(str(folder.config))
    halves = [each.data.half_set for each in (config, load_config(str(other.config)))]
    if set(halves) != {1, 2}:
        had = ["all particles" if half is None else f"half set {half}" for half in halves]
        raise DataError(
            f"{other.path}: trained on {had[1]}, {folder.path} on {had[0]}; half maps share no particle: train one run "
            "with data.half_set=1 and one with data.half_set=2"
        )
    digests = [each.read_notes().get("dataset_sha256") for each in (folder, other)]
    if digests[0] != digests[1]:
        raise DataError(
            f"{other.path}: trained on other particles than {folder.path} (data sets {str(digests[1])[:12]} and "
            f"{str(digests[0])[:12]}); half maps are of one data set"
        )
    with exclusive(folder.path), start_tracking(config, folder, _tags(config, str(digests[0]))) as tracker:
        tracker.status_at_end = tracker.status_before
        return write_half_maps(folder, other, mask, tracker)


def _evaluate(
    folder: RunFolder,
    on_progress: OnProgress | None,
    score_oracle: Callable[[ParticleSet, ParticleStack, str], dict[str, float]],
) -> RunResult:
    config = load_config(str(folder.config))
    steps = folder.checkpoint_steps()
    if not steps:
        raise DataError(f"{folder.path}: the run has no checkpoint yet; train it first")
    particles = open_particles(config.data.path, config.data.half_set)
    _check_data(folder, particles)
    stored, device, every = particles.manifest.box, device_of(config), particles.row_groups()
    config, place = bounded(config, particles), Place(device=device)
    with ended_by_sigterm(), threads(config), exclusive(folder.path), within_memory():
        largest = load(config, particles, every, final_box(config, stored), place)
        beside = score_oracle(particles, largest, device)
        box = training_box(config, stored)
        stack = largest if box == largest.images.shape[-1] else load(config, particles, every, box, place)
        del largest
        with start_tracking(config, folder, _tags(config, particles.manifest.sha256)) as tracker:
            tracker.status_at_end = tracker.status_before
            share = predict_share(config, folder, particles, stack, place)
            result = write_results(config, folder, particles, [share], tracker, beside)
    if on_progress is not None:
        on_progress(Progress(steps[-1], last_step(config), {}, 0.0, result.metrics))
    return result


@contextlib.contextmanager
def _timed(folder: RunFolder) -> Iterator[None]:
    """Add the time of this attempt, also of one that fails, to the run's."""
    started = time.monotonic()
    try:
        yield
    finally:
        folder.write_notes(wall_seconds=folder.read_notes().get("wall_seconds", 0.0) + time.monotonic() - started)


def _train(
    config: Config,
    folder: RunFolder,
    particles: ParticleSet,
    groups: list[list[RowGroup]],
    stack: ParticleStack | None,
) -> Generator[Progress, None, list[Share]]:
    """The progress of all workers, each with its row groups, as one; returns their shares."""
    box = training_box(config, particles.manifest.box)
    if config.resources.workers == 0:
        place = Place(device=device_of(config))
        stack = load(config, particles, groups[0], box, place) if stack is None else stack
        return [(yield from train_share(config, folder, particles, stack, place))]
    # Imported here: a run in this process needs no Ray.
    from aceray.distributed.supervisor import train_on_ray

    return (yield from train_on_ray(config, folder, particles, groups, box, train_share))


def _check_data(folder: RunFolder, particles: ParticleSet) -> None:
    """A run belongs to the particles it began with."""
    digest = particles.manifest.sha256
    before = folder.read_notes().get("dataset_sha256", digest)
    if before != digest:
        raise DataError(
            f"{particles.path}: not the particles that the run in {folder.path} began with (sha256 {digest[:12]}, then "
            f"{before[:12]}); set data.path to those, or start a new run (name=...)"
        )
    folder.write_notes(dataset_sha256=digest)


def _tags(config: Config, dataset_sha256: str) -> dict[str, str]:
    return {"aceray.presets": presets_tag(config), "aceray.dataset_sha256": dataset_sha256, **software_tags()}


def device_of(config: Config) -> str:
    """Where a run in this process computes; ClusterError when it asks for a GPU that is not there."""
    there = torch.cuda.is_available()
    if config.resources.gpu and not there:
        raise ClusterError(
            "resources.gpu: true, but torch sees no GPU here; set it to false, or null to use one if there"
        )
    return "cuda" if there and config.resources.gpu is not False else "cpu"


@contextlib.contextmanager
def threads(config: Config) -> Iterator[None]:
    """Torch's number of threads for a run in this process, and the former number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def follow(
    progress: Generator[Progress, None, list[Share]], folder: RunFolder, tracker: Tracker
) -> Generator[Progress, None, list[Share]]:
    """Write every step to the journal and the tracker and yield it; returns what the generator returns.

    After the restart of a worker, steps that were seen already come again; they are passed over.
    """
    rows = folder.read_history()
    seen = int(rows[-1]["step"]) if rows else 0
    watched = contextlib.closing(RunMonitor(folder, tracker))
    with FileIO(folder.history, "a") as journal, watched as monitor:
        while True:
            try:
                event = next(progress)
            except StopIteration as end:
                return end.value
            monitor.report(event)
            if event.step <= seen:
                continue
            seen = event.step
            row = named(event)
            append_line(folder.history, journal, json.dumps({"step": event.step, **finite_or_none(row)}))
            tracker.log(event.step, row)
            yield event


def named(event: Progress) -> dict[str, float]:
    """Losses and metrics of a step under the names of MLflow and metrics.json."""
    row = {f"train/{name}": value for name, value in event.losses.items()}
    return {**row, "train/particles_per_second": event.particles_per_second, **event.metrics}
