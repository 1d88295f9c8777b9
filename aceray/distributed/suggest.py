"""What Ray Tune does in a study: Optuna's suggestions, which a file remembers, and the schedulers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from aceray.distributed.trial import ENDED, Trial, read_notes
from aceray.em.random import named_generator
from aceray.folder import RunFolder
from aceray.study import Dimension, Point, Study, suggested_point

# Rungs that no trial reaches do no harm.
_BEYOND_ALL_STEPS = 10**9

MakeTrial = Callable[[int, Point], Trial]


# ---- Optuna


class Suggestions(OptunaSearch):
    """Points from Optuna's TPE, remembered in `file`; trials that were not told to it before come first.

    The parts of Optuna's study are the numbers of the trials and their points: a study that was killed goes on with
    them, whatever became of Ray.
    """

    def __init__(self, study: Study, file: Path, make_trial: MakeTrial) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        before = _trials_in(storage, study.name)
        # another seed for every continuation, or the first points would come again
        seed = int(named_generator("study/optuna", study.search.seed, before).initial_seed() % 2**32)
        metrics = [objective.metric for objective in study.objective]
        modes = [objective.direction for objective in study.objective]
        super().__init__(
            lambda trial: {"trial": make_trial(trial.number, suggested_point(study, trial))},
            metric=metrics if len(metrics) > 1 else metrics[0],
            mode=modes if len(modes) > 1 else modes[0],
            sampler=optuna.samplers.TPESampler(seed=seed),
            study_name=study.name,
            storage=storage,
        )
        self._memory: optuna.Study = self._ot_study  # pyright: ignore[reportAttributeAccessIssue]
        self._objectives = metrics
        self._unfinished = self._left_behind(study, make_trial)
        ended = len(self._memory.trials) - len(self._unfinished)
        self.remaining = max(0, (study.search.trials or 0) - ended)
        """How many trials are still to run, those that go on among them."""

    def _left_behind(self, study: Study, make_trial: MakeTrial) -> list[optuna.trial.Trial]:
        """Trials that were given out and not told; those that ended in the meantime are told now."""
        left = []
        for frozen in self._memory.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            given = optuna.trial.Trial(self._memory, frozen._trial_id)
            notes = read_notes(make_trial(frozen.number, suggested_point(study, given)).folder)
            if notes.get("status") in ENDED:
                values = None if notes["status"] == "failed" else self._values(notes["metrics"])
                state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL
                self._memory.tell(given, values, state=state)
            else:
                left.append(given)
        return left

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Called by Tune for its next trial."""
        if self._unfinished and trial_id not in self._ot_trials:
            self._ot_trials[trial_id] = self._unfinished.pop(0)
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing is told before the end: no trial is pruned by Optuna."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the objectives of a trial that ended; one without them is told as failed."""
        good = result is not None and not result.get("failed") and self._values(result) is not None
        super().on_trial_complete(trial_id, result if good else None, error or not good)

    def _values(self, metrics: dict[str, Any]) -> list[float] | None:
        values = [metrics.get(metric) for metric in self._objectives]
        finite = [float(value) for value in values if value is not None and math.isfinite(value)]
        return finite if len(finite) == len(values) else None

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; Optuna's own is the truth."""
        Path(checkpoint_path).touch()


def _trials_in(storage: optuna.storages.BaseStorage, name: str) -> int:
    names = [each.study_name for each in optuna.study.get_all_study_summaries(storage)]
    return len(optuna.load_study(study_name=name, storage=storage).trials) if name in names else 0


# ---- schedulers


@dataclass(frozen=True)
class _Earlier:
    """A trial of an earlier start, as far as a scheduler looks at one."""

    trial_id: str


def experienced_scheduler(study: Study, folder: Path) -> TrialScheduler:
    """The scheduler of a study that may have been run before: it knows what the trials in the folder reported then.

    So a trial that comes now is compared with all that came before. A trial that goes on reports again what comes after
    its checkpoint; a population goes on whole, and needs no memory.
    """
    scheduler = scheduler_of(study)
    if study.scheduler.kind not in ("asha", "median"):
        return scheduler
    controller: Any = None  # neither of them asks it anything here
    for file in sorted((folder / "trials").glob("*/trial.json")):
        trial: Any = _Earlier(file.parent.name)
        for report in _reports(file.parent, study.objective[0].metric):
            # as the last of an ended trial, which both keep without deciding anything
            scheduler.on_trial_add(controller, trial)
            scheduler.on_trial_complete(controller, trial, report)
    return scheduler


def _reports(folder: Path, metric: str) -> list[dict[str, Any]]:
    """What a trial reported of a metric, by step, up to where it would go on."""
    notes, rows = read_notes(folder), RunFolder(folder).read_history()
    if notes.get("status") not in ENDED:
        runs = [RunFolder(file.parent) for file in (*folder.glob("config.yaml"), *folder.glob("*/config.yaml"))]
        kept = min((max(run.checkpoint_steps(), default=0) for run in runs), default=0)
        rows = [row for row in rows if row["step"] <= kept]
    found = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
    if rows and notes.get("status") == "finished" and notes["metrics"].get(metric) is not None:
        found[rows[-1]["step"]] = notes["metrics"][metric]
    return [{"step": step, metric: value} for step, value in sorted(found.items())]


def scheduler_of(study: Study) -> TrialScheduler:
    """The scheduler of Ray Tune that a study asks for; time is counted in training steps."""
    asked = study.scheduler
    objective = study.objective[0]
    common: dict[str, Any] = {"time_attr": "step", "metric": objective.metric, "mode": objective.direction}
    match asked.kind:
        case "asha":
            return ASHAScheduler(
                **common,
                max_t=_BEYOND_ALL_STEPS,
                grace_period=asked.grace_steps,
                reduction_factor=asked.reduction_factor,
                stop_last_trials=False,
            )
        case "median":
            # No trial yields to one that waits: it would have to start again. Only infinity keeps its first turn, too.
            never: Any = math.inf
            return MedianStoppingRule(**common, grace_period=asked.grace_steps, min_time_slice=never)
        case "pbt":
            dimensions = {key: study.space[key] for key in asked.mutations}
            return PopulationBasedTraining(
                **common,
                perturbation_interval=asked.perturb_steps,
                hyperparam_mutations={key: _domain(dimension) for key, dimension in dimensions.items()},
                custom_explore_fn=lambda config: {**config, **_within(dimensions, config)},
            )
        case "none":
            return FIFOScheduler()


def _domain(dimension: Dimension) -> Any:
    """What population-based training draws a new value from; a list is walked from neighbour to neighbour."""
    if dimension.range is None:
        return sorted(dimension.values)
    low, high = dimension.range
    if dimension.integers:
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if dimension.log_uniform else tune.uniform(low, high)


def _within(dimensions: dict[str, Dimension], config: dict[str, Any]) -> dict[str, Any]:
    """Values that were multiplied, brought back into their range."""
    return {
        key: min(max(config[key], dimension.range[0]), dimension.range[1])
        for key, dimension in dimensions.items()
        if dimension.range is not None
    }
