"""MLflow itself: how a client is made, which of its errors will pass, and what each record of a journal does there."""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from aceray.errors import ConfigError
from aceray.secrets import masked
from aceray.tracking.journal import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The sender tries again by itself; MLflow's own retries and time-out would hold it for many minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# In the way of a request, not wrong with it: a later attempt may succeed.
PASSING = (401, 403, 408, 409, 429, 499)
COMPLETENESS = "aceray.tracking"
ALIAS = "best"
# more columns than that cannot be read side by side
MOST_COMPARED = 20
# MLflow cuts longer values of a tag, in the middle of a line
LONGEST_NOTE = 8000
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class RunGoneError(Exception):
    """A run that the journal goes on with is not in the store any more."""


class Store:
    """Carries out records; `runs`, which it adds to, has the ids of the runs by their keys.

    Raises what MLflow raises; `passes` tells an outage from a refusal.
    """

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self.uri, self._experiment_name, self._folder = uri, experiment, folder
        self._client: MlflowClient = connect(uri)
        self._experiment: str | None = None

    def answers(self) -> bool:
        """Whether the store answers at all; ConfigError for a deleted experiment."""
        self._experiment = experiment_id(self._client, self._experiment_name, self.uri)
        return True

    def is_active(self, run_id: str) -> bool:
        """Whether the run is there and not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def points(self, records: Sequence[Record], runs: Mapping[str, str]) -> None:
        """Log the metrics of records of one run."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record["time_ms"], record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        self._client.log_batch(runs[records[0]["run"]], metrics=metrics)

    def carry_out(self, record: Record, runs: dict[str, str], refused: int = 0) -> None:
        """Do what one record says. `refused`: how many before it the store would not take, which its end tells."""
        key = record["run"]
        match record["do"]:
            case "begin":
                self._begin(record, runs)
            case "points":
                self.points([record], runs)
            case "tags":
                self._tag(runs[key], record["tags"])
            case "files":
                self._files(runs[key], record["paths"])
            case "note":
                note = self._links([runs[name] for name in record["compare"] if name in runs]) + record["note"]
                self._tag(runs[key], {"mlflow.note.content": shortened(note)})
            case "best":
                self._register(record["model"], runs[record["of"]])
            case "end":
                complete = f"incomplete: {refused} records were refused" if refused else "complete"
                self._tag(runs[key], {COMPLETENESS: complete})
                self._client.set_terminated(runs[key], record["status"], record["time_ms"])

    def _begin(self, record: Record, runs: dict[str, str]) -> None:
        """Make the run, or go on with it: one that was made before an answer was lost is found by its key."""
        key = record["run"]
        if key in runs:
            if not self.is_active(runs[key]):
                raise RunGoneError(key)
            self._client.update_run(runs[key], status="RUNNING")
            self._tag(runs[key], {COMPLETENESS: "incomplete"})
            return
        if self._experiment is None:
            self._experiment = experiment_id(self._client, self._experiment_name, self.uri)
        tags = {**record["tags"], "aceray.key": record["key"], COMPLETENESS: "incomplete"}
        if record.get("parent") is not None:
            tags["mlflow.parentRunId"] = runs[record["parent"]]
        made = self._client.search_runs([self._experiment], f"tags.`aceray.key` = '{record['key']}'", max_results=1)
        run = made[0] if made else self._make(record, tags)
        self._log_settings(run.info.run_id, record["settings"])
        runs[key] = run.info.run_id

    def _make(self, record: Record, tags: Mapping[str, str]) -> Any:
        names = {"mlflow.runName": record["name"], "mlflow.source.name": "aceray", "mlflow.source.type": "LOCAL"}
        return self._client.create_run(
            str(self._experiment), record["time_ms"], {**names, **tags}, run_name=record["name"]
        )

    def _log_settings(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)) for name, value in settings.items()]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(run_id, params=parameters[start : start + 100])

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def _files(self, run_id: str, paths: Sequence[str]) -> None:
        """Store files and folders as artifacts under their own names; what is no longer there is passed over."""
        for path in (self._folder / name for name in paths):
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(run_id, str(path))

    def _links(self, runs: list[str]) -> str:
        """From the parent's page to the comparison of the trials, and to all runs in the mode for training.

        The list of runs folds the trials away, and MLflow opens an experiment in its mode for language models.
        """
        if self._experiment is None:
            self._experiment = experiment_id(self._client, self._experiment_name, self.uri)
        everything = f"[All runs](#/experiments/{self._experiment}?workflowType=machine_learning)\n\n"
        if len(runs) < 2:
            return everything
        best = runs[:MOST_COMPARED]
        query = urlencode({"runs": json.dumps(best), "experiments": json.dumps([self._experiment])}, quote_via=quote)
        title = "Compare the trials" if best == runs else f"Compare the best {len(best)} trials"
        return f"[{title}](#/compare-runs?{query}) · {everything}"

    def _register(self, model: str, run_id: str) -> None:
        """Make the run's plain files the version of the model that is called best; nothing is pickled."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # it is there from the last time
            self._client.create_registered_model(model, description=f"Best trials of the study {model}")
        versions = self._client.search_model_versions(f"name='{model}'")
        found = next((version for version in versions if version.run_id == run_id), None)
        if found is None:
            source = self._client.get_run(run_id).info.artifact_uri
            found = self._client.create_model_version(model, source=source or "", run_id=run_id)
        self._client.set_registered_model_alias(model, ALIAS, found.version)


def connect(uri: str) -> "MlflowClient":
    """A client of the store at that URI, in which `${NAME}` is what the environment holds under NAME."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # it logs the traceback of what the sender tells in a line
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=_with_secrets(uri))


def passes(error: Exception) -> bool:
    """Whether the store may take the same request later: it does not answer, or answers that something is wrong."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in PASSING or error.error_code == "ENDPOINT_NOT_FOUND"
    # requests' errors and Python's own of sockets
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def passes_at_start(error: Exception, uri: str) -> bool:
    """The same of a first attempt, when much of that is a mistake of the settings: a database that cannot be opened."""
    if uri.startswith("http"):
        status = getattr(error, "get_http_status_code", lambda: 500)()
        return passes(error) and status not in (401, 403, 404)
    return getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE"


def cannot_be_used(uri: str, error: BaseException) -> ConfigError:
    """A store that refuses is a mistake of the settings."""
    return ConfigError(
        f"tracking.uri: {uri} cannot be used ({first_line(error)}); start the server, set another URI, "
        f"or tracking.enabled=false"
    )


def resolve_uri(uri: str) -> str:
    """The tracking URI with a relative sqlite path made absolute, once, against the working directory."""
    scheme = "sqlite:///"
    if uri.startswith(scheme) and not uri.startswith(scheme + "/"):
        return f"{scheme}{Path(uri.removeprefix(scheme)).absolute()}"
    return uri


def _with_secrets(uri: str) -> str:
    def value(found: re.Match) -> str:
        if found[1] not in os.environ:
            raise ConfigError(f"tracking.uri: {uri}: the environment has no {found[1]}; set it, or another URI")
        return quote(os.environ[found[1]], safe="")

    return _VARIABLE.sub(value, uri)


def installed() -> bool:
    """Whether MLflow can be imported."""
    try:
        return importlib.util.find_spec("mlflow") is not None
    except (ImportError, ValueError):
        return False


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


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without passwords."""
    lines = str(error).strip().splitlines()
    return masked(lines[0])[:200] if lines else type(error).__name__


def shortened(note: str) -> str:
    """The lines of a note that MLflow can hold, and where the rest is."""
    if len(note) <= LONGEST_NOTE:
        return note
    rest = "\nThe rest is in leaderboard.md, among the artifacts.\n"
    return note[: note.rindex("\n", 0, LONGEST_NOTE - len(rest)) + 1] + rest
