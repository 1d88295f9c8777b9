"""Runs through Ray Train against the same runs in this process; each start of workers takes seconds, so few of them."""

import json
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pandas
import pytest
import ray
import torch

from aceray.config import Config
from aceray.distributed import supervisor
from aceray.distributed.failures import known_error
from aceray.distributed.run import run
from aceray.distributed.share import Place, Share
from aceray.distributed.supervisor import _averaged
from aceray.errors import ClusterError, DataError, NonFiniteLoss
from aceray.folder import RunFolder
from aceray.train.loop import Progress, Snapshot
from aceray.train.predict import Poses
from tests.distributed import accidents

Configure = Callable[..., Config]
pytestmark = pytest.mark.usefixtures("ray_session")


def journal(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "train/particles_per_second"} for row in rows]


def losses(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("train/")}


def test_a_worker_killed_on_the_way_changes_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Ray Train with one worker, which is killed once, a run is the run in this process to the last bit."""
    from mlflow import MlflowClient

    here = run(configure("name=here"))
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.killed_once)
    database = f"sqlite:///{tmp_path}/ml.db"
    events: list[Progress] = []
    there = run(
        configure("name=there", "resources.workers=1", "tracking.enabled=true", f"tracking.uri={database}"),
        on_progress=events.append,
    )
    assert (there.folder / "killed").exists()
    assert [event.step for event in events] == list(range(1, 41))
    assert journal(there.folder) == journal(here.folder)
    np.testing.assert_array_equal(there.volume, here.volume)
    pandas.testing.assert_frame_equal(there.poses, here.poses)
    assert not (there.folder / ".scratch").exists()
    client = MlflowClient(tracking_uri=database)
    points = client.get_metric_history(there.mlflow_run_id, "train/loss_total")
    assert [(point.step, point.value) for point in points] == [
        (row["step"], row["train/loss_total"]) for row in journal(here.folder)
    ]
    assert client.get_run(there.mlflow_run_id).info.status == "FINISHED"


EVERY_TERM = ("ipi.contrastive_weight=1", "ipi.loss=symmetric", "optim.amsgrad=true", "optim.clip_norm=0.1")


@pytest.mark.parametrize("settings", [(), pytest.param(EVERY_TERM, marks=pytest.mark.slow)])
def test_two_workers_do_what_one_does_with_two_lanes(configure: Configure, settings: tuple[str, ...]) -> None:
    """Few steps and one head: rounding alone makes a winner among heads change later on."""
    quick = ("train.steps=8", "encoder.heads=1", "train.checkpoint_every=5", *settings)
    one = run(configure("name=one", "train.lanes=2", *quick))
    two = run(configure("name=two", "resources.workers=2", *quick))
    for ours, theirs in zip(journal(two.folder), journal(one.folder), strict=True):
        # each worker evaluates particles of its own
        assert set(ours) == set(theirs)
        assert losses(ours) == pytest.approx(losses(theirs), rel=2e-4)
    np.testing.assert_allclose(two.volume, one.volume, atol=2e-3 * np.abs(one.volume).max())
    assert two.poses["particle_id"].tolist() == list(range(1024))
    # the same checkpoint of two workers goes on in one process with both lanes
    again = run(configure("name=two", "train.lanes=2", *quick), existing="resume")
    np.testing.assert_array_equal(again.volume, two.volume)


def test_a_mistake_of_one_worker_ends_the_run_at_once(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.diverging_on_the_second_worker)
    with pytest.raises(NonFiniteLoss) as error:
        run(configure("resources.workers=2"))
    assert type(error.value) is NonFiniteLoss
    assert str(error.value) == "training step 23: loss_pip is nan; nothing was updated in this step."
    folder = RunFolder(Path(configure().runs) / "run")
    assert len(list(folder.path.glob("start-*"))) == 2  # nothing was started again
    assert folder.read_history()[-1]["step"] == 20
    assert folder.checkpoint_steps() == [10, 20]


@pytest.mark.slow
def test_a_worker_that_is_lost_every_time(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.killed_always)
    with pytest.raises(ClusterError, match="lost or did not start, 3 times in all") as error:
        run(configure("resources.workers=1"))
    assert "\n" not in str(error.value)
    assert not RunFolder(Path(configure().runs) / "run").scratch.exists()


@pytest.mark.slow
def test_an_error_in_the_caller_frees_the_cluster(configure: Configure) -> None:
    """The run ends at once, its workers' cores are free again, and it can be resumed."""

    def stop(event: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(configure("resources.workers=2", "train.steps=100000", "train.evaluate_every=100000"), on_progress=stop)
    deadline = time.monotonic() + 10
    while ray.available_resources()["CPU"] < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


def test_workers_that_the_cluster_lacks(configure: Configure) -> None:
    with pytest.raises(
        ClusterError, match=r"asked for 3 workers with 1 CPUs each; the cluster has only 2 CPUs"
    ) as error:
        run(configure("resources.workers=3", "train.batch=48"))
    assert "\n" not in str(error.value)
    assert not (Path(configure().runs) / "run").exists()


def test_a_run_on_a_cluster_looks_at_the_storage_first(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that sees none of it ends the run before it begins; the name is free again."""
    asked = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise ClusterError("node x: does not see it")

    monkeypatch.setattr(supervisor, "check_shared", refuse)
    config = configure("resources.workers=1", "resources.address=auto")
    with pytest.raises(ClusterError, match="node x"):
        run(config)
    folder = Path(config.runs) / "run"
    assert asked == [(folder, "runs", [Path(config.data.path)])]
    assert not folder.exists()


def test_snapshots_stay_with_the_worker() -> None:
    poses = Poses(torch.arange(1), torch.eye(3)[None], torch.zeros(1, 2), torch.zeros(1))
    snapshot = Snapshot(poses, torch.zeros(2, 2, 2))

    def steps() -> Generator[Progress, None, Share]:
        yield Progress(1, 1, {"loss_total": 1.0}, 10.0, {"select/d4_consistency": 2.0}, True, snapshot)
        return Share(poses, snapshot.volume)

    (portion,) = _averaged(steps(), Place())
    assert [(event.metrics, event.snapshot) for event in portion] == [({"select/d4_consistency": 2.0}, None)]


def test_known_errors_are_found_in_their_wrappers() -> None:
    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise DataError("particles-00003.parquet: is damaged")

    with pytest.raises(ray.exceptions.RayTaskError) as error:
        ray.get(fail.remote())
    found = known_error(error.value)
    assert type(found) is DataError
    assert str(found) == "particles-00003.parquet: is damaged"
    assert known_error(ValueError("our own bug")) is None
