"""One trial of a study: one run, or two that are compared, as a generator of reports. Knows no Ray and no MLflow.

A trial is the run of `aceray train` (run.py), in the study's folder. What a study must know of it when it is continued
is in trial.json there.
"""

import contextlib
import json
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aceray.build import last_step
from aceray.config import Config
from aceray.data.location import location
from aceray.data.mrc import read_volume
from aceray.data.particles import open_particles
from aceray.data.storage import append_line, storage_error, written_atomically
from aceray.distributed.run import ReadStack, named, run_steps, threads
from aceray.em.rotation import rotation_from_relion
from aceray.errors import AcerayError, DataError
from aceray.folder import RunFolder, check_same_settings, finite_or_none, write_json
from aceray.presets import to_yaml, with_overrides
from aceray.study import Point, Study, config_of, trial_name
from aceray.tracking.run import Tracker
from aceray.train.loop import Progress
from aceray.train.predict import Poses
from aceray.train.select import half_map_scores, pose_agreement

Status = Literal["running", "finished", "stopped", "failed", "interrupted"]
"""stopped: by the scheduler. Only running and interrupted trials go on when the study is resumed."""
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")
# the second run of a pair starts independently of the first
SEED_OF_SECOND = 1000


@dataclass(frozen=True)
class Trial:
    """A point of a study and its one or two runs, whose folders lie in `folder` or, of one run, are `folder`."""

    number: int
    name: str
    point: Point
    configs: tuple[Config, ...]
    folder: Path

    @property
    def members(self) -> tuple[RunFolder, ...]:
        """The folders of the runs."""
        return tuple(RunFolder(Path(config.runs) / config.name) for config in self.configs)


@dataclass(frozen=True)
class Report:
    """What an evaluation found: metrics of the trial's first run, and `select/…` of its pair.

    `checkpoint` is the file of the first run's checkpoint at this very step, if it has one.
    """

    step: int
    steps: int
    metrics: dict[str, float]
    particles_per_second: float
    checkpoint: Path | None = None


@dataclass(frozen=True)
class TrialEvent:
    """Something happened to a trial: its status changed, or it has evaluated (`report`).

    Sent when trial.json in the trial's folder has the same status, for what follows the folders.
    """

    name: str
    number: int
    point: Point
    status: Status
    report: Report | None = None
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    """The final metrics, once finished."""


def event_of(trial: Trial, status: Status, report: Report | None = None, reason: str = "") -> TrialEvent:
    """The event of a trial."""
    metrics = report.metrics if report is not None and status == "finished" else {}
    return TrialEvent(trial.name, trial.number, trial.point, status, report, reason, metrics)


def make_trial(study: Study, folder: Path, number: int, point: Point, name: str = "") -> Trial:
    """The trial of a point, in the folder of its study.

    Raises:
        ConfigError: a value is out of bounds, or the values contradict one another.
    """
    name, trials = name or trial_name(study, point, number), folder.absolute() / "trials"
    alone = config_of(study, point, name, str(trials))
    # the working directory of another process is another
    alone = changed(alone, **{"data.path": str(location(alone.data.path).expanduser().absolute())})
    second = alone.seed + SEED_OF_SECOND
    match study.members:
        case "one":
            pair: dict[str, dict[str, Any]] = {}
        case "half_sets":
            pair = {"half_1": {"data.half_set": 1}, "half_2": {"data.half_set": 2, "seed": second}}
        case "two_seeds":
            pair = {"seed_1": {}, "seed_2": {"seed": second}}
    inside = str(trials / name)
    configs = tuple(changed(alone, name=member, runs=inside, **values) for member, values in pair.items())
    return Trial(number, name, point, configs or (alone,), trials / name)


def changed(config: Config, **values: Any) -> Config:
    """The settings with other values under some dotted keys."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return Config.model_validate(with_overrides(config.model_dump(mode="json"), *overrides))


# ---- trial.json


def read_notes(folder: Path) -> dict[str, Any]:
    """What trial.json in the folder of a trial holds; nothing when the trial has not begun."""
    path = RunFolder(folder).trial
    return json.loads(path.read_text()) if path.exists() else {}


def write_notes(trial: Trial, **changes: Any) -> None:
    """Change status, reason, seconds, metrics or changes in trial.json, which is made when it is not there.

    Raises:
        DataError: it cannot be written.
    """
    try:
        trial.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(trial.folder, error) from error
    labels = {key: value if isinstance(value, str) else json.dumps(value) for key, value in trial.point.items()}
    fixed = {"number": trial.number, "point": trial.point, "labels": labels}
    fresh = {"status": "running", "reason": "", "seconds": 0.0, "metrics": {}, "changes": []}
    notes = {**fresh, **read_notes(trial.folder), **fixed, **changes}
    write_json(RunFolder(trial.folder).trial, {**notes, "metrics": finite_or_none(notes["metrics"])})


# ---- a trial


def run_trial(
    trial: Trial, read_stack: ReadStack | None = None, start_from: Path | None = None
) -> Generator[Report, None, dict[str, float]]:
    """Run a trial from the newest checkpoints of its runs; yields at every evaluation, returns the final metrics.

    Two runs advance in turns, evaluation by evaluation. trial.json holds the status running, then finished or failed;
    whoever closes the generator early writes there why. A run that came to its end before is taken as it is.
    `start_from`, another trial's checkpoint under its own name, replaces those of the (only) run, whose settings may
    have changed too.

    Raises:
        AcerayError: whatever ends a run; the trial is marked as failed.
    """
    started, before = time.monotonic(), read_notes(trial.folder).get("seconds", 0.0)

    def seconds() -> float:
        return before + time.monotonic() - started

    write_notes(trial, status="running", reason="")
    try:
        if start_from is not None:
            _put_checkpoint(trial, start_from)
        with threads(trial.configs[0]), contextlib.closing(_in_turns(trial, read_stack)) as reports:
            for report in reports:
                report.metrics.setdefault("train/wall_seconds", seconds())
                _write_journal(trial, report)
                # before the last report is out: who gets it may not come back
                status = "finished" if report.step == report.steps else "running"
                write_notes(trial, status=status, metrics=report.metrics, seconds=seconds())
                yield report
    except AcerayError as error:
        write_notes(trial, status="failed", reason=str(error), seconds=seconds())
        raise
    return report.metrics


def _put_checkpoint(trial: Trial, file: Path) -> None:
    folder, config = trial.members[0], trial.configs[0]
    try:
        content = file.read_bytes()
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        for step in folder.checkpoint_steps():
            folder.checkpoint_file(step).unlink()
        folder.metrics.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(file, error, "read") from error
    with written_atomically(folder.checkpoints / file.name) as part:
        part.write_bytes(content)
    with written_atomically(folder.config) as part:
        part.write_text(to_yaml(config))


def _in_turns(trial: Trial, read_stack: ReadStack | None) -> Generator[Report, None, None]:
    """A report whenever all runs have evaluated at a step; the one that is behind goes on first."""
    runs = {index: _evaluations(config, read_stack) for index, config in enumerate(trial.configs)}
    latest: dict[int, Progress] = {}
    at = dict.fromkeys(runs, 0)
    with contextlib.ExitStack() as stack:
        for run in runs.values():
            stack.callback(run.close)
        while runs:
            index = min(runs, key=at.__getitem__)
            try:
                event = next(runs[index])
            except StopIteration:
                at[index] = last_step(trial.configs[index])
                del runs[index]
                continue
            at[index], latest[index] = event.step, event
            if set(at.values()) == {event.step}:
                yield _interim(trial, [latest[member] for member in sorted(at)])
    yield _final(trial)


def _evaluations(config: Config, read_stack: ReadStack | None) -> Generator[Progress, None, None]:
    """Run to the end, which leaves metrics.json; yields the evaluations before the last step."""
    folder = RunFolder(Path(config.runs) / config.name)
    begun = folder.config.exists()
    if begun:
        check_same_settings(folder, config)
        if folder.is_finished(last_step(config)):
            return
    with contextlib.closing(run_steps(config, "resume" if begun else "error", read_stack, _untracked)) as steps:
        for event in steps:
            # rounds of refinement are no place to compare trials that still train
            if event.metrics and event.step < config.train.steps:
                yield event


def _untracked(config: Config, folder: RunFolder, tags: Mapping[str, str]) -> Tracker:
    """The study's process alone writes to MLflow."""
    return Tracker()


def _interim(trial: Trial, events: list[Progress]) -> Report:
    first, file = events[0], trial.members[0].checkpoint_file(events[0].step)
    checkpoint = file if file.exists() else None
    return Report(
        first.step, first.steps, named(first) | _scores_at(trial, events), first.particles_per_second, checkpoint
    )


def _final(trial: Trial) -> Report:
    found = [json.loads(member.metrics.read_text()) for member in trial.members]
    metrics = {key: float(value) for key, value in found[0].items() if value is not None}
    metrics["train/wall_seconds"] = sum(each.get("train/wall_seconds") or 0.0 for each in found)
    steps, rate = last_step(trial.configs[0]), metrics.get("train/particles_per_second", 0.0)
    return Report(steps, steps, metrics | _final_scores(trial), rate, trial.members[0].checkpoint_file(steps))


def _write_journal(trial: Trial, report: Report) -> None:
    """Two runs have a journal each; that of the trial has what compares them."""
    if len(trial.configs) == 1:
        return
    folder = RunFolder(trial.folder)
    if report.step <= max((row["step"] for row in folder.read_history()), default=0):
        return
    with FileIO(folder.history, "a") as journal:
        append_line(folder.history, journal, json.dumps({"step": report.step, **finite_or_none(report.metrics)}))


# ---- scores of a pair


def _scores_at(trial: Trial, events: list[Progress]) -> dict[str, float]:
    """Scores of a pair at one step; none of runs whose workers are elsewhere, which show no snapshots."""
    snapshots = [event.snapshot for event in events if event.snapshot is not None]
    if len(snapshots) < 2:
        return {}
    if trial.configs[0].data.half_set is None:
        return _agreement(*(snapshot.poses for snapshot in snapshots))
    manifest = open_particles(trial.configs[0].data.path).manifest
    box = snapshots[0].volume.shape[-1]
    volumes = [snapshot.volume for snapshot in snapshots]
    return _half_maps(volumes, manifest.pixel_size_angstrom * manifest.box / box)


def _final_scores(trial: Trial) -> dict[str, float]:
    """Scores of a pair by all its poses, or by its volumes."""
    if len(trial.configs) < 2:
        return {}
    if trial.configs[0].data.half_set is None:
        return _agreement(*(_read_poses(member) for member in trial.members))
    volumes, sizes = zip(*(read_volume(member.volume) for member in trial.members), strict=True)
    return _half_maps(list(volumes), sizes[0])


def _agreement(first: Poses, second: Poses) -> dict[str, float]:
    return pose_agreement(first, second)


def _half_maps(volumes: list[Tensor], pixel_size_angstrom: float) -> dict[str, float]:
    return half_map_scores(volumes[0], volumes[1], pixel_size_angstrom)


def _read_poses(member: RunFolder) -> Poses:
    import pandas

    try:
        table = pandas.read_parquet(member.poses)
    except (OSError, ValueError) as error:
        raise DataError(f"{member.poses}: cannot be read ({error}); evaluate the run again") from error
    columns = [torch.from_numpy(table[f"{angle}_deg"].to_numpy(copy=True)) for angle in ("rot", "tilt", "psi")]
    identifier = torch.from_numpy(table["particle_id"].to_numpy(copy=True))
    # shifts take no part in the comparison
    return Poses(
        identifier, rotation_from_relion(*columns).float(), torch.zeros(len(table), 2), torch.zeros(len(table))
    )
