"""A study from its first data set to its results: its folder, its points, its trials, here or on Ray (sweep.py).

The trials' folders are the truth about them (trial.py), so a study that was interrupted or killed goes on from there.
"""

import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aceray.build import lane_count
from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack, open_particles
from aceray.data.storage import storage_error, written_atomically
from aceray.distributed import prepare
from aceray.distributed.run import ReadStack, ended_by_sigterm, read_particles
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
from aceray.em.random import named_generator
from aceray.errors import AcerayError, ConfigError, DataError
from aceray.folder import write_json
from aceray.presets import to_yaml, with_overrides
from aceray.study import CRITERIA, Dimension, Point, Study, applicable, grid, load_study, trial_name

if TYPE_CHECKING:
    from aceray.distributed.prepare import SimulationProgress

OnEvent = Callable[[TrialEvent], None]
OnSimulation = Callable[["SimulationProgress"], None]
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

    def count(self, status: str) -> int:
        """How many trials have that status."""
        return sum(notes["status"] == status for notes in self.trials.values())


def run_study(
    study: Study,
    address: str = "local",
    resume: bool = False,
    on_event: OnEvent | None = None,
    on_simulation: OnSimulation | None = None,
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
    with ended_by_sigterm():
        with _opened(study, resume) as folder:
            trials = [] if study.search.kind == "optuna" else list_trials(study, folder, address)
            digests = _prepare_data(study, trials or _sample(study, folder), on_simulation)
            _check_digests(folder, digests)
            _write_study(study, folder)
        _write_study_notes(folder, datasets=digests)
        _run_trials(study, folder, trials, address, on_event or (lambda event: None))
        return read_study_result(study, folder)


def open_study(folder: str | Path) -> StudyResult:
    """A study that was run before, its results written again.

    Raises:
        DataError: the folder holds no study.
    """
    path = Path(folder).absolute()
    if not _study_file(path).exists():
        raise DataError(f"{path}: not the folder of a study (study.yaml is missing); nothing was touched")
    return read_study_result(load_study(str(_study_file(path))), path)


def read_study_result(study: Study, folder: Path) -> StudyResult:
    """Write the leaderboard, the tables and the figures from the trials' folders."""
    notes = {path.parent.name: read_notes(path.parent) for path in (folder / "trials").glob("*/trial.json")}
    trials = dict(sorted(notes.items(), key=lambda item: item[1]["number"]))
    return StudyResult(study, folder, trials, _write_results(study, folder))


def _write_results(study: Study, folder: Path) -> dict[str, Path]:
    return {}


# ---- the folder


def _study_file(folder: Path) -> Path:
    return folder / "study.yaml"


@contextlib.contextmanager
def _opened(study: Study, resume: bool) -> Iterator[Path]:
    """The study's folder, which is taken away again when a mistake is found before it is a study."""
    folder = Path(study.studies).expanduser().absolute() / study.name
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


def _check_same_study(study: Study, folder: Path) -> None:
    before, now = (_fixed(each) for each in (load_study(str(_study_file(folder))), study))
    for key, value in now.items():
        if value != before[key]:
            raise ConfigError(
                f"{key}: is another than in the study in {folder}, so its trials cannot be compared with those to "
                "come; set it back to resume, or start a new study (name=...)"
            )


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
    return [
        applicable(
            study,
            {
                key: _draw(dimension, named_generator(f"study/{key}", study.search.seed, number))
                for key, dimension in study.space.items()
            },
        )
        for number in range(study.search.trials or 0)
    ]


def _draw(dimension: Dimension, generator: torch.Generator) -> Any:
    share = float(torch.rand((), generator=generator, dtype=torch.float64))
    if dimension.range is None:
        return dimension.values[int(share * len(dimension.values))]
    low, high = dimension.range
    if dimension.integers:
        return int(low) + int(share * (int(high) - int(low) + 1))
    value = low * (high / low) ** share if dimension.log_uniform else low + (high - low) * share
    return float(f"{value:.6g}")  # what a person can read and repeat


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


# ---- data sets


def _prepare_data(study: Study, trials: list[Trial], on_simulation: OnSimulation | None) -> dict[str, str]:
    """Check what the trials need of their data sets, simulate those that are not there; returns digests by path."""
    configs: dict[str, Config] = {}
    for trial in trials:
        config = trial.configs[0]
        _check_settings(study, config)
        first = configs.setdefault(config.data.path, config)
        if first.simulation != config.simulation:
            raise ConfigError(
                f"data.path: {config.data.path} would hold another data set for each trial, since the space varies "
                "its simulation; vary data.path along with it, for example by presets"
            )
    digests = {}
    for path, config in configs.items():
        if config.simulation is not None:
            prepare.simulate(config, "keep", on_simulation)
        particles = open_particles(path)
        _check_truth(study, particles)
        digests[path] = particles.manifest.sha256
    return digests


def _check_settings(study: Study, config: Config) -> None:
    held_out = getattr(config.data, "heldout_fraction", 0.0)
    for objective in study.objective:
        if CRITERIA[objective.metric].needs == "heldout" and not held_out:
            raise ConfigError(
                f"objective: {objective.metric} needs particles that training never sees; set data.heldout_fraction, "
                "for example to 0.1"
            )
        if objective.metric.startswith("select/residual") and held_out:
            raise ConfigError(
                f"objective: with data.heldout_fraction={held_out:g} the residual is that of held-out particles; use "
                f"{objective.metric.replace('residual_', 'heldout_').replace('residual', 'heldout_loss')}"
            )


def _check_truth(study: Study, particles: ParticleSet) -> None:
    for objective in study.objective:
        if CRITERIA[objective.metric].needs != "truth":
            continue
        what = "volume" if objective.metric.startswith("fsc/") else "poses"
        known = particles.manifest.truth_volume if what == "volume" else particles.read_truth()
        if known is None:
            free = ", ".join(name for name, each in CRITERIA.items() if not each.needs and name.startswith("select/"))
            raise ConfigError(
                f"objective: {objective.metric} compares with the true {what}, which {particles.path} does not hold; "
                f"choose one without truth, such as {free}"
            )


def _check_digests(folder: Path, digests: dict[str, str]) -> None:
    before = read_study_notes(folder).get("datasets", {})
    for path, digest in digests.items():
        if before.get(path, digest) != digest:
            raise DataError(
                f"{path}: not the particles that the study in {folder} began with (sha256 {digest[:12]}, then "
                f"{before[path][:12]}); put those back, or start a new study (name=...)"
            )


# ---- trials


def _check_address(study: Study, address: str) -> None:
    if address != HERE:
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

    sweep.sweep(study, waiting, address, on_event, make)


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
