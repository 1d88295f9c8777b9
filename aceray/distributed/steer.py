"""A study steered from a machine outside its cluster, over Ray Client (ray://HOST:10001).

The study runs in a task on the cluster, as it would in a shell there, and what happens comes here as events. Paths mean
there what they mean here, so both must see the directory in which the command was given.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Queue

from aceray.data.storage import sha256_of_file
from aceray.distributed.cluster import connect
from aceray.distributed.failures import known_error
from aceray.distributed.prepare import aceray_version
from aceray.distributed.shared_storage import PATIENCE_SECONDS, token_in, unseen
from aceray.distributed.study_data import OnSimulation
from aceray.distributed.study_results import OnOracle
from aceray.distributed.study_run import OnEvent, StudyResult, run_study
from aceray.errors import ClusterError
from aceray.study import Study

# How often events are fetched, and how long an interrupted study may take to mark its trials.
SECONDS_BETWEEN_EVENTS = 0.5
SECONDS_TO_END = 8.0


def steer_study(
    study: Study,
    address: str,
    resume: bool = False,
    on_event: OnEvent | None = None,
    on_simulation: OnSimulation | None = None,
    on_oracle: OnOracle | None = None,
) -> StudyResult:
    """`run_study` on the cluster of a Ray Client server; an interrupt here ends it there.

    Raises:
        ClusterError: the cluster does not answer, has no aceray or another one, or does not see this directory.
        DataError: this directory cannot be written.
        AcerayError: what the study raised there.
    """
    callbacks = {"on_event": on_event, "on_simulation": on_simulation, "on_oracle": on_oracle}
    listened = {name: function for name, function in callbacks.items() if function is not None}
    with connect(address):
        _check_same_place(address, Path.cwd())
        events = Queue(actor_options={"num_cpus": 0})
        running = _task(_run_here).remote(str(Path.cwd()), study, resume, list(listened), events)
        try:
            return _followed(running, events, listened)
        except KeyboardInterrupt:
            _end(running)
            raise
        except RayError as error:
            raise known_error(error) or ClusterError(
                f"{address}: the study was lost ({_first_line(error)}); look at the cluster, then go on (--resume)"
            ) from error


def _task(function: Callable[..., Any]) -> Any:
    """A task that takes no core, and is not begun again by itself."""
    return ray.remote(num_cpus=0, max_retries=0)(function)


def _followed(running: Any, events: Queue, listened: dict[str, Callable[..., None]]) -> StudyResult:
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([running], timeout=SECONDS_BETWEEN_EVENTS)
        for name, arguments in events.get_nowait_batch(events.qsize()):
            listened[name](*arguments)
    return ray.get(running)


def _run_here(directory: str, study: Study, resume: bool, listened: list[str], events: Queue) -> StudyResult:
    """What runs on the cluster."""

    def told(name: str) -> Callable[..., None]:
        return lambda *arguments: events.put((name, arguments))

    os.chdir(directory)
    return run_study(study, "auto", resume, **{name: told(name) for name in listened})


def _end(running: Any) -> None:
    """Interrupt the study on the cluster and give it the time to mark its trials."""
    with contextlib.suppress(RayError):
        ray.cancel(running)
        ray.wait([running], timeout=SECONDS_TO_END)


# ---- the same place


def _check_same_place(address: str, directory: Path) -> None:
    with token_in(directory) as token:
        try:
            version, missing = ray.get(_task(_look).remote({str(token): sha256_of_file(token)}))
        except RayError as error:
            raise ClusterError(
                f"{address}: aceray does not start there ({_first_line(error)}); install aceray {aceray_version()} on "
                "all nodes, with the same Python as here"
            ) from error
    if version != aceray_version():
        raise ClusterError(
            f"{address}: aceray {version} runs there, {aceray_version()} here; install the same on both sides"
        )
    if missing:
        raise ClusterError(
            f"{address}: the cluster does not see {directory}; start from a directory that it shares with this "
            "machine, or on the cluster itself: ray job submit --address http://HEAD:8265 -- aceray tune STUDY "
            "--address auto"
        )


def _look(digests: dict[str, str]) -> tuple[str, list[str]]:
    return aceray_version(), unseen(digests, PATIENCE_SECONDS)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
