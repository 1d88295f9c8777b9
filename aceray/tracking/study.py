"""A study in MLflow: a parent run, a child for each trial, grandchildren for the two runs of a pair.

Written by the study's own process alone, which follows the journals that the trials leave in their folders: however
many trials run at once, the store has one writer, and nothing is lost that reached a disk.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from aceray.config import Config
from aceray.folder import RunFolder, write_json
from aceray.presets import flat, load_config
from aceray.tracking.journal import Journal
from aceray.tracking.run import (
    JournalTracker,
    Untracked,
    finish,
    presets_tag,
    send_history,
    sender_of,
    software_tags,
    start,
    wanted,
)
from aceray.tracking.sender import Sender

# by the status of a trial; those of MLflow are fewer
STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}


class StudyTracker(Untracked):
    """Tracking of a study that is off; the parent of the one that is on. `run_id` is that of the parent run."""

    uri: str | None = None

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
    """A parent run and those below it, in one journal in the folder of the study.

    `notes` is the study.json that keeps, from one start to the next, which trials have ended.
    """

    uri: str

    def __init__(self, sender: Sender, name: str, notes: Path, tags: Mapping[str, str]) -> None:
        self.name, self.uri, self._notes, self._sender = name, sender.uri, notes, sender
        self._journal, self._tags = sender.journal, {"aceray.study": name, **tags}
        before = _read(notes)
        self._ended: dict[str, str] = before.get("tracked", {})
        self._marked: dict[str, tuple[str, str]] = {}
        self._open: dict[str, JournalTracker] = {}
        self._untold: list[tuple[str, RunFolder, str]] = []
        self._parent = JournalTracker(self._journal)
        self._parent.begin(name, {}, {**software_tags(), **self._tags})
        write_json(notes, before | {"tracking_uri": self.uri})

    @property
    def run_id(self) -> str | None:
        return self._parent.run_id

    @property
    def backlog(self) -> int:
        return self._journal.backlog

    def follow(self, trial: Path) -> None:
        """Record what is new in the folder of a trial, and its end, once."""
        self._tell_folders()
        notes = _read(RunFolder(trial).trial)
        if not notes or self._ended.get(trial.name) == notes["status"] != "running":
            return
        runs = _runs_of(trial)
        digests = {digest for run in runs if (digest := run.read_notes().get("dataset_sha256"))}
        if not digests and notes["status"] == "running":
            return  # its settings and its data will be there in a moment
        tags = {**self._tags, "aceray.trial": trial.name}
        if digests:  # a trial that failed before it read anything keeps those of the study
            tags["aceray.dataset_sha256"] = ", ".join(sorted(digests))
        child = self._tracker(trial.name, "", runs, notes["point"], tags)
        send_history(child, RunFolder(trial))
        members = [(run, f"{trial.name}/{run.path.name}") for run in runs if run.path != trial]
        for run, key in members:
            send_history(self._tracker(key, trial.name, [run], notes["point"], tags), run)
        if self._marked.get(trial.name) != (mark := (notes["status"], notes["reason"])):
            child.tag({"aceray.status": mark[0], "aceray.stop_reason": mark[1]})
            self._marked[trial.name] = mark
        self._ended.pop(trial.name, None)
        if notes["status"] != "running":
            for run, key in members:
                self._end(key, run, notes, _results(notes, run, _read(run.metrics)))
            first = runs[0] if runs else RunFolder(trial)
            self._end(trial.name, RunFolder(trial), notes, _results(notes, first, notes["metrics"]))
            self._ended[trial.name] = notes["status"]
            write_json(self._notes, _read(self._notes) | {"tracked": self._ended})

    def _tracker(
        self, key: str, parent: str, runs: list[RunFolder], point: Mapping[str, Any], tags: Mapping[str, str]
    ) -> JournalTracker:
        """The tracker of a run, which goes on if it is known, else is made, with the settings all `runs` share."""
        if key not in self._open:
            configs = [load_config(str(run.config)) for run in runs]
            named = {"aceray.presets": presets_tag(configs[0])} if configs else {}
            found = JournalTracker(self._journal, key)
            found.begin(key, _shared(configs) or point, {**software_tags(), **tags, **named}, parent)
            self._open[key] = found
        return self._open[key]

    def _end(self, key: str, folder: RunFolder, notes: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Final metrics and files of a run, whose tracker is let go."""
        tracker = self._open.pop(key)
        tracker.summarise(tracker.last_step, metrics)
        values = "".join(f"- {name}: {value}\n" for name, value in notes["point"].items())
        reason = f" ({notes['reason']})" if notes["reason"] else ""
        if folder.config.exists():
            self._untold.append((key, folder, STATUS[notes["status"]]))
            self._tell_folders()  # before run.json is among the files
        files = [path for name, path in folder.paths.items() if name != "checkpoints"]
        tracker.keep(files, f"Trial of the study {self.name}, {notes['status']}{reason}.\n\n{values}")
        tracker.end(STATUS[notes["status"]])

    def _tell_folders(self) -> None:
        """Folders of runs that have ended learn the ids of their MLflow runs, once these are known."""
        for key, folder, status in [each for each in self._untold if each[0] in self._journal.runs]:
            folder.write_notes(mlflow_run_id=self._journal.runs[key], mlflow_status=status)
        self._untold = [each for each in self._untold if each[0] not in self._journal.runs]

    def summarise(self, paths: Iterable[Path], note: str, ranked: Sequence[str]) -> None:
        """Store files and a note with the parent; the best trial becomes the version of the study's model called best.

        The version is the trial's plain files, its run's artifacts; nothing is pickled.
        """
        self._parent.keep(paths)
        self._journal.append("", "note", note=note, compare=list(ranked))
        if ranked:
            self._journal.append("", "best", model=self.name, of=ranked[0])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of trials that did not end, then end the parent and send what waits."""
        for key in list(self._open):
            self._open.pop(key).end(STATUS["interrupted"])
        self._parent.end("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")
        finish(self._sender, kind)
        self._tell_folders()


def start_study_tracking(config: Config, name: str, folder: Path, tags: Mapping[str, str]) -> StudyTracker:
    """The MLflow runs of the study in that folder, made or continued; `config` has the tracking settings of its base.

    Raises:
        ConfigError: tracking.uri names a store that cannot be used, or tracking.experiment a deleted experiment.
        DataError: the journal is damaged or cannot be written.
    """
    if not wanted(config, folder):
        return StudyTracker()
    tracker = MlflowStudyTracker(sender_of(Journal(folder), config), name, folder / "study.json", tags)
    start(tracker._sender)
    return tracker


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


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
