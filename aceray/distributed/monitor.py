"""What is seen of runs, conversions and studies: by a cluster's Prometheus, by way of Ray (gauges.py lists it), and by
their user, when no step comes any more.

A step costs an assignment: a thread turns the newest report into numbers every few seconds. It goes on while nothing is
reported, for Ray forgets a gauge that was not set for two of its report intervals (20 s), and a run that hangs must
stay in sight. Where this process has no Ray session nothing is exported, and Ray is not imported.
"""

import contextlib
import functools
import logging
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from typing import Any, TypeVar

import torch

from aceray.criteria import CRITERIA
from aceray.distributed.gauges import BY_NAME
from aceray.folder import RunFolder
from aceray.study import Study
from aceray.tracking.run import Tracker
from aceray.tracking.study import STATUS, StudyTracker
from aceray.train.loop import Progress

# Ray's own interval is ten seconds; a gauge that is set twice in each is never missed.
SECONDS_BETWEEN_EXPORTS = 5.0
# No step for so long, and for ten times the slowest step so far, is told: a worker may hang that answers as if it did
# not. A start, a round of refinement and the last map of a million images may take longer.
SECONDS_WITHOUT_A_STEP = 900.0
SECONDS_WITHOUT_A_ROUND = 3600.0
SLOWER_THAN_EVER = 10.0
_log = logging.getLogger("aceray")
Result = TypeVar("Result")
Sample = tuple[str, float, Mapping[str, str]]
"""Name, value and labels."""

_DETAILS = {
    "step_seconds": "aceray_train_step_seconds",
    "data_wait_seconds": "aceray_train_data_wait_seconds",
    "pip_weight": "aceray_train_pip_weight",
    "label_filter": "aceray_train_label_filter",
    "restarts": "aceray_train_restarts",
    "round": "aceray_refine_round",
    "rescued_fraction": "aceray_refine_rescued_fraction",
}
_METRICS = {
    "refine/moved": ("aceray_refine_moved_fraction", {}),
    "refine/energy": ("aceray_refine_unexplained_fraction", {}),
    "pose/rotation_deg_median": ("aceray_pose_rotation_error_degrees", {}),
    "pose/rotation_sqfrob_mean": ("aceray_pose_rotation_sqfrob", {"statistic": "mean"}),
    "pose/rotation_sqfrob_median": ("aceray_pose_rotation_sqfrob", {"statistic": "median"}),
    "pose/coverage": ("aceray_pose_coverage", {}),
    "fsc/resolution_angstrom_0.5": ("aceray_fsc_resolution_angstrom", {"against": "truth", "threshold": "0.5"}),
    "fsc/resolution_angstrom_0.143": ("aceray_fsc_resolution_angstrom", {"against": "truth", "threshold": "0.143"}),
}
_HALVES = {"against": "halves", "threshold": "0.143"}


class Monitor:
    """Exports what `collect` gives every few seconds, from the first `wake` in a Ray session until it is closed."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def collect(self) -> Iterator[Sample]:
        """The present numbers; called in another thread."""
        raise NotImplementedError

    def wake(self) -> None:
        """Begin to export if this process has a Ray session."""
        if self._thread is None and _session():
            self._thread = threading.Thread(target=self._export_until_closed, name="aceray-monitor", daemon=True)
            self._thread.start()

    def _export_until_closed(self) -> None:
        self._export()
        while not self._over.wait(SECONDS_BETWEEN_EXPORTS):
            self._export()
        self._export()

    def _export(self) -> None:
        if _session():
            for name, value, labels in self.collect():
                if math.isfinite(value):
                    _gauge(name).set(float(value), dict(labels))

    def close(self) -> None:
        """Export the last numbers, which Ray forgets 20 s later, and stop."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)


class RunMonitor(Monitor):
    """What a run reports, and the memory of this process's GPUs."""

    def __init__(self, folder: RunFolder, tracker: Tracker) -> None:
        super().__init__()
        self._labels, self._tracker = labels_of(folder), tracker
        self._latest: Progress | None = None
        self._reported, self._metrics = time.time(), dict[str, float]()
        steps = folder.checkpoint_steps()
        self._checkpointed = folder.checkpoint_file(steps[-1]).stat().st_mtime if steps else self._reported

    def report(self, progress: Progress) -> None:
        """A step or a round is done."""
        self._latest, self._reported = progress, time.time()
        if progress.metrics:
            self._metrics = progress.metrics
        if progress.checkpoint_due:
            self._checkpointed = self._reported
        self.wake()

    def collect(self) -> Iterator[Sample]:
        latest, labels = self._latest, self._labels
        if latest is None:
            return
        yield "aceray_train_step", latest.step, labels
        yield "aceray_train_steps_planned", latest.steps, labels
        yield "aceray_train_particles_per_second", latest.particles_per_second, labels
        yield "aceray_train_report_timestamp_seconds", self._reported, labels
        yield "aceray_train_checkpoint_timestamp_seconds", self._checkpointed, labels
        for name, value in latest.losses.items():
            yield "aceray_train_loss", value, {**labels, "term": name.removeprefix("loss_")}
        for name, gauge in _DETAILS.items():
            if name in latest.details:
                yield gauge, latest.details[name], labels
        if "half_map_resolution_angstrom" in latest.details:
            resolution = latest.details["half_map_resolution_angstrom"]
            yield "aceray_fsc_resolution_angstrom", resolution, {**labels, **_HALVES}
        yield from self._measured()
        if (backlog := self._tracker.backlog) is not None:
            yield "aceray_tracking_backlog_records", backlog, labels
        yield from device_memory(labels)

    def _measured(self) -> Iterator[Sample]:
        for name, value in self._metrics.items():
            if name in _METRICS:
                gauge, more = _METRICS[name]
                yield gauge, value, {**self._labels, **more}
            elif name.startswith("select/"):
                yield "aceray_select_score", value, {**self._labels, "score": name.removeprefix("select/")}


def overseen(
    progress: Generator[Progress, None, Result], name: str, train_steps: int
) -> Generator[Progress, None, Result]:
    """The same steps; one warning whenever the next one does not come for far too long. Nothing is ended."""
    over, wait = threading.Event(), _Wait(name, train_steps)
    threading.Thread(target=wait.watch, args=(over,), name="aceray-overseer", daemon=True).start()
    try:
        with contextlib.closing(progress):
            while True:
                wait.begin()
                try:
                    step = next(progress)
                except StopIteration as end:
                    return end.value
                wait.end(step)
                yield step
    finally:
        over.set()


class _Wait:
    """The present wait for a step, and the longest so far."""

    def __init__(self, name: str, train_steps: int) -> None:
        self._name, self._train_steps = name, train_steps
        self._since: float | None = None
        self._longest, self._last, self._told = 0.0, 0, False

    def begin(self) -> None:
        self._since, self._told = time.monotonic(), False

    def end(self, step: Progress) -> None:
        if self._since is not None and self._last:  # the first comes after the start, which says nothing of steps
            self._longest = max(self._longest, time.monotonic() - self._since)
        self._since, self._last = None, step.step

    def watch(self, over: threading.Event) -> None:
        while not over.wait(SECONDS_WITHOUT_A_STEP / 30):
            since = self._since  # the other thread may end the wait in this moment
            seconds = 0.0 if since is None else time.monotonic() - since
            if not self._told and seconds > self._limit_seconds():
                self._told = True
                last = f"the last was step {self._last}" if self._last else "the first has not come"
                _log.warning(
                    "%s: no step for %.0f min (%s); if this machine, its workers or its storage hang, end the run "
                    "(Ctrl-C) and resume it from its newest checkpoint", self._name, seconds / 60, last,
                )  # fmt: skip

    def _limit_seconds(self) -> float:
        training = 0 < self._last < self._train_steps
        return max(SECONDS_WITHOUT_A_STEP if training else SECONDS_WITHOUT_A_ROUND, SLOWER_THAN_EVER * self._longest)


class DeviceMonitor(Monitor):
    """The memory of a worker's GPUs; its run is exported by the process that follows it."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._labels = labels_of(folder)

    def collect(self) -> Iterator[Sample]:
        return device_memory(self._labels)


class DataMonitor(Monitor):
    """How far the writing of a dataset is."""

    def __init__(self, dataset: str) -> None:
        super().__init__()
        self._labels = {"dataset": dataset}
        self._started, self._first = time.monotonic(), None
        self._done, self._planned, self._refused, self._rate = 0, 0, 0, 0.0

    def report(self, done: int, planned: int, refused: int) -> None:
        """So many particles of those planned are done; `refused` of the whole input so far."""
        if self._first is None:
            self._first = done  # what an earlier attempt did
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._done, self._planned, self._refused = done, planned, refused
        self._rate = (done - self._first) / seconds
        self.wake()

    def collect(self) -> Iterator[Sample]:
        yield "aceray_data_particles", self._done, self._labels
        yield "aceray_data_particles_planned", self._planned, self._labels
        yield "aceray_data_particles_per_second", self._rate, self._labels
        yield "aceray_data_refused_particles", self._refused, self._labels


class StudyMonitor(Monitor):
    """The trials of a study; each exports its own run from its own process."""

    def __init__(self, study: Study, tracker: StudyTracker) -> None:
        super().__init__()
        self._labels, self._tracker = {"study": study.name}, tracker
        self._objectives = {each.metric: each.mode or CRITERIA[each.metric].mode for each in study.objective}
        self._status: dict[str, str] = {}
        self._values: dict[str, Mapping[str, Any]] = {}
        self.restarts = 0

    def report(self, trial: str, status: str, metrics: Mapping[str, Any]) -> None:
        """A trial has this status now, and these metrics if it has measured."""
        self._status |= {trial: status}
        if metrics:
            self._values |= {trial: metrics}
        self.wake()

    def collect(self) -> Iterator[Sample]:
        status, values = dict(self._status), dict(self._values)
        count = Counter(status.values())
        for name in STATUS:
            yield "aceray_study_trials", count[name], {**self._labels, "status": name}
        yield "aceray_study_restarts", self.restarts, self._labels
        for metric, mode in self._objectives.items():
            known = {trial: value for trial in values if (value := values[trial].get(metric)) is not None}
            for trial, value in known.items():
                yield "aceray_study_objective", value, {**self._labels, "trial": trial, "metric": metric}
            finished = [value for trial, value in known.items() if status[trial] == "finished"]
            if finished:
                best = min(finished) if mode == "min" else max(finished)
                yield "aceray_study_best", best, {**self._labels, "metric": metric}
        if (backlog := self._tracker.backlog) is not None:
            yield "aceray_tracking_backlog_records", backlog, {**self._labels, "run": ""}


def labels_of(folder: RunFolder) -> dict[str, str]:
    """Labels of a run by its folder: that of a trial, or of a member of its pair, lies in the folder of a study."""
    path = folder.path
    if folder.trial.exists():
        return {"run": path.name, "study": path.parent.parent.name}
    if RunFolder(path.parent).trial.exists():
        return {"run": f"{path.parent.name}/{path.name}", "study": path.parent.parent.parent.name}
    return {"run": path.name, "study": ""}


def device_memory(labels: Mapping[str, str]) -> Iterator[Sample]:
    """Of the GPUs on which torch holds something in this process: the most it held, and what there is."""
    if not torch.cuda.is_initialized():
        return
    for index in range(torch.cuda.device_count()):
        held = torch.cuda.max_memory_allocated(index)
        if held:
            own = {**labels, "device": str(index)}
            yield "aceray_device_memory_bytes", held, own
            yield "aceray_device_memory_total_bytes", torch.cuda.get_device_properties(index).total_memory, own


def _session() -> bool:
    """Whether this process is part of a Ray cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@functools.cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    metric = BY_NAME[name]
    return Gauge(metric.name, description=f"{metric.help} ({metric.unit})", tag_keys=metric.labels)
