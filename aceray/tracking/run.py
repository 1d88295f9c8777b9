"""The MLflow run of a training run: parameters, step metrics, figures, volume; through MlflowClient, without pickle."""

import contextlib
import importlib.util
import logging
import math
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aceray.config import Config
from aceray.errors import ConfigError
from aceray.folder import RunFolder
from aceray.presets import flat

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger("aceray")
# Points wait until so many are there or so many seconds have passed: one call costs far more than one point.
POINTS_A_BATCH = 250
SECONDS_A_BATCH = 2.0
SECONDS_AFTER_AN_OUTAGE = 30.0
# A server that does not answer must not hold the run for MLflow's default of several minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Tracker:
    """Tracking that is off; the parent of the one that is on, so that a run need not know which it has."""

    run_id: str | None = None
    status_before: str = "FINISHED"
    status_at_end: str = "FINISHED"

    @property
    def backlog(self) -> int:
        """Points that the store has not taken yet."""
        return 0

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


class MlflowTracker(Tracker):
    """One MLflow run. A step is recorded once, however often a resumed run passes it."""

    run_id: str

    def __init__(self, client: "MlflowClient", run_id: str, last_step: int = 0) -> None:
        self.client, self.run_id, self.last_step = client, run_id, last_step
        self._waiting: list[tuple[str, float, int, int]] = []
        self._send_after = time.monotonic() + SECONDS_A_BATCH
        self._out = False

    @property
    def backlog(self) -> int:
        """Points that the store has not taken yet."""
        return len(self._waiting)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record finite metrics of a step; they reach the store in batches."""
        if step <= self.last_step:
            return
        self.last_step = step
        self._add(step, metrics)
        if time.monotonic() >= self._send_after or (len(self._waiting) >= POINTS_A_BATCH and not self._out):
            self.send()

    def keep(self, paths: Iterable[Path], note: str = "") -> None:
        """Store files and folders as artifacts under their own names, and the note."""
        try:
            for path in paths:
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), path.name)
                else:
                    self.client.log_artifact(self.run_id, str(path))
            if note:
                self.client.set_tag(self.run_id, "mlflow.note.content", note)
        except Exception as error:
            _log.warning("MLflow: files could not be stored (%s); they are in the run folder", first_line(error))

    def summarise(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step that may have some already."""
        self._add(step, metrics)

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [(name, float(value), now, step) for name, value in metrics.items() if math.isfinite(value)]

    def send(self) -> None:
        """Send what waits; what the store does not take waits on."""
        from mlflow.entities import Metric

        try:
            while self._waiting:
                points = self._waiting[:1000]
                self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])
                del self._waiting[: len(points)]
            self._out = False
            self._send_after = time.monotonic() + SECONDS_A_BATCH
        except Exception as error:
            if not self._out:
                _log.warning("MLflow does not answer (%s); points wait, history.jsonl has them", first_line(error))
            self._out = True
            self._send_after = time.monotonic() + SECONDS_AFTER_AN_OUTAGE

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what waits and end the run; an outage here is a warning, not the end of a finished training."""
        self.send()
        status = self.status_at_end if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.client.set_terminated(self.run_id, status)
        except Exception as failure:
            _log.warning("MLflow: the run could not be ended as %s (%s)", status, first_line(failure))


def start_tracking(config: Config, folder: RunFolder, tags: Mapping[str, str]) -> Tracker:
    """The MLflow run of this run folder: a new one, or the same one again when the folder knows it.

    Off, with one notice, when MLflow is not installed; off when tracking.enabled is false. Points of the journal that
    a killed run could not send any more are sent now.

    Raises:
        ConfigError: tracking.uri names a store that cannot be used, or tracking.experiment a deleted experiment.
    """
    client = connect(config, str(folder.path))
    if client is None:
        return Tracker()
    with usable(uri := resolve_uri(config.tracking.uri)):
        earlier = earlier_run(client, folder, folder.read_notes().get("mlflow_run_id"))
        if earlier is None:
            experiment = experiment_id(client, config.tracking.experiment, uri)
            earlier = MlflowTracker(client, create_run(client, experiment, config.name, flat(config), tags))
    folder.write_notes(mlflow_run_id=earlier.run_id)
    return earlier


def connect(config: Config, results: str) -> "MlflowClient | None":
    """A client of the tracking store, or None when tracking is off."""
    if not config.tracking.enabled:
        return None
    if not _installed():
        _log.warning("MLflow is not installed: tracking is off, the results are in %s", results)
        return None
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = resolve_uri(config.tracking.uri)
    with usable(uri):
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def usable(uri: str) -> Iterator[None]:
    """A store that refuses is a mistake of the settings."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, ImportError) as error:
        raise ConfigError(
            f"tracking.uri: {uri} cannot be used ({first_line(error)}); start the server, set another URI, "
            f"or tracking.enabled=false"
        ) from error


def resolve_uri(uri: str) -> str:
    """The tracking URI with a relative sqlite path made absolute, once, against the working directory."""
    scheme = "sqlite:///"
    if uri.startswith(scheme) and not uri.startswith(scheme + "/"):
        return f"{scheme}{Path(uri.removeprefix(scheme)).absolute()}"
    return uri


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


def _installed() -> bool:
    try:
        return importlib.util.find_spec("mlflow") is not None
    except (ImportError, ValueError):
        return False


def create_run(
    client: "MlflowClient", experiment: str, name: str, settings: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    from mlflow.entities import Param

    names = {"mlflow.runName": name, "mlflow.source.name": "aceray", "mlflow.source.type": "LOCAL"}
    run_id = client.create_run(experiment, run_name=name, tags={**names, **tags}).info.run_id
    parameters = [Param(key, str(value)) for key, value in settings.items()]
    for start in range(0, len(parameters), 100):
        client.log_batch(run_id, params=parameters[start : start + 100])
    return run_id


def experiment_id(client: "MlflowClient", name: str, uri: str) -> str:
    """Id of the experiment, made when it is new; the artifacts of a local database lie beside it."""
    from mlflow.exceptions import MlflowException

    beside = None
    if uri.startswith("sqlite:////"):
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        beside = (database.parent / "mlartifacts" / name).as_uri()
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=beside)
        except MlflowException:  # another run made it in this moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment: {name!r} was deleted in {uri}; choose another name, or restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return found.experiment_id


def earlier_run(client: "MlflowClient", folder: RunFolder, run_id: str | None) -> MlflowTracker | None:
    """The run of that id, going on after its last point; None when there is no id or the run was deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if info.lifecycle_stage != "active":
        return None
    # The total loss is logged at every step, so its last point says how far the store came.
    points = client.get_metric_history(run_id, "train/loss_total")
    tracker = MlflowTracker(client, run_id, max((point.step for point in points), default=0))
    tracker.status_before = info.status
    client.update_run(run_id, status="RUNNING")
    send_journal(tracker, folder)
    return tracker


def send_journal(tracker: Tracker, folder: RunFolder) -> None:
    """What the journal holds and the tracker does not yet."""
    for row in folder.read_history():
        tracker.log(int(row["step"]), {key: value for key, value in row.items() if key != "step" and value is not None})


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
