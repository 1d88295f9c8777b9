"""Several starts of one run side by side; the best of them by a score that needs no truth becomes the run.

A study (study_run.py) with the seed as its only dimension. Its folder, `runs/NAME.starts`, stays beside the run's.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from aceray.config import Config
from aceray.data.storage import hidden_sibling, storage_error
from aceray.distributed.study_run import HERE, OnEvent, StudyResult, ranked_trials, run_study
from aceray.distributed.trial import changed
from aceray.errors import DataError
from aceray.folder import Existing, RunFolder, RunResult, create_run_folder, open_run_folder, take_away
from aceray.study import Objective, Study

SUFFIX = ".starts"
_OF_THE_STUDY = ("presets", "name", "runs", "seed", "seeds")


def train_starts(config: Config, existing: Existing = "error", on_event: OnEvent | None = None) -> RunResult:
    """Train from the seeds `seed` to `seed + seeds - 1`, as many at once as there is room for; returns the best.

    On the cluster of `resources.address`, or on a Ray of its own; one after another where Ray is not installed. Each
    start counts as a trial, and `on_event` is called as for a study.

    Raises:
        DataError: a folder is not free, or none of the starts came to its end (the first reason).
        AcerayError: as for a run and a study.
    """
    study = study_of_starts(config)
    _check_free(config, existing)
    found = run_study(study, _address(config), resume=existing == "resume", on_event=on_event)
    ranked = ranked_trials(found)
    if not ranked:
        raise DataError(f"{found.folder}: none of {len(found.trials)} starts came to an end; {_reason(found)}")
    return _kept(found.folder / "trials" / ranked[0], config)


def study_of_starts(config: Config) -> Study:
    """The study whose trials are the starts of a run."""
    dumped = config.model_dump(mode="json")
    if config.resources.workers == 1:  # which would only wait for a place beside its trial
        dumped["resources"]["workers"] = 0
    return Study(
        name=config.name + SUFFIX,
        studies=str(folder_of_starts(config).parent),
        description=f"starts of {config.name}; the best is {config.name} itself",
        base=tuple(f"{key}={json.dumps(value)}" for key, value in dumped.items() if key not in _OF_THE_STUDY),
        space={"seed": {"choices": [config.seed + number for number in range(config.seeds)]}},
        objective=(Objective(metric=config.label_free_score, mode="min"),),
    )


def folder_of_starts(config: Config) -> Path:
    """The folder of that study."""
    return Path(config.runs).absolute() / (config.name + SUFFIX)


def _address(config: Config) -> str:
    if importlib.util.find_spec("ray") is None:
        return HERE
    return config.resources.address or "local"


def _check_free(config: Config, existing: Existing) -> None:
    """Refuse what stands in the way before anything is trained, or take it away."""
    run = RunFolder(Path(config.runs).absolute() / config.name)
    if run.path.exists() and not run.is_free():
        if existing == "error":
            create_run_folder(config, existing)  # says what is there
        open_run_folder(run.path)  # what is no run is not touched
    starts = folder_of_starts(config)
    if existing == "overwrite" and (starts / "study.yaml").exists():
        take_away(starts)


def _kept(best: Path, config: Config) -> RunResult:
    """The folder of the best start under the name of the run."""
    source, seed = RunFolder(best), json.loads(RunFolder(best).trial.read_text())["point"]["seed"]
    target = Path(config.runs).absolute() / config.name
    part = hidden_sibling(target)
    try:
        shutil.copytree(best, part, ignore=shutil.ignore_patterns(source.trial.name, source.scratch.name))
        if target.exists():
            take_away(target)
        part.rename(target)
    except OSError as error:
        raise storage_error(target, error) from error
    # its settings as if it had been the only one
    folder = create_run_folder(changed(config, seed=seed, seeds=1), "resume")
    metrics = {name: value for name, value in json.loads(folder.metrics.read_text()).items() if value is not None}
    return RunResult(metrics, folder.path, folder.paths, folder.read_notes().get("mlflow_run_id"))


def _reason(found: StudyResult) -> str:
    reasons: list[Any] = [notes["reason"] for notes in found.trials.values() if notes.get("reason")]
    return f"the first: {reasons[0]}" if reasons else "they were interrupted; resume (--existing resume)"
