"""A trial in the process that Ray Tune gave it: its reports go to Tune, and Tune's changes into its settings."""

import contextlib
import dataclasses
import functools
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray import tune

from aceray.build import last_step
from aceray.distributed.shelf import in_touch, reader
from aceray.distributed.trial import Report, Trial, changed, read_notes, run_trial, write_notes
from aceray.errors import AcerayError
from aceray.presets import flat, load_config
from aceray.study import Study

# In the folder of a checkpoint, the name of the trial that it comes from.
OWNER = "owner.txt"


def trainable_of(study: Study, population: list[Trial], shelf: Any) -> Callable[[dict[str, Any]], None]:
    """The function that Tune runs for each trial."""
    trials = {trial.name: trial for trial in population}
    return functools.partial(train, trials=trials, mutations=study.scheduler.mutations, shelf=shelf)


def train(config: dict[str, Any], *, trials: dict[str, Trial], mutations: tuple[str, ...], shelf: Any) -> None:
    """Run a trial; `config` holds it, or of those in `trials` the values that may change in mid-run."""
    trial = config.get("trial") or trials[tune.get_context().get_trial_name()]
    torch.set_num_threads(max(1, int(trial.configs[0].resources.cpus_per_worker)))
    with tempfile.TemporaryDirectory(prefix="aceray-") as handed, in_touch(shelf, trial.name) as kept:
        donor = _donor(trial)
        trial = _with_values(trial, {key: config[key] for key in mutations}, donor)
        try:
            _report_all(trial, shelf, donor, Path(handed) if mutations else None)
        except KeyboardInterrupt:  # its study was told to end
            kept.set()
            # Tune would take any word of it for its end and begin another trial; the study's process kills this one
            threading.Event().wait()


def _report_all(trial: Trial, shelf: Any, start_from: Path | None, handed: Path | None) -> None:
    """Run the trial; report every evaluation, and how it ended, to Tune."""
    last = {"step": 0, "steps": last_step(trial.configs[0]), "particles_per_second": 0.0}
    try:
        with contextlib.closing(run_trial(trial, reader(shelf), start_from)) as reports:
            for report in reports:
                last = dataclasses.asdict(report)
                last = {**last.pop("metrics"), **last, "checkpoint": None}
                # The last step is reported below: by then the results are written and nothing can be stopped.
                if report.step < report.steps:
                    tune.report(last, checkpoint=_hand(trial, report, handed))
    except AcerayError as error:
        tune.report({**last, "ended": "failed", "failed": str(error), "done": True})
        return
    tune.report({**last, "ended": "finished", "done": True})


def _hand(trial: Trial, report: Report, handed: Path | None) -> tune.Checkpoint | None:
    """A copy of the run's checkpoint for other trials, with the name of the one it comes from."""
    if handed is None or report.checkpoint is None:
        return None
    for left in handed.iterdir():
        left.unlink()
    shutil.copy(report.checkpoint, handed)
    (handed / OWNER).write_text(trial.name)
    return tune.Checkpoint(str(handed))


def _donor(trial: Trial) -> Path | None:
    """The checkpoint of another trial that this one goes on from; None when it goes on from its own."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    folder = Path(checkpoint.path)
    if (folder / OWNER).read_text() == trial.name:
        return None
    return next(folder.glob("*.safetensors"))


def value_now(trial: Trial, key: str) -> Any:
    """The value of a setting in the trial's run, which may have been changed since it began."""
    written = trial.members[0].config
    return flat(load_config(str(written)))[key] if written.exists() else trial.point[key]


def _with_values(trial: Trial, values: dict[str, Any], donor: Path | None) -> Trial:
    """The trial with the values that Tune gave it; what changes is noted in its trial.json."""
    if not values:
        return trial
    config = trial.configs[0]
    if donor is not None:
        step = int(donor.stem.removeprefix("step-"))
        noted = read_notes(trial.folder).get("changes", [])
        new = [
            {"step": step, "key": key, "value": value, "from": (donor.parent / OWNER).read_text()}
            for key, value in values.items()
        ]
        write_notes(trial, changes=noted + [change for change in new if change not in noted[-len(new) :]])
    # Every evaluation may be the one that others go on from.
    every = config.train.evaluate_every
    return dataclasses.replace(trial, configs=(changed(config, **values, **{"train.checkpoint_every": every}),))
