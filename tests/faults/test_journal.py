"""The journal of the tracking through kills, damage, lost state and a clock that goes backwards; against sqlite."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from aceray.config import Config
from aceray.errors import DataError, TrackingError
from aceray.folder import RunFolder, create_run_folder
from aceray.presets import load_config
from aceray.tracking.journal import JOURNAL, STATE, Journal
from aceray.tracking.run import JournalTracker, Tracker, start_tracking
from aceray.tracking.store import Store
from aceray.tracking.sync import sync

LOSS = "train/loss_total"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "ml.db"


@pytest.fixture
def client(database: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{database}")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("aceray.tracking.sender.SECONDS_A_BATCH", 0.1)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def config(tmp_path: Path, database: Path) -> Config:
    return load_config(
        f"runs={tmp_path}", "name=tracked", f"tracking.uri=sqlite:///{database}", f"tracking.experiment={tmp_path.name}"
    )


@pytest.fixture
def folder(config: Config) -> RunFolder:
    return create_run_folder(config)


def steps(client: MlflowClient, tracker: Tracker) -> list[int]:
    return [point.step for point in client.get_metric_history(str(tracker.run_id), LOSS)]


def tracked(config: Config, folder: RunFolder, last: int = 5) -> Tracker:
    with start_tracking(config, folder, {}) as tracker:
        for step in range(1, last + 1):
            tracker.log(step, {LOSS: 1.0 * step})
    return tracker


def test_a_kill_in_the_middle_of_a_line_loses_that_line_alone(tmp_path: Path) -> None:
    for cut in (1, 20, 60):
        (tmp_path / JOURNAL).unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            tracker = JournalTracker(Journal(tmp_path))
            for step in range(1, 4):
                tracker.log(step, {LOSS: 1.0})
            with open(tmp_path / JOURNAL, "ab", buffering=0) as file:
                file.write(json.dumps({"run": "", "do": "points", "step": 4, "metrics": {LOSS: 1.0}}).encode()[:cut])
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        journal = Journal(tmp_path)
        assert (journal.backlog, journal.last_step) == (3, {"": 3})
        JournalTracker(journal).log(4, {LOSS: 1.0})
        journal.close()
        assert [record["step"] for record, _ in journal.read(0)] == [1, 2, 3, 4]


def test_a_lost_state_sends_everything_again_and_doubles_nothing(
    config: Config, folder: RunFolder, client: MlflowClient
) -> None:
    tracker = tracked(config, folder)
    state = json.loads((folder.path / STATE).read_text())
    (folder.path / STATE).write_text(json.dumps({**state, "offset": 0}))
    assert sync(folder.path).records == 7
    assert steps(client, tracker) == [1, 2, 3, 4, 5]
    # without even the run's id it is found by its key
    (folder.path / STATE).write_text(json.dumps({**state, "offset": 0, "runs": {}}))
    assert sync(folder.path).run_id == tracker.run_id
    assert steps(client, tracker) == [1, 2, 3, 4, 5]
    (folder.path / STATE).write_text("{")
    with pytest.raises(DataError, match=r"tracking\.json: cannot be read .* delete it, and all is sent again"):
        sync(folder.path)


def test_a_damaged_line_is_told_and_the_others_are_sent(
    config: Config, folder: RunFolder, client: MlflowClient, caplog
) -> None:
    tracker = tracked(config, folder)
    lines = (folder.path / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"step": 3', b'"step" 3 ')
    (folder.path / JOURNAL).write_bytes(b"".join(lines))
    (folder.path / STATE).write_text(
        json.dumps({**json.loads((folder.path / STATE).read_text()), "offset": 0, "runs": {}})
    )
    client.delete_run(str(tracker.run_id))
    with pytest.raises(TrackingError, match=r"1 records of .* could not be sent"):
        sync(folder.path)
    assert "a record was not taken (its line is damaged)" in caplog.text
    (run,) = client.search_runs([client.get_run(str(tracker.run_id)).info.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, LOSS)] == [1, 2, 4, 5]
    assert run.data.tags["aceray.tracking"] == "incomplete: 1 records were refused"


def test_a_refused_record_waits_for_sync(
    config: Config, folder: RunFolder, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """A tag that the store does not take holds nothing up; once it does, the run is complete."""
    with start_tracking(config, folder, {}) as tracker:
        assert isinstance(tracker, JournalTracker)
        tracker.log(1, {LOSS: 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_files", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no entry")))
            tracker.keep([folder.config])
            tracker.log(2, {LOSS: 2.0})
            tracker.sender.finish(60.0)  # type: ignore[attr-defined]
    assert "a record was not taken" in caplog.text and tracker.backlog > 0
    assert steps(client, tracker) == [1, 2]
    sync(folder.path)
    run = client.get_run(str(tracker.run_id))
    assert run.data.tags["aceray.tracking"] == "complete" and run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


def test_records_are_later_than_those_before_them_whatever_the_clock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([1000.0, 900.0, 900.0, 900.001, 1001.0])
    monkeypatch.setattr("aceray.tracking.journal.time.time", lambda: next(now))
    tracker = JournalTracker(Journal(tmp_path))
    for step in range(1, 4):
        tracker.log(step, {LOSS: 1.0})
    tracker.journal.close()
    again = JournalTracker(Journal(tmp_path))
    for step in (4, 5):
        again.log(step, {LOSS: 1.0})
    again.journal.close()
    assert [record["time_ms"] for record, _ in again.journal.read(0)] == [
        1_000_000, 1_000_001, 1_000_002, 1_000_003, 1_001_000,
    ]  # fmt: skip


def test_a_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no journal of tracking is there"):
        sync(tmp_path)


def test_a_run_that_goes_on_is_not_synced_from_outside(config: Config, folder: RunFolder) -> None:
    from aceray.data.storage import exclusive

    tracked(config, folder)
    with exclusive(folder.path), pytest.raises(DataError, match="writes here at this moment"):
        sync(folder.path)
