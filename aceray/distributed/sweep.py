"""A study on Ray Tune: its trials side by side, each in a process of its own, and what happens to them as events.

Tune decides what runs where, what is stopped and what is changed. What it writes for itself is thrown away at the end:
the folders of the trials, and for Optuna its file, are all that a study needs to go on.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayError

from aceray.config import Config
from aceray.distributed import notice
from aceray.distributed.cluster import connect, reserve
from aceray.distributed.failures import known_error
from aceray.distributed.shared_storage import check_shared
from aceray.distributed.shelf import News, open_shelf
from aceray.distributed.suggest import MakeTrial, Suggestions, experienced_scheduler
from aceray.distributed.trial import (
    ENDED,
    Report,
    Status,
    Trial,
    TrialEvent,
    event_of,
    read_notes,
    write_notes,
)
from aceray.distributed.tuned import trainable_of, value_now
from aceray.errors import ConfigError
from aceray.study import Point, Scheduler, Study, applicable

OnEvent = Callable[[TrialEvent], None]
_log = logging.getLogger("aceray")

# A cluster that cannot give a trial its place says so within half a minute.
PATIENCE_SECONDS = 20.0
# A trial that waits for its workers needs next to nothing, but Tune has no place that is nothing.
CPUS_OF_A_WAITING_TRIAL = 0.01
SECONDS_BETWEEN_NEWS = 1.0
# After so long without a call of a trial's process its user is told.
SECONDS_TO_CALL = 60.0
# How often a trial is started again whose process was lost.
MAX_FAILURES = 2
# Checkpoints of a trial that others may take up; Tune has a copy of each.
CHECKPOINTS_KEPT = 4
STORAGE = ".tune"
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean to the driver
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends a study as it ends a run
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metrics
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


def sweep(study: Study, waiting: list[Trial], address: str, on_event: OnEvent, make_trial: MakeTrial) -> None:
    """Run the trials of a study to their ends; `on_event` is called in this process whenever one gets further.

    `waiting` are the trials of a grid, of random points or of a population that have not ended; with Optuna it is
    empty and `make_trial` is called for each new point. An interrupt ends all trials within seconds, a notice
    (notice.py) when each has kept its present step; they, and those that the budget cut off, are marked as interrupted.

    Raises:
        ClusterError: the cluster does not answer, cannot give what a trial needs, or a node does not see the storage.
        ConfigError: the settings of a trial contradict one another or what the study asks for.
    """
    folder = Path(study.studies).expanduser().absolute() / study.name
    suggestions = Suggestions(study, folder / "optuna.jsonl", make_trial) if study.search.kind == "optuna" else None
    count = len(waiting) if suggestions is None else suggestions.remaining
    if count == 0:
        return
    first: Point = applicable(study, {key: dimension.values[0] for key, dimension in study.space.items()})
    config = (waiting[0] if waiting else make_trial(0, first)).configs[0]
    _check(study, config)
    with _quiet(), connect(None if address == "local" else address, dashboard=config.resources.workers > 0):
        place = find_place(study, config, address)
        if address != "local":
            paths = {Path(trial.configs[0].data.path) for trial in waiting} or {Path(config.data.path)}
            check_shared(folder, "studies", paths)
        shelf = open_shelf()
        follower = Follower(waiting, study.scheduler, on_event, shelf)
        trainable = tune.with_resources(trainable_of(study, waiting, shelf), place.needs)
        try:
            _fit(lambda: _tuner(study, trainable, place, follower, suggestions, count), follower)
        finally:
            with contextlib.suppress(RayError):
                ray.kill(shelf)
            follower.end()
            shutil.rmtree(folder / STORAGE, ignore_errors=True)


def _check(study: Study, config: Config) -> None:
    if study.scheduler.kind == "pbt" and config.resources.workers > 0:
        raise ConfigError(
            f"scheduler.kind: pbt exchanges trials that train in their own process; set resources.workers=0, found "
            f"{config.resources.workers}"
        )


# ---- places on the cluster


@dataclasses.dataclass(frozen=True)
class Place:
    """What Tune sets aside for a trial, and how many trials run at once."""

    needs: dict[str, float]
    at_once: int


def find_place(study: Study, config: Config, address: str) -> Place:
    """What the cluster gives a trial, after it has shown that it can, and how many of them it has now.

    Raises:
        ClusterError: it cannot give that, or not within resources.patience_seconds, else PATIENCE_SECONDS; the message
            says what there is.
    """
    resources = config.resources.model_copy(
        update={"address": None if address == "local" else address, "workers": max(1, config.resources.workers)}
    )
    share = study.search.gpus_per_trial if config.resources.workers == 0 and config.resources.gpu is not False else None
    # Counted before: what was reserved is given back only in a while.
    free = ray.available_resources()
    asked = reserve(resources, PATIENCE_SECONDS, share)
    cpus = config.resources.cpus_per_worker
    at_once = max(1, _workers_at_once(free, cpus, asked.gpus) // asked.workers)
    if config.resources.workers > 0:
        return Place({"cpu": CPUS_OF_A_WAITING_TRIAL}, min(at_once, study.search.concurrent or at_once))
    # Tune lets those wait that have no place yet, and an autoscaler starts nodes for them.
    at_once = study.search.concurrent or at_once
    return Place({"cpu": cpus} | ({"gpu": asked.gpus} if asked.gpus else {}), at_once)


def _workers_at_once(free: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many places of that size the nodes have, and are free."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(sum(_places(node, cpus, gpus) for node in nodes), _places(free, cpus, gpus))


def _places(there: Mapping[str, float], cpus: float, gpus: float) -> int:
    by_gpu = there.get("GPU", 0.0) / gpus if gpus else float("inf")
    return int(min(there.get("CPU", 0.0) / cpus, by_gpu) + 1e-6)


# ---- Tune


def _tuner(
    study: Study,
    trainable: Callable[[dict[str, Any]], None],
    place: Place,
    follower: "Follower",
    suggestions: Suggestions | None,
    count: int,
) -> tune.Tuner:
    folder = Path(study.studies).expanduser().absolute() / study.name
    changing = study.scheduler.kind == "pbt"
    return tune.Tuner(
        trainable,
        param_space={} if suggestions else _population(study, list(follower.trials.values())),
        tune_config=tune.TuneConfig(
            search_alg=suggestions,
            scheduler=experienced_scheduler(study, folder),
            num_samples=count if suggestions else 1,
            # A population takes turns on what there is: all of it must have begun.
            max_concurrent_trials=None if changing else place.at_once,
            time_budget_s=study.budget.wall_seconds,
            reuse_actors=changing,
            trial_name_creator=lambda one: _name(one.config),
            trial_dirname_creator=lambda one: _name(one.config),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(folder / STORAGE),
            callbacks=[follower],
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            verbose=0,
        ),
    )


def _population(study: Study, trials: list[Trial]) -> dict[str, Any]:
    """Names of the trials, and beside them the values that may change in mid-run."""
    values = {trial.name: {key: value_now(trial, key) for key in study.scheduler.mutations} for trial in trials}
    drawn = {
        key: tune.sample_from(lambda config, key=key: values[config["name"]][key]) for key in study.scheduler.mutations
    }
    return {"name": tune.grid_search(list(values)), **drawn}


def _name(config: dict[str, Any]) -> str:
    return config["trial"].name if "trial" in config else config["name"]


def _fit(tuner: Callable[[], tune.Tuner], follower: "Follower") -> None:
    interrupted = False
    try:
        with notice.heeded():
            tuner().fit()
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        raise follower.error or known_error(error) or error from error
    if interrupted:
        # Not raised again itself: its traceback holds what Tune has set aside on the cluster.
        follower.kill()
        gc.collect()
        raise KeyboardInterrupt("the study was interrupted")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own words: what a study has to say are its events."""
    before = {key: os.environ.get(key) for key in ENVIRONMENT}
    logger = logging.getLogger("ray")
    level = logger.level
    os.environ.update(ENVIRONMENT)
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(ray|optuna)\.")
            yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


class Follower(tune.Callback):
    """Turns what Tune tells of its trials into events of ours, and writes how they ended into their folders."""

    def __init__(self, trials: list[Trial], scheduler: Scheduler, on_event: OnEvent, shelf: Any) -> None:
        self.trials = {trial.name: trial for trial in trials}
        self.error: Exception | None = None
        """What a callback raised, which Tune would turn into text."""
        self._stopped_by, self._mutations = scheduler.kind, scheduler.mutations
        self._on_event = on_event
        self._running: dict[str, Any] = {}
        self._shelf, self._asked, self._silent = shelf, 0.0, set[str]()

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes itself down to be restored, which a study never does.
        return {}

    def _tell(self, one: Any, status: Status, report: Report | None = None, reason: str = "", **values: Any) -> None:
        """`values` are those of settings that may have been changed since the trial began."""
        try:
            trial = one.config.get("trial") or self.trials[str(one)]
            self.trials[trial.name] = trial
            if status in ("stopped", "failed"):
                write_notes(trial, status=status, reason=reason)
            known = {key: value for key, value in (values or one.config).items() if key in self._mutations}
            self._on_event(event_of(dataclasses.replace(trial, point=trial.point | known), status, report, reason))
        except Exception as error:
            self.error = error
            raise

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune looks at its trials, ten times a second; an interrupt when all have done what a notice asks for."""
        if time.monotonic() - self._asked < (0.1 if notice.given() else SECONDS_BETWEEN_NEWS):
            return
        try:
            news: News = ray.get(self._shelf.news.remote(notice.given()), timeout=1.0)
        except (GetTimeoutError, RayError):
            return
        finally:
            self._asked = time.monotonic()
        running = {str(trial) for trial in trials if trial.status == "RUNNING"}
        self._warn(news, running)
        if notice.given() and running <= news.kept:
            raise KeyboardInterrupt("the study was told to end")

    def _warn(self, news: News, running: set[str]) -> None:
        for name, text in news.warnings:
            _log.warning("%s: %s", name, text)
        silent = {name for name in running if news.silent_seconds.get(name, 0.0) > SECONDS_TO_CALL}
        for name in silent - self._silent:
            _log.warning(
                "%s: the trial's process has not answered for %.0f s; look at its node. If it hangs, end the study "
                "(Ctrl-C) and go on with it (--resume)", name, news.silent_seconds[name],
            )  # fmt: skip
        self._silent = silent

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process is there."""
        self._running[str(trial)] = trial.temporary_state.ray_actor
        self._tell(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """It has evaluated; what it reports at its end is told when Tune has seen it, too."""
        if not result["done"] or "ended" not in result:
            self._tell(trial, "running", _report_of(result), **result["config"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process was lost; another will go on from its checkpoint."""
        self._running[str(trial)] = None
        self._tell(trial, "running", reason="its process was lost; it goes on from its newest checkpoint")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It came to its end, failed with a reason, or the scheduler stopped it."""
        self._running.pop(str(trial), None)
        result = trial.last_result
        match result.get("ended"):
            case "finished":
                self._tell(trial, "finished", _report_of(result))
            case "failed":
                self._tell(trial, "failed", reason=result["failed"])
            case _:
                reason = f"{self._stopped_by}: at step {result.get('step', 0)} others were better"
                self._tell(trial, "stopped", _report_of(result), reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process was lost too often, or stopped by a mistake of ours."""
        self._running.pop(str(trial), None)
        self._tell(trial, "failed", reason=_reason(trial))

    def kill(self) -> None:
        """End the processes of all trials."""
        for actor in filter(None, self._running.values()):
            with contextlib.suppress(RayError):
                ray.kill(actor)

    def end(self) -> None:
        """Mark the trials that were running when Tune ended."""
        for name in self._running:
            trial = self.trials[name]
            if read_notes(trial.folder).get("status") not in ENDED:
                reason = "the study was ended"
                write_notes(trial, status="interrupted", reason=reason)
                self._on_event(event_of(trial, "interrupted", reason=reason))


def _report_of(result: dict[str, Any]) -> Report:
    metrics = {key: value for key, value in result.items() if "/" in key}
    return Report(result["step"], result["steps"], metrics, result["particles_per_second"])


def _reason(one: Any) -> str:
    """One line of what Tune wrote down about the last failure of a trial."""
    text = Path(one.error_file).read_text() if one.error_file and Path(one.error_file).exists() else ""
    lines = text.rsplit("Failure #", 1)[-1].strip().splitlines()[1:] or ["no reason given"]
    if "actor died" in lines[0].lower() or "actor is" in lines[0].lower():
        return f"its process was lost {MAX_FAILURES + 1} times; look at the memory of its node"
    return lines[-1].strip()[:300]
