"""A study from its first data set to its results: its folder, its points, its trials, here or on Ray (sweep.py).

The trials' folders are the truth about them (trial.py), so a study that was interrupted or killed goes on from there.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aceray.build import lane_count
from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack
from aceray.data.storage import exclusive, storage_error, written_atomically
from aceray.distributed.monitor import StudyMonitor
from aceray.distributed.notice import ended_by_sigterm
from aceray.distributed.run import ReadStack, read_particles
from aceray.distributed.study_data import OnSimulation, check_digests, prepare_data
from aceray.distributed.study_results import OnOracle, read_entries, write_study_results
from aceray.distributed.trial import (
    ENDED,
    Trial,
    TrialEvent,
    event_of,
    make_trial,
    read_notes,
    run_trial,
    write_notes,
)
from aceray.errors import AcerayError, ClusterError, ConfigError, DataError
from aceray.folder import write_json
from aceray.leaderboard import ranking
from aceray.presets import to_yaml, with_overrides
from aceray.study import Point, Study, applicable, grid, load_study, suggested_point, trial_name
from aceray.tracking.study import StudyTracker, start_study_tracking

OnEvent = Callable[[TrialEvent], None]
HERE = "none"
"""The address of a study that runs in this process, trial by trial, without Ray."""
# What may change when a study goes on: how much of it is done, and what is shown.
FREE_KEYS = ("studies", "description", "budget", "table", "search.trials", "search.concurrent")


@dataclass(frozen=True)
class StudyResult:
    """What a study left: every trial that began, with what its trial.json holds, and the files of the results."""

    study: Study
    folder: Path
    trials: dict[str, dict[str, Any]]
    paths: dict[str, Path]
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None

    def count(self, status: str) -> int:
        """How many trials have that status."""
        return sum(notes["status"] == status for notes in self.trials.values())


def run_study(
    study: Study,
    address: str = "local",
    resume: bool = False,
    on_event: OnEvent | None = None,
    on_simulation: OnSimulation | None = None,
    on_oracle: OnOracle | None = None,
) -> StudyResult:
    """Run a study to its end; everything is in its folder `studies/<name>`.

    `address` is `none` (in this process, trial by trial, without Ray), `local` (a Ray of its own), or that of a
    cluster. Ctrl-C or SIGTERM ends it; with `resume` it goes on, and what has ended is not run again.

    Raises:
        ConfigError: the data cannot give the objective, or the study to resume was another one.
        DataError: a data set or the study's folder is missing, damaged, not free, or cannot be written.
        ClusterError: Ray cannot give what the trials ask for.
    """
    _check_address(study, address)
    with ended_by_sigterm(), exclusive(study_path(study)):
        with _opened(study, resume) as folder:
            trials = [] if study.search.kind == "optuna" else list_trials(study, folder, address)
            asked = trials or _sample(study, folder)
            digests = prepare_data(study, asked, on_simulation)
            check_digests(folder, digests, read_study_notes(folder).get("datasets", {}))
            _write_study(study, folder)
        _write_study_notes(folder, datasets=digests)
        tags = {"aceray.dataset_sha256": ", ".join(sorted(set(digests.values())))}
        with start_study_tracking(asked[0].configs[0], study.name, folder, tags) as tracker:
            with contextlib.closing(StudyMonitor(study, tracker)) as monitor:
                _run_trials(study, folder, trials, address, _tracked(tracker, monitor, folder, on_event))
            result = read_study_result(study, folder, on_oracle)
            _summarise(tracker, result)
        return dataclasses.replace(result, mlflow_run_id=tracker.run_id, tracking_uri=tracker.uri)


def open_study(folder: str | Path, on_oracle: OnOracle | None = None) -> StudyResult:
    """A study that was run before, its results written again.

    Raises:
        DataError: the folder holds no study, or another process writes its results. A study that still runs may be
            looked at.
    """
    path = Path(folder).absolute()
    if not _study_file(path).exists():
        raise DataError(f"{path}: not the folder of a study (study.yaml is missing); nothing was touched")
    with exclusive(path / "leaderboard.md"):
        return read_study_result(load_study(str(_study_file(path))), path, on_oracle)


def read_study_result(study: Study, folder: Path, on_oracle: OnOracle | None = None) -> StudyResult:
    """Write the leaderboard, the tables and the figures from the trials' folders."""
    notes = {path.name: read_notes(path) for path in _trial_folders(folder)}
    trials = dict(sorted(notes.items(), key=lambda item: item[1]["number"]))
    return StudyResult(study, folder, trials, write_study_results(study, folder, on_oracle))


def _tracked(tracker: StudyTracker, monitor: StudyMonitor, folder: Path, on_event: OnEvent | None) -> OnEvent:
    """What happens on an event: the tracker follows the trial, the monitor learns of it, then the caller is told."""
    for trial in _trial_folders(folder):  # what a killed study could not send any more
        tracker.follow(trial)
        notes = read_notes(trial)
        monitor.report(trial.name, notes["status"], notes["metrics"])

    def follow(event: TrialEvent) -> None:
        tracker.follow(folder / "trials" / event.name)
        if event.status == "running" and event.reason:  # its process was lost
            monitor.restarts += 1
        monitor.report(event.name, event.status, event.report.metrics if event.report is not None else {})
        if on_event is not None:
            on_event(event)

    return follow


def _summarise(tracker: StudyTracker, result: StudyResult) -> None:
    for trial in _trial_folders(result.folder):  # what an outage kept back
        tracker.follow(trial)
    note = (result.folder / "leaderboard.md").read_text(encoding="utf-8")
    paths = [_study_file(result.folder), *result.paths.values()]
    tracker.summarise(paths, note, ranked_trials(result))


def ranked_trials(result: StudyResult) -> list[str]:
    """Names of the finished trials that have the objectives, best first."""
    finished = [entry for entry in read_entries(result.study, result.folder) if entry.status == "finished"]
    places = ranking(finished, result.study.objective)
    return [place.entry.name for place in places if place.rank is not None]


def _trial_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / "trials").glob("*/trial.json"))


# ---- the folder


def _study_file(folder: Path) -> Path:
    return folder / "study.yaml"


@contextlib.contextmanager
def _opened(study: Study, resume: bool) -> Iterator[Path]:
    """The study's folder, which is taken away again when a mistake is found before it is a study."""
    folder = study_path(study)
    if _study_file(folder).exists():
        if not resume:
            raise DataError(
                f"{folder}: a study of this name is there; nothing was touched. To go on with it, resume (--resume); "
                "or choose another name (name=...)"
            )
        _check_same_study(study, folder)
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise storage_error(folder, error) from error
    finally:
        if not _study_file(folder).exists():
            with contextlib.suppress(OSError):  # what holds something stays
                (folder / "trials").rmdir()
                folder.rmdir()


def study_path(study: Study) -> Path:
    """Where a study leaves its folder."""
    return Path(study.studies).expanduser().absolute() / study.name


def _check_same_study(study: Study, folder: Path) -> None:
    before, now = (_fixed(each) for each in (load_study(str(_study_file(folder))), study))
    for key, value in now.items():
        if value != before[key]:
            raise ConfigError(
                f"{key}: is another{_news(before[key], value)} than in the study in {folder}, so its trials cannot be "
                "compared with those to come; set it back to resume, or start a new study (name=...)"
            )


def _news(before: Any, now: Any) -> str:
    """What came to a list and what left it, in brackets."""
    if not (isinstance(before, list) and isinstance(now, list)):
        return ""
    changes = [f"with {each}" for each in now if each not in before]
    changes += [f"without {each}" for each in before if each not in now]
    return f" ({', '.join(changes)})" if changes else ""


def _fixed(study: Study) -> dict[str, Any]:
    """What makes a study this study, by key."""
    whole = study.model_dump(mode="json")
    search = {f"search.{key}": value for key, value in whole.pop("search").items()}
    return {key: value for key, value in {**whole, **search}.items() if key not in FREE_KEYS}


def _write_study(study: Study, folder: Path) -> None:
    with written_atomically(_study_file(folder)) as file:
        file.write_text(to_yaml(study))


def read_study_notes(folder: Path) -> dict[str, Any]:
    """What study.json holds: digests of the data sets, runs in MLflow."""
    path = folder / "study.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write_study_notes(folder: Path, **changes: Any) -> None:
    write_json(folder / "study.json", read_study_notes(folder) | changes)


# ---- points


def list_trials(study: Study, folder: Path, address: str) -> list[Trial]:
    """All trials of a grid or of random points, each with a name of its own."""
    points = grid(study)[: study.search.trials] if study.search.kind == "grid" else random_points(study)
    names = [trial_name(study, point, number) for number, point in enumerate(points)]
    often = Counter(names)
    named = [
        name if often[name] == 1 else f"{name[:90].rstrip('-._')}-{number:04d}" for number, name in enumerate(names)
    ]
    made = [make_trial(study, folder, *each) for each in zip(range(len(points)), points, named, strict=True)]
    return [_in_this_process(trial) for trial in made] if address == HERE else made


def random_points(study: Study) -> list[Point]:
    """search.trials random points; more trials add to those of fewer."""
    # Imported here: a grid needs no Optuna.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=study.search.seed))
    return [suggested_point(study, asked.ask()) for _ in range(study.search.trials or 0)]


def _sample(study: Study, folder: Path) -> list[Trial]:
    """Trials that name every data set of a study whose points are not known before."""
    values = {key: dimension.values for key, dimension in study.space.items()}
    count = max(len(each) for each in values.values())
    points = [
        applicable(study, {key: each[min(number, len(each) - 1)] for key, each in values.items()})
        for number in range(count)
    ]
    return [make_trial(study, folder, number, point) for number, point in enumerate(points)]


def _in_this_process(trial: Trial) -> Trial:
    """The same trial without workers; its lanes, which decide what is computed, stay."""
    configs = tuple(
        Config.model_validate(
            with_overrides(config.model_dump(mode="json"), "resources.workers=0", f"train.lanes={lane_count(config)}")
        )
        for config in trial.configs
    )
    return Trial(trial.number, trial.name, trial.point, configs, trial.folder)


# ---- trials


def _check_address(study: Study, address: str) -> None:
    if address != HERE:
        # Imported here: a study in this process needs no Ray.
        from aceray.distributed import cluster

        cluster.check_answers(address)  # before anything is made
        return
    for key, kind, instead in (
        ("search.kind", study.search.kind, "grid or random"),
        ("scheduler.kind", study.scheduler.kind, "none"),
    ):
        if kind in ("optuna", "asha", "median", "pbt"):
            raise ConfigError(f"{key}: {kind} is done by Ray Tune; leave out --address none, or use {instead}")


def _run_trials(study: Study, folder: Path, trials: list[Trial], address: str, on_event: OnEvent) -> None:
    waiting = [trial for trial in trials if read_notes(trial.folder).get("status") not in ENDED]
    if address == HERE:
        _one_after_another(study, waiting, on_event)
        return
    # Imported here: a study in this process needs no Ray.
    from aceray.distributed import sweep

    def make(number: int, point: Point) -> Trial:
        return make_trial(study, folder, number, point)

    try:
        sweep.sweep(study, waiting, address, on_event, make)
    except ClusterError:
        _free_unless_begun(folder)
        raise


def _free_unless_begun(folder: Path) -> None:
    """A study that no trial found a place for may come again with other settings; its run in MLflow goes on."""
    if not _trial_folders(folder):
        (folder / "optuna.jsonl").unlink(missing_ok=True)
        _study_file(folder).unlink(missing_ok=True)
        _write_study_notes(folder, datasets={})


def _one_after_another(study: Study, waiting: list[Trial], on_event: OnEvent) -> None:
    deadline = time.monotonic() + (study.budget.wall_seconds or float("inf"))
    # trial after trial of the same set, and both halves of a pair, are read once
    read = functools.lru_cache(maxsize=2)(read_particles)

    def read_stack(config: Config) -> tuple[ParticleSet, ParticleStack]:
        return read(config.data.path, config.data.half_set, config.data.box)

    for trial in waiting:
        if time.monotonic() >= deadline:
            return
        _run_here(trial, read_stack, deadline, on_event)


def _run_here(trial: Trial, read_stack: ReadStack, deadline: float, on_event: OnEvent) -> None:
    """One trial in this process; one that fails leaves its reason and the study goes on."""
    on_event(event_of(trial, "running"))
    try:
        with contextlib.closing(run_trial(trial, read_stack)) as reports:
            for report in reports:
                last = report.step == report.steps
                on_event(event_of(trial, "finished" if last else "running", report))
                if not last and time.monotonic() >= deadline:
                    _interrupted(trial, "budget.wall_seconds is used up", on_event)
                    return
    except AcerayError as error:
        on_event(event_of(trial, "failed", reason=str(error)))
    except BaseException as error:
        _interrupted(trial, type(error).__name__, on_event)
        raise


def _interrupted(trial: Trial, reason: str, on_event: OnEvent) -> None:
    if read_notes(trial.folder).get("status") not in ENDED:
        write_notes(trial, status="interrupted", reason=reason)
        on_event(event_of(trial, "interrupted", reason=reason))
