"""What a cluster's Prometheus is told, without a cluster: the numbers, their labels, when they go out and when not.

tests/dashboards/test_prometheus.py sees the same numbers in a real Prometheus.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aceray.config import Config
from aceray.distributed import monitor as monitors
from aceray.distributed.gauges import BY_NAME, METRICS
from aceray.distributed.monitor import DataMonitor, DeviceMonitor, Monitor, RunMonitor, StudyMonitor, labels_of
from aceray.folder import RunFolder
from aceray.study import Study
from aceray.tracking.run import Tracker
from aceray.tracking.study import StudyTracker
from aceray.train.loop import Progress

Sample = tuple[str, float, dict[str, str]]
STEP = Progress(
    step=400,
    steps=801,
    losses={"loss_ipi": 0.5, "loss_total": 0.75},
    particles_per_second=1000.0,
    metrics={
        "pose/rotation_deg_median": 3.0,
        "pose/rotation_sqfrob_mean": 0.5,
        "pose/rotation_sqfrob_median": 0.25,
        "pose/coverage": 0.875,
        "pose/view_entropy": 0.5,
        "fsc/resolution_angstrom_0.5": 9.0,
        "fsc/resolution_angstrom_0.143": 7.0,
        "select/d4_consistency": 0.125,
    },
    checkpoint_due=True,
    details={
        "step_seconds": 0.064,
        "data_wait_seconds": 0.016,
        "pip_weight": 2.0,
        "label_filter": 3.0,
        "restarts": 1.0,
    },
)
ROUND = Progress(
    step=801,
    steps=801,
    losses={},
    particles_per_second=500.0,
    metrics={"refine/moved": 0.01, "refine/energy": 0.75, "pose/coverage": 1.0},
    details={"step_seconds": 10.0, "round": 1.0, "rescued_fraction": 0.05, "half_map_resolution_angstrom": 6.0},
)


class Tracked(Tracker):
    run_id = "1234"
    backlog = 17


class TrackedStudy(StudyTracker):
    run_id = "1234"
    backlog = 23


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray session, whatever the tests before have left: else threads export that outlive what a test pretends."""
    monkeypatch.setattr(monitors, "_session", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which torch uses the second."""
    cuda = {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "max_memory_allocated": lambda index: 3_000 * index,
        "get_device_properties": lambda index: SimpleNamespace(total_memory=8_000),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """A Ray session that keeps what it is told; exports are a few milliseconds apart."""
    told: list[Sample] = []

    def gauge(name: str) -> Any:
        return SimpleNamespace(set=lambda value, labels: told.append((name, value, labels)))

    monkeypatch.setattr(monitors, "_session", lambda: True)
    monkeypatch.setattr(monitors, "_gauge", gauge)
    monkeypatch.setattr(monitors, "SECONDS_BETWEEN_EXPORTS", 0.01)
    return told


def of_run(tmp_path: Path, *events: Progress, tracker: Tracker | None = None) -> list[Sample]:
    monitor = RunMonitor(RunFolder(tmp_path / "first"), tracker or Tracker())
    for event in events:
        monitor.report(event)
    return list(monitor.collect())


def values_of(samples: list[Sample], name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by its labels but those of the run."""
    return {
        tuple(value for key, value in labels.items() if key not in ("run", "study")): number
        for found, number, labels in samples
        if found == name
    }


def study_monitor() -> StudyMonitor:
    objectives = [{"metric": "fsc/auc"}, {"metric": "pose/rotation_sqfrob_mean"}]
    study = Study.model_validate(
        {"name": "s", "space": {"seed": [1, 2]}, "objective": objectives, "search": {"kind": "optuna", "trials": 2}}
    )
    monitor = StudyMonitor(study, TrackedStudy())
    monitor.report("a", "finished", {"fsc/auc": 0.5, "pose/rotation_sqfrob_mean": 0.25})
    monitor.report("b", "finished", {"fsc/auc": 0.75, "pose/rotation_sqfrob_mean": 0.75})
    monitor.report("c", "running", {"fsc/auc": 0.875, "pose/rotation_sqfrob_mean": None})
    monitor.report("d", "running", {})
    monitor.report("d", "failed", {})
    monitor.restarts += 1
    return monitor


def data_monitor() -> DataMonitor:
    monitor = DataMonitor("blobs")
    monitor.report(1000, 4000, 0)
    monitor.report(2000, 4000, 5)
    return monitor


# ---- the numbers


def test_a_step(tmp_path: Path) -> None:
    samples = of_run(tmp_path, STEP)
    alone = {name: value for name, value, labels in samples if labels == {"run": "first", "study": ""}}
    assert (
        alone.items()
        >= {
            "aceray_train_step": 400,
            "aceray_train_steps_planned": 801,
            "aceray_train_particles_per_second": 1000.0,
            "aceray_train_step_seconds": 0.064,
            "aceray_train_data_wait_seconds": 0.016,
            "aceray_train_pip_weight": 2.0,
            "aceray_train_label_filter": 3.0,
            "aceray_train_restarts": 1.0,
            "aceray_pose_rotation_error_degrees": 3.0,
            "aceray_pose_coverage": 0.875,
        }.items()
    )
    assert "aceray_tracking_backlog_records" not in alone  # tracking is off
    assert values_of(samples, "aceray_train_loss") == {("ipi",): 0.5, ("total",): 0.75}
    assert values_of(samples, "aceray_pose_rotation_sqfrob") == {("mean",): 0.5, ("median",): 0.25}
    assert values_of(samples, "aceray_fsc_resolution_angstrom") == {("truth", "0.5"): 9.0, ("truth", "0.143"): 7.0}
    assert values_of(samples, "aceray_select_score") == {("d4_consistency",): 0.125}


def test_a_round_follows_the_steps(tmp_path: Path) -> None:
    samples = of_run(tmp_path, STEP, ROUND, tracker=Tracked())
    assert values_of(samples, "aceray_train_step") == {(): 801}
    assert values_of(samples, "aceray_train_loss") == {}
    assert values_of(samples, "aceray_refine_round") == {(): 1.0}
    assert values_of(samples, "aceray_refine_moved_fraction") == {(): 0.01}
    assert values_of(samples, "aceray_refine_rescued_fraction") == {(): 0.05}
    assert values_of(samples, "aceray_refine_unexplained_fraction") == {(): 0.75}
    assert values_of(samples, "aceray_fsc_resolution_angstrom") == {("halves", "0.143"): 6.0}
    assert values_of(samples, "aceray_tracking_backlog_records") == {(): 17}


def test_metrics_stay_until_the_next_evaluation(tmp_path: Path) -> None:
    later = Progress(401, 801, {"loss_total": 0.5}, 900.0)
    assert values_of(of_run(tmp_path, STEP, later), "aceray_pose_coverage") == {(): 0.875}


def test_the_age_of_the_newest_checkpoint(tmp_path: Path) -> None:
    """At the start that of the last attempt, if it left any; afterwards that of this one's newest."""
    name = "aceray_train_checkpoint_timestamp_seconds"
    unsaved = Progress(1, 801, {"loss_total": 0.5}, 900.0)
    assert values_of(of_run(tmp_path, unsaved), name)[()] == pytest.approx(time.time(), abs=5)
    folder = RunFolder(tmp_path / "first")
    folder.write_checkpoint({"x": torch.zeros(1)}, {"step": 3}, keep=1)
    os.utime(folder.checkpoint_file(3), (1_000_000, 1_000_000))
    assert values_of(of_run(tmp_path, unsaved), name) == {(): 1_000_000}
    assert values_of(of_run(tmp_path, unsaved, STEP), name)[()] == pytest.approx(time.time(), abs=5)


def test_the_writing_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 100.0, 104.0))
    monkeypatch.setattr(monitors, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert {name: value for name, value, labels in data_monitor().collect() if labels == {"dataset": "blobs"}} == {
        "aceray_data_particles": 2000,
        "aceray_data_particles_planned": 4000,
        "aceray_data_particles_per_second": 250.0,  # of this attempt: 1,000 were there when it began
        "aceray_data_refused_particles": 5,
    }


def test_a_study() -> None:
    samples = list(study_monitor().collect())
    counts = {"running": 1, "finished": 2, "stopped": 0, "interrupted": 0, "failed": 1}
    assert values_of(samples, "aceray_study_trials") == {(status,): count for status, count in counts.items()}
    assert values_of(samples, "aceray_study_restarts") == {(): 1}
    assert values_of(samples, "aceray_study_objective") == {
        ("a", "fsc/auc"): 0.5,
        ("b", "fsc/auc"): 0.75,
        ("c", "fsc/auc"): 0.875,
        ("a", "pose/rotation_sqfrob_mean"): 0.25,
        ("b", "pose/rotation_sqfrob_mean"): 0.75,
    }
    # larger is better for one, smaller for the other; what still runs has no say
    assert values_of(samples, "aceray_study_best") == {("fsc/auc",): 0.75, ("pose/rotation_sqfrob_mean",): 0.25}
    assert ("aceray_tracking_backlog_records", 23, {"study": "s", "run": ""}) in samples


def test_memory_of_the_gpus_that_torch_uses(tmp_path: Path, gpu: None) -> None:
    samples = list(DeviceMonitor(RunFolder(tmp_path / "first")).collect())
    assert samples == [
        ("aceray_device_memory_bytes", 3_000, {"run": "first", "study": "", "device": "1"}),
        ("aceray_device_memory_total_bytes", 8_000, {"run": "first", "study": "", "device": "1"}),
    ]
    assert values_of(of_run(tmp_path, STEP), "aceray_device_memory_bytes") == {("1",): 3_000}


def test_every_number_is_listed_with_its_labels_and_every_listed_one_is_told(tmp_path: Path, gpu: None) -> None:
    samples = [
        *of_run(tmp_path, STEP, tracker=Tracked()),
        *of_run(tmp_path, ROUND),
        *data_monitor().collect(),
        *study_monitor().collect(),
    ]
    for name, _, labels in samples:
        assert set(labels) == set(BY_NAME[name].labels), name
    assert {name for name, _, _ in samples} == set(BY_NAME)
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize(
    "path, trial, labels",
    [
        ("runs/demo", None, {"run": "demo", "study": ""}),
        ("studies/s/trials/seed_1", "studies/s/trials/seed_1", {"run": "seed_1", "study": "s"}),
        ("studies/s/trials/seed_1/half_2", "studies/s/trials/seed_1", {"run": "seed_1/half_2", "study": "s"}),
        ("studies/s/trials/seed_1", None, {"run": "seed_1", "study": ""}),
    ],
)
def test_labels_of_a_run(tmp_path: Path, path: str, trial: str | None, labels: dict[str, str]) -> None:
    (tmp_path / path).mkdir(parents=True)
    if trial is not None:
        (tmp_path / trial / "trial.json").touch()
    assert labels_of(RunFolder(tmp_path / path)) == labels


# ---- when they go out


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_that_hangs_stays_in_sight(tmp_path: Path, exported: list[Sample]) -> None:
    """Ray forgets a gauge that is not set again."""
    with closing(RunMonitor(RunFolder(tmp_path), Tracker())) as monitor:
        monitor.report(STEP)
        wait_until(lambda: len(values := [each for each in exported if each[0] == "aceray_train_step"]) > 3 and values)
    time.sleep(0.05)
    count = len(exported)
    time.sleep(0.05)
    assert len(exported) == count  # and goes out of sight when it is over


def test_the_last_report_goes_out(tmp_path: Path, exported: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "SECONDS_BETWEEN_EXPORTS", 60.0)
    with closing(RunMonitor(RunFolder(tmp_path), Tracker())) as monitor:
        monitor.report(STEP)
        wait_until(lambda: bool(exported))
        monitor.report(ROUND)
    assert values_of(exported[-40:], "aceray_refine_round") == {(): 1.0}


def test_numbers_that_are_not_finite_are_left_out(exported: list[Sample]) -> None:
    class Odd(Monitor):
        def collect(self) -> Iterator[Sample]:
            yield "aceray_data_particles", float("nan"), {"dataset": "x"}
            yield "aceray_data_particles", float("inf"), {"dataset": "y"}
            yield "aceray_data_particles", 3, {"dataset": "z"}

    with closing(Odd()) as monitor:
        monitor.wake()
        wait_until(lambda: bool(exported))
    assert {labels["dataset"] for _, _, labels in exported} == {"z"}


def test_a_run_in_this_process_imports_no_ray_and_starts_no_thread(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure("train.steps=3", "train.evaluate_every=3")
    code = f"""
import sys, threading
from aceray.distributed.run import run
from aceray.presets import load_config
names = []
run(load_config({str(_written(tmp_path, config))!r}), on_progress=lambda event: names.extend(
    thread.name for thread in threading.enumerate()))
print("ray" in sys.modules, "aceray-monitor" in names)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def _written(tmp_path: Path, config: Config) -> Path:
    from aceray.presets import to_yaml

    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    return file
