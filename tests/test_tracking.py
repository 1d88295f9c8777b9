"""The MLflow run against a real sqlite store."""

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from aceray.config import Config
from aceray.errors import ConfigError
from aceray.folder import RunFolder, create_run_folder
from aceray.presets import flat, load_config
from aceray.tracking.journal import Record
from aceray.tracking.run import Tracker, software_tags, start_tracking
from aceray.tracking.store import Store, resolve_uri


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes seconds, so the tests of this file share a database."""
    return tmp_path_factory.mktemp("mlflow") / "ml.db"


@pytest.fixture
def client(database: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{database}")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def config(tmp_path: Path, database: Path) -> Config:
    return load_config(f"runs={tmp_path}", "name=tracked", f"tracking.uri=sqlite:///{database}", "pip.weight=0.07")


@pytest.fixture
def folder(config: Config) -> RunFolder:
    return create_run_folder(config)


def test_a_run_is_recorded(config: Config, folder: RunFolder, client: MlflowClient, database: Path) -> None:
    with start_tracking(config, folder, {"aceray.dataset_sha256": "abc"}) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"train/loss_total": 1 / step, "train/loss_pip": float("nan")})
        (folder.path / "figures").mkdir()
        (folder.path / "figures" / "slices.png").write_bytes(b"picture")
        tracker.summarise(3, {"fsc/resolution_px_0.5": 2.5})
        tracker.keep([folder.config, folder.figures], note="**short**")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tracked"
    assert run.data.params == {key: str(value) for key, value in flat(config).items()}
    assert run.data.params["pip.weight"] == "0.07"
    assert run.data.tags["aceray.dataset_sha256"] == "abc"
    assert run.data.tags["mlflow.note.content"] == "**short**"
    points = client.get_metric_history(tracker.run_id, "train/loss_total")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["fsc/resolution_px_0.5"] == 2.5
    assert "train/loss_pip" not in run.data.metrics
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.yaml", "figures"]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "figures")] == ["figures/slices.png"]
    assert (database.parent / "mlartifacts" / "aceray" / tracker.run_id / "artifacts" / "config.yaml").exists()


def test_a_resumed_run_is_the_same_and_has_every_step_once(
    config: Config, folder: RunFolder, client: MlflowClient
) -> None:
    with pytest.raises(KeyboardInterrupt), start_tracking(config, folder, {}) as tracker:
        tracker.log(1, {"train/loss_total": 1.0})
        tracker.log(2, {"train/loss_total": 2.0})
        raise KeyboardInterrupt
    assert client.get_run(tracker.run_id).info.status == "KILLED"
    # the journal came further than the store
    folder.history.write_text("".join(json.dumps({"step": s, "train/loss_total": 1.0 * s}) + "\n" for s in (1, 2, 3)))
    with start_tracking(config, folder, {}) as again:
        assert again.run_id == tracker.run_id
        assert again.status_before == "KILLED"
        assert client.get_run(again.run_id).info.status == "RUNNING"
        for step in (2, 3, 4):
            again.log(step, {"train/loss_total": 1.0 * step})
    points = client.get_metric_history(tracker.run_id, "train/loss_total")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_an_error_marks_the_run_failed(config: Config, folder: RunFolder, client: MlflowClient) -> None:
    with pytest.raises(ZeroDivisionError), start_tracking(config, folder, {}) as tracker:
        tracker.log(1, {"train/loss_total": 1 / 0})
    assert client.get_run(tracker.run_id).info.status == "FAILED"


def test_a_run_deleted_from_the_store_is_begun_anew(config: Config, folder: RunFolder, client: MlflowClient) -> None:
    with start_tracking(config, folder, {}) as tracker:
        pass
    client.delete_run(tracker.run_id)
    with start_tracking(config, folder, {}) as again:
        assert again.run_id not in (None, tracker.run_id)
    assert folder.read_notes()["mlflow_run_id"] == again.run_id


def test_points_travel_in_batches(
    config: Config, folder: RunFolder, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    points = Store.points

    def counted(self: Store, records: list[Record], runs: dict[str, str]) -> None:
        sent.append(sum(len(record["metrics"]) for record in records))
        points(self, records, runs)

    monkeypatch.setattr(Store, "points", counted)
    with start_tracking(config, folder, {}) as tracker:
        for step in range(1, 501):
            tracker.log(step, {f"train/{name}": 0.5 for name in "abcde"})
    assert sum(sent) == 2500 and max(sent) <= 1000 and len(sent) <= 5
    assert [point.step for point in client.get_metric_history(str(tracker.run_id), "train/e")] == list(range(1, 501))


def test_a_locked_database_loses_no_points(
    config: Config, folder: RunFolder, client: MlflowClient, database: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """A real outage without a server: another process has the database for itself for longer than sqlite waits."""
    monkeypatch.setattr("aceray.tracking.sender.SECONDS_A_BATCH", 0.2)
    other = sqlite3.connect(database, isolation_level=None)
    with caplog.at_level(logging.WARNING), start_tracking(config, folder, {}) as tracker, contextlib.closing(other):
        other.execute("BEGIN EXCLUSIVE")
        for step in range(1, 301):
            tracker.log(step, {"train/loss_total": 1.0 * step})
        deadline = time.monotonic() + 60
        while "does not answer" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
        assert tracker.backlog == 300
        other.execute("ROLLBACK")
    told = [record.message for record in caplog.records if "does not answer" in record.message]
    assert len(told) == 1 and "locked" in told[0] and told[0].endswith("tracking.jsonl keeps everything")
    points = client.get_metric_history(str(tracker.run_id), "train/loss_total")
    assert [(point.step, point.value) for point in points] == [(step, 1.0 * step) for step in range(1, 301)]
    assert tracker.backlog == 0
    assert client.get_run(str(tracker.run_id)).data.tags["aceray.tracking"] == "complete"


def test_off_when_not_wanted(tmp_path: Path) -> None:
    config = load_config(f"runs={tmp_path}", "tracking.enabled=false", "tracking.uri=nonsense://")
    assert type(start_tracking(config, create_run_folder(config), {})) is Tracker


def test_off_with_one_notice_when_mlflow_is_not_installed(
    config: Config, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with caplog.at_level(logging.WARNING), start_tracking(config, folder, {}) as tracker:
        tracker.log(1, {"train/loss_total": 1.0})
        tracker.keep([folder.config])
    assert tracker.run_id is None
    assert [record.message for record in caplog.records] == [
        f"MLflow is not installed: tracking is off, the results are in {folder.path}"
    ]


@pytest.mark.parametrize("uri", ["sqlite:////proc/no/such/place.db", "nonsense://there", "file:./mlruns"])
def test_a_store_that_cannot_be_used_is_a_mistake_of_the_settings(tmp_path: Path, uri: str) -> None:
    config = load_config(f"runs={tmp_path}", f"tracking.uri={uri}")
    with pytest.raises(ConfigError, match=r"^tracking\.uri: ") as error:
        start_tracking(config, create_run_folder(config), {})
    assert "\n" not in str(error.value)


def test_a_deleted_experiment_is_named(tmp_path: Path, database: Path, client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("old"))
    config = load_config(f"runs={tmp_path}", f"tracking.uri=sqlite:///{database}", "tracking.experiment=old")
    with pytest.raises(ConfigError, match=r"^tracking\.experiment: 'old' was deleted"):
        start_tracking(config, create_run_folder(config), {})


def test_a_relative_database_is_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:////var/mlflow.db") == "sqlite:////var/mlflow.db"
    assert resolve_uri("http://server:5000") == "http://server:5000"


def test_tags_tell_versions_and_commit() -> None:
    tags = software_tags()
    assert tags["version.torch"].split(".")[0].isdigit()
    assert "version.mlflow" in tags
