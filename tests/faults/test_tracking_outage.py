"""A real MLflow server behind a proxy that fails: nothing is lost, nothing is doubled, nothing waits for it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from aceray.errors import TrackingError
from aceray.folder import RunFolder, create_run_folder
from aceray.presets import load_config
from aceray.tracking import run as tracking_run
from aceray.tracking import sender
from aceray.tracking.run import MlflowTracker, Tracker, start_tracking
from aceray.tracking.sync import sync
from tests.faults.proxy import Fault, FaultyProxy, proxy_to
from tests.faults.servers import mlflow_server

pytestmark = pytest.mark.slow
STEPS = 300
FAULTS: tuple[Fault, ...] = ("down", "slow", "error", "too_many", "silent", "answer_lost", "at_random")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    before = dict(os.environ)
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        yield port
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    # the waits are shortened, never the faults
    monkeypatch.setattr(sender, "SECONDS_A_BATCH", 0.2)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(tracking_run, "SECONDS_TO_START", 6.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with proxy_to("127.0.0.1", server) as proxy:
        yield proxy


@pytest.fixture
def client(server: int) -> MlflowClient:
    """Past the proxy."""
    return MlflowClient(tracking_uri=f"http://127.0.0.1:{server}")


def begin(proxy: FaultyProxy, tmp_path: Path) -> tuple[RunFolder, Tracker]:
    config = load_config(
        f"runs={tmp_path}", "name=tracked", f"tracking.uri={proxy.url}", f"tracking.experiment={tmp_path.name}"
    )
    folder = create_run_folder(config, "resume" if (tmp_path / "tracked").exists() else "error")
    return folder, start_tracking(config, folder, {})


def log(tracker: Tracker, first: int, last: int) -> float:
    """Log the steps, as fast as a quick training would; the longest that one call took, seconds."""
    longest = 0.0
    for step in range(first, last + 1):
        before = time.perf_counter()
        tracker.log(step, {"train/loss_total": 1.0 * step, "train/loss_ipi": 0.5 * step})
        longest = max(longest, time.perf_counter() - before)
        time.sleep(0.005)
    return longest


def assert_whole(client: MlflowClient, experiment: str, steps: int = STEPS, status: str = "FINISHED") -> None:
    """One run, with every point once, its settings and its files."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    for name, factor in (("train/loss_total", 1.0), ("train/loss_ipi", 0.5)):
        points = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in points] == [(s, factor * s) for s in range(1, steps + 1)]
    assert run.info.status == status
    assert run.data.tags["aceray.tracking"] == "complete"
    assert run.data.params["name"] == "tracked"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_and_returns(fault: Fault, proxy: FaultyProxy, client: MlflowClient, tmp_path: Path) -> None:
    folder, tracker = begin(proxy, tmp_path)
    with tracker:
        log(tracker, 1, 100)
        proxy.set(fault)
        longest = log(tracker, 101, 200)
        time.sleep(2.0)
        proxy.set("none")
        log(tracker, 201, STEPS)
        tracker.keep([folder.config])
    # a call of the training's own thread is a write to a file, whatever the store does
    assert longest < 0.25
    assert tracker.backlog == 0
    assert_whole(client, tmp_path.name)


@pytest.mark.parametrize("fault", FAULTS[:-1])
def test_a_store_that_fails_from_start_to_end_is_made_up_for_by_sync(
    fault: Fault, proxy: FaultyProxy, client: MlflowClient, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_run, "SECONDS_TO_FINISH", 8.0)
    proxy.set(fault)
    started = time.monotonic()
    folder, tracker = begin(proxy, tmp_path)
    assert time.monotonic() - started < 12
    with tracker:
        assert log(tracker, 1, STEPS) < 0.25
        tracker.keep([folder.config])
        ending = time.monotonic()
    assert time.monotonic() - ending < 15
    if fault != "slow":  # which may come to its end
        assert tracker.backlog > STEPS if fault != "answer_lost" else tracker.backlog > 0
        assert f"`aceray sync {folder.path}` sends them" in caplog.text
        with pytest.raises(TrackingError, match="could not be sent"):
            monkeypatch.setattr("aceray.tracking.sync.SECONDS_TO_SEND", 5.0)
            sync(folder.path)
        monkeypatch.setattr("aceray.tracking.sync.SECONDS_TO_SEND", 100.0)
    proxy.set("none")
    assert sync(folder.path).run_id is not None
    assert_whole(client, tmp_path.name)
    # a second time there is nothing to do
    assert sync(folder.path).records == 0
    assert_whole(client, tmp_path.name)


def test_a_killed_run_is_sent_and_ended_by_sync(proxy: FaultyProxy, client: MlflowClient, tmp_path: Path) -> None:
    folder, tracker = begin(proxy, tmp_path)
    log(tracker, 1, 100)
    proxy.set("down")
    log(tracker, 101, STEPS)
    tracker.keep([folder.config])
    assert isinstance(tracker, MlflowTracker)
    tracker.sender.finish(10.0)  # as if the process were gone: no end is written
    tracker.journal.close()
    proxy.set("none")
    assert sync(folder.path).records >= 200
    assert_whole(client, tmp_path.name, status="KILLED")


def test_a_store_that_was_lost_is_filled_again(proxy: FaultyProxy, client: MlflowClient, tmp_path: Path) -> None:
    folder, tracker = begin(proxy, tmp_path)
    with tracker:
        log(tracker, 1, 200)
        tracker.keep([folder.config])
    client.delete_run(str(tracker.run_id))
    folder, again = begin(proxy, tmp_path)
    with again:
        log(again, 150, STEPS)
    assert again.run_id != tracker.run_id
    assert_whole(client, tmp_path.name)
