"""The MLflow run of a training run: parameters, step metrics, figures, volume. Everything is in a journal first."""

import logging
import math
import subprocess
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from aceray.config import Config
from aceray.folder import RunFolder
from aceray.presets import flat
from aceray.tracking.journal import Journal, has_journal
from aceray.tracking.sender import Sender
from aceray.tracking.store import Store, installed, resolve_uri

_log = logging.getLogger("aceray")
# How long a run waits for its store, at the start, where mistakes of the settings are found, and at the end.
SECONDS_TO_START = 15.0
SECONDS_TO_MAKE_A_DATABASE = 120.0
SECONDS_TO_FINISH = 60.0
SECONDS_WHEN_INTERRUPTED = 4.0


class Untracked:
    """What a run or a study of which nothing is tracked says of itself; those that are tracked say more."""

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, as soon as it is known."""
        return None

    @property
    def backlog(self) -> int | None:
        """How many records (a step, a set of files, a change of status) MLflow has not taken yet; None: not tracked."""
        return None


class Tracker(Untracked):
    """Tracking that is off; the parent of the one that is on, so that a run need not know which it has."""

    status_before: str = "FINISHED"
    status_at_end: str = "FINISHED"
    last_step: int = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step."""

    def keep(self, paths: Iterable[Path], note: str = "") -> None:
        """Store files or folders with the run, and a note that the interface shows."""

    def summarise(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the results of the final evaluation at the last step, also when that step has metrics already."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as finished, failed (an error) or killed (an interrupt)."""


class JournalTracker(Tracker):
    """Writes of one run, named by its key, into a journal. A step is recorded once, however often a run passes it.

    All of it raises DataError when the journal cannot be written.
    """

    def __init__(self, journal: Journal, key: str = "") -> None:
        self.journal, self.key = journal, key
        self.last_step = journal.last_step.get(key, 0)

    @property
    def run_id(self) -> str | None:
        return self.journal.runs.get(self.key)

    @property
    def backlog(self) -> int:
        return self.journal.backlog

    def begin(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None) -> None:
        """Make the run, below that of the key `parent`, or go on with it."""
        texts = {setting: str(value) for setting, value in settings.items()}
        begun = {"name": name, "settings": texts, "tags": dict(tags), "parent": parent}
        self.journal.append(self.key, "begin", **begun, key=uuid.uuid4().hex)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record finite metrics of a step that has none yet."""
        if step > self.last_step:
            self.last_step = step
            self.journal.append(self.key, "points", step=step, metrics=_finite(metrics))

    def summarise(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step that may have some already."""
        self.journal.append(self.key, "points", step=step, metrics=_finite(metrics), final=True)

    def keep(self, paths: Iterable[Path], note: str = "") -> None:
        """Store files and folders as artifacts under their own names, and the note."""
        folder = self.journal.path.parent
        names = [str(path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()) for path in paths]
        self.journal.append(self.key, "files", paths=names)
        if note:
            self.tag({"mlflow.note.content": note})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self.journal.append(self.key, "tags", tags=dict(tags))

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.journal.append(self.key, "end", status=status)


class MlflowTracker(JournalTracker):
    """A run with a journal of its own, which a thread sends while the context is open."""

    def __init__(self, journal: Journal, sender: Sender) -> None:
        super().__init__(journal)
        self.sender = sender

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run and send what waits; an outage here is a warning, not the end of a finished training."""
        self.end(self.status_at_end if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")
        finish(self.sender, kind)


def finish(sender: Sender, kind: type[BaseException] | None) -> None:
    """Send what is left of a journal, shortly after an interrupt, and say what stays behind."""
    interrupted = kind is not None and not issubclass(kind, Exception)
    sender.finish(SECONDS_WHEN_INTERRUPTED if interrupted else SECONDS_TO_FINISH)
    sender.journal.close()
    if left := sender.journal.backlog:
        folder = sender.journal.path.parent
        _log.warning(
            "MLflow: tracking is incomplete, %d records have not been sent; `aceray sync %s` sends them", left, folder
        )


def start_tracking(config: Config, folder: RunFolder, tags: Mapping[str, str]) -> Tracker:
    """The MLflow run of this run folder: a new one, or the same one again when the folder knows it.

    Off, with one notice, when MLflow is not installed; off when tracking.enabled is false. A store that does not answer
    is a warning: the journal in the folder keeps everything until it does. What a killed run could not send any more
    is sent now.

    Raises:
        ConfigError: tracking.uri names a store that cannot be used, or tracking.experiment a deleted experiment.
        DataError: the journal is damaged or cannot be written.
    """
    if not wanted(config, folder.path):
        return Tracker()
    before = folder.read_notes()
    new = not has_journal(folder.path)
    journal = Journal(folder.path)
    if new and "mlflow_run_id" in before:  # of a study, which sent what the history holds
        journal.runs[""], journal.status[""] = before["mlflow_run_id"], before.get("mlflow_status", "FINISHED")
        journal.last_step[""] = max((int(row["step"]) for row in folder.read_history()), default=0)
    tracker = MlflowTracker(journal, sender_of(journal, config))
    tracker.status_before = journal.status.get("", "FINISHED")
    tracker.begin(config.name, flat(config), tags)
    send_history(tracker, folder)
    start(tracker.sender)
    if tracker.run_id is not None:
        folder.write_notes(mlflow_run_id=tracker.run_id)
    return tracker


def wanted(config: Config, results: Path) -> bool:
    """Whether tracking is on and possible."""
    if config.tracking.enabled and not installed():
        _log.warning("MLflow is not installed: tracking is off, the results are in %s", results)
        return False
    return config.tracking.enabled


def sender_of(journal: Journal, config: Config) -> Sender:
    """What sends the journal to the store that the settings name."""
    journal.store = {"uri": resolve_uri(config.tracking.uri), "experiment": config.tracking.experiment}
    return Sender(journal, lambda: Store(**journal.store, folder=journal.path.parent))


def start(sender: Sender) -> None:
    """Start sending; ConfigError when the store cannot be used."""
    served = sender.uri.startswith("http")
    try:
        sender.start(SECONDS_TO_START if served else SECONDS_TO_MAKE_A_DATABASE)
    except BaseException:
        sender.finish(0.0)
        sender.journal.close()
        raise


def send_history(tracker: JournalTracker, folder: RunFolder) -> None:
    """What the history of the run holds and the tracker does not yet."""
    for row in folder.read_history():
        tracker.log(int(row["step"]), {key: value for key, value in row.items() if key != "step" and value is not None})


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def presets_tag(config: Config) -> str:
    """The presets that a run was given, as its tag aceray.presets names them."""
    return ", ".join(config.presets) or "base"


def software_tags() -> dict[str, str]:
    """Versions of what computes, and the git commit of the working directory when it has one."""
    tags = {}
    for package in ("aceray", "torch", "ray", "mlflow"):
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        tags["mlflow.source.git.commit"] = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return tags
