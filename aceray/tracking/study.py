"""A study in MLflow: a parent run, a child for each trial, grandchildren for the two runs of a pair.

Written by the study's own process alone, which follows the journals that the trials leave in their folders: however
many trials run at once, the store has one writer, and nothing is lost that reached a disk.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from aceray.config import Config
from aceray.folder import RunFolder, write_json
from aceray.presets import flat, load_config
from aceray.tracking.run import (
    MlflowTracker,
    connect,
    create_run,
    earlier_run,
    experiment_id,
    first_line,
    presets_tag,
    resolve_uri,
    send_journal,
    software_tags,
    usable,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger("aceray")
# by the status of a trial; those of MLflow are fewer
STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
ALIAS = "best"
# more columns than that cannot be read side by side
MOST_COMPARED = 20
# MLflow cuts longer values of a tag, in the middle of a line
LONGEST_NOTE = 8000


class StudyTracker:
    """Tracking of a study that is off; the parent of the one that is on."""

    run_id: str | None = None
    uri: str | None = None

    @property
    def backlog(self) -> int:
        """Points that the store has not taken yet, of all trials."""
        return 0

    def follow(self, trial: Path) -> None:
        """Record what is new in the folder of a trial."""

    def summarise(self, paths: Iterable[Path], note: str, ranked: Sequence[str]) -> None:
        """Store the results with the parent run, and register the best trial as a model version.

        `ranked`: names of the finished trials, best first.
        """

    def __enter__(self) -> "StudyTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the parent run as finished, failed (an error) or killed (an interrupt)."""


class MlflowStudyTracker(StudyTracker):
    """A parent run and those below it. `notes` is the study.json that keeps their ids from one start to the next."""

    uri: str

    def __init__(self, client: "MlflowClient", config: Config, name: str, notes: Path, tags: Mapping[str, str]) -> None:
        self.client, self.name, self._notes = client, name, notes
        self.uri, self._tags = resolve_uri(config.tracking.uri), {"aceray.study": name, **tags}
        self._experiment = experiment_id(client, config.tracking.experiment, self.uri)
        self._known: dict[str, str] = _read(notes).get("mlflow_runs", {})
        self._ended: dict[str, str] = _read(notes).get("mlflow_ended", {})
        self._open: dict[str, MlflowTracker] = {}
        self._out = False
        before = self._known.get("")
        self._parent = self._tracker("", RunFolder(notes.parent), [], {}, self._tags)
        self.run_id = self._parent.run_id
        if before != self.run_id:  # its children are gone with it
            self._known, self._ended = {"": self.run_id}, {}
        self._keep_notes()

    @property
    def backlog(self) -> int:
        """Points that the store has not taken yet, of all trials."""
        return sum(tracker.backlog for tracker in list(self._open.values()))

    def follow(self, trial: Path) -> None:
        """Record what is new in the folder of a trial, and its end, once.

        An outage of the store is a warning: the next call, or the next start of the study, records what is missing.
        """
        try:
            self._follow(trial, _read(RunFolder(trial).trial))
            self._out = False
        except Exception as error:
            if not self._out:
                _log.warning("MLflow does not answer (%s); %s has everything", first_line(error), trial)
            self._out = True

    def _follow(self, trial: Path, notes: Mapping[str, Any]) -> None:
        if not notes or self._ended.get(trial.name) == notes["status"] != "running":
            return
        runs = _runs_of(trial)
        digests = {digest for run in runs if (digest := run.read_notes().get("dataset_sha256"))}
        if not digests and notes["status"] == "running":
            return  # its settings and its data will be there in a moment
        tags = {**self._tags, "aceray.trial": trial.name, "mlflow.parentRunId": str(self.run_id)}
        if digests:  # a trial that failed before it read anything keeps those of the study
            tags["aceray.dataset_sha256"] = ", ".join(sorted(digests))
        child = self._tracker(trial.name, RunFolder(trial), runs, notes["point"], tags)
        send_journal(child, RunFolder(trial))
        members = [(run, f"{trial.name}/{run.path.name}") for run in runs if run.path != trial]
        for run, key in members:
            below = {**tags, "mlflow.parentRunId": child.run_id}
            send_journal(self._tracker(key, run, [run], notes["point"], below), run)
        for key in (trial.name, *(key for _, key in members)):
            self._open[key].send()
        self._mark(child, notes)
        self._ended.pop(trial.name, None)
        if notes["status"] != "running":
            for run, key in members:
                self._end(key, run, notes, _results(notes, run, _read(run.metrics)))
            first = runs[0] if runs else RunFolder(trial)
            self._end(trial.name, RunFolder(trial), notes, _results(notes, first, notes["metrics"]))
            self._ended[trial.name] = notes["status"]
            self._keep_notes()

    def _tracker(
        self, key: str, folder: RunFolder, runs: list[RunFolder], point: Mapping[str, Any], tags: Mapping[str, str]
    ) -> MlflowTracker:
        """The tracker of a run, which is continued if it is known, else made, with the settings all `runs` share."""
        if key not in self._open:
            found = earlier_run(self.client, folder, self._known.get(key))
            if found is None:
                configs = [load_config(str(run.config)) for run in runs]
                settings = _shared(configs) or point
                tags = {**software_tags(), **tags, **({"aceray.presets": presets_tag(configs[0])} if configs else {})}
                made = create_run(self.client, self._experiment, key or self.name, settings, tags)
                found = MlflowTracker(self.client, made)
            self._open[key], self._known[key] = found, found.run_id
            self._keep_notes()
        return self._open[key]

    def _mark(self, child: MlflowTracker, notes: Mapping[str, Any]) -> None:
        self.client.set_tag(child.run_id, "aceray.status", notes["status"])
        self.client.set_tag(child.run_id, "aceray.stop_reason", notes["reason"])

    def _end(self, key: str, folder: RunFolder, notes: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Final metrics and files of a run, whose tracker is let go; its folder learns its id."""
        tracker = self._open.pop(key)
        tracker.summarise(tracker.last_step, metrics)
        if folder.config.exists():
            folder.write_notes(mlflow_run_id=tracker.run_id)
        values = "".join(f"- {name}: {value}\n" for name, value in notes["point"].items())
        reason = f" ({notes['reason']})" if notes["reason"] else ""
        files = [path for name, path in folder.paths.items() if name != "checkpoints"]
        tracker.keep(files, f"Trial of the study {self.name}, {notes['status']}{reason}.\n\n{values}")
        tracker.status_at_end = STATUS[notes["status"]]
        tracker.__exit__(None, None, None)

    def summarise(self, paths: Iterable[Path], note: str, ranked: Sequence[str]) -> None:
        """Store files and a note with the parent; the best trial becomes the version of the study's model called best.

        The version is the trial's plain files, its run's artifacts; nothing is pickled.
        """
        found = [run_id for name in ranked if (run_id := self._known.get(name)) is not None]
        self._parent.keep(paths, _shortened(self._links(found) + note))
        if found and found[0] == self._known.get(ranked[0]):
            try:
                self._register(found[0])
            except Exception as error:
                _log.warning("MLflow: the best trial could not be registered (%s)", first_line(error))

    def _links(self, runs: list[str]) -> str:
        """From the parent's page to the comparison of the trials, and to all runs in the mode for training.

        The list of runs folds the trials away, and MLflow opens an experiment in its mode for language models.
        """
        everything = f"[All runs](#/experiments/{self._experiment}?workflowType=machine_learning)\n\n"
        if len(runs) < 2:
            return everything
        best = runs[:MOST_COMPARED]
        query = urlencode({"runs": json.dumps(best), "experiments": json.dumps([self._experiment])}, quote_via=quote)
        title = "Compare the trials" if best == runs else f"Compare the best {len(best)} trials"
        return f"[{title}](#/compare-runs?{query}) · {everything}"

    def _register(self, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # it is there from the last time
            self.client.create_registered_model(self.name, description=f"Best trials of the study {self.name}")
        versions = self.client.search_model_versions(f"name='{self.name}'")
        found = next((version for version in versions if version.run_id == run_id), None)
        if found is None:
            source = self.client.get_run(run_id).info.artifact_uri
            found = self.client.create_model_version(self.name, source=source or "", run_id=run_id)
        self.client.set_registered_model_alias(self.name, ALIAS, found.version)

    def _keep_notes(self) -> None:
        known = {"tracking_uri": self.uri, "mlflow_runs": self._known, "mlflow_ended": self._ended}
        write_json(self._notes, _read(self._notes) | known)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of trials that did not end, then end the parent."""
        for key, tracker in self._open.items():
            if key:
                tracker.status_at_end = STATUS["interrupted"]
                tracker.__exit__(None, None, None)
        self._parent.__exit__(kind, error, trace)


def start_study_tracking(config: Config, name: str, folder: Path, tags: Mapping[str, str]) -> StudyTracker:
    """The MLflow runs of the study in that folder, made or continued; `config` has the tracking settings of its base.

    Raises:
        ConfigError: tracking.uri names a store that cannot be used, or tracking.experiment a deleted experiment.
    """
    client = connect(config, str(folder))
    if client is None:
        return StudyTracker()
    with usable(resolve_uri(config.tracking.uri)):
        return MlflowStudyTracker(client, config, name, folder / "study.json", tags)


def _runs_of(trial: Path) -> list[RunFolder]:
    """The run that the trial is, or those of the pair in it."""
    found = [RunFolder(path) for path in (trial, *sorted(path for path in trial.iterdir() if path.is_dir()))]
    return [run for run in found if run.config.exists()]


def _shared(configs: list[Config]) -> dict[str, Any]:
    """The settings that all have in common."""
    settings = [flat(config) for config in configs]
    return {
        key: value
        for key, value in (settings[0] if settings else {}).items()
        if all(each.get(key) == value for each in settings)
    }


def _results(notes: Mapping[str, Any], run: RunFolder, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The final metrics of a run; of one that is over before its end, how far it came."""
    if notes["status"] == "finished":
        known = {name: value for name, value in metrics.items() if value is not None}
        return {name: value for name, value in known.items() if not name.startswith("train/loss")}
    history = run.read_history() if notes["status"] in ("failed", "stopped") else []
    return {"train/steps": float(history[-1]["step"])} if history else {}


def _shortened(note: str) -> str:
    """The lines of a note that MLflow can hold, and where the rest is."""
    if len(note) <= LONGEST_NOTE:
        return note
    rest = "\nThe rest is in leaderboard.md, among the artifacts.\n"
    return note[: note.rindex("\n", 0, LONGEST_NOTE - len(rest)) + 1] + rest


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
