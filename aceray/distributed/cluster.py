"""Connecting to Ray, and asking whether it can give the workers of a run before a run waits for them."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these when it is imported; what the user has set wins. Without the first, `uv run` would start every worker
# through uv. Token authentication needs nothing: it is on for new local clusters unless RAY_AUTH_MODE says otherwise.
for _key, _value in {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
    os.environ.setdefault(_key, _value)

import psutil  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402
from ray._private.log import PlainRayHandler  # noqa: E402
from ray.exceptions import AuthenticationError  # noqa: E402
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402

from aceray.config import Resources  # noqa: E402
from aceray.errors import ClusterError  # noqa: E402

# A worker leaves this share of its cores to the tasks that read its particles; with all cores taken they would wait for
# the worker and the worker for them.
SHARE_OF_TASKS = 0.1
# How long a cluster may take to free or start what a run asks for.
PATIENCE_SECONDS = 60.0
# How long a cluster may take to open a connection; Ray alone would try for minutes.
SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class WorkerResources:
    """What Ray sets aside for each of `workers` workers."""

    workers: int
    cpus: float
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one worker under Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@contextlib.contextmanager
def connect(address: str | None, dashboard: bool = False) -> Iterator[None]:
    """A Ray session: the one this process has, the cluster at `address`, or a new local one that ends with the context.

    Without an address no running cluster is joined. The dashboard of a local cluster costs a second and some memory.

    Raises:
        ClusterError: the cluster does not answer or refuses the token.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options["include_dashboard"] = dashboard
    try:
        _start(options)
        yield
    finally:
        _end()  # also when an interrupt came while it started


def prepare_ray_data(*, in_order: bool = False) -> None:
    """Ray Data without bars of its own, with the errors of its tasks as they were raised; results as they come, or in
    the order of what they are made of."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a DataError stays one
    context.execution_options.preserve_order = in_order
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, PlainRayHandler):  # Ray's own to the screen; its file and the user's handlers stay
            handler.setLevel(logging.ERROR)


def check_answers(address: str) -> None:
    """Find out quickly that nothing answers at `[ray://]host:port`; an address of another kind is left to Ray.

    Raises:
        ClusterError: nothing answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str, error: Exception) -> ClusterError:
    reason = " ".join(str(error).split())[:200]
    return ClusterError(
        f"Ray at {address}: cannot connect ({reason}); check the address, that the cluster runs, and its token "
        "(RAY_AUTH_MODE, RAY_AUTH_TOKEN)"
    )


def _start(options: dict[str, Any]) -> None:
    check_answers(options["address"])
    try:
        with _own_sigterm():
            ray.init(**options)
    except (ConnectionError, AuthenticationError, ValueError) as error:  # the last of an address that is none
        raise _no_answer(options["address"], error) from error
    _protect_token()


def _end() -> None:
    """Shut Ray down, and with it the agents that a Ray which was still starting leaves behind for a minute."""
    rays = [process for process in psutil.Process().children(recursive=True) if _name(process).startswith("ray")]
    ray.shutdown()
    _, left = psutil.wait_procs(rays, timeout=1.0)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts its own handler in the place of the caller's, which knows better how to end."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGTERM, handler)


def reserve(
    resources: Resources, patience_seconds: float = PATIENCE_SECONDS, gpus: float | None = None
) -> WorkerResources:
    """What each worker gets, after the cluster has shown that it can give it; `gpus` overrides what resources say.

    The workers' resources are reserved together and given back at once, which also tells an autoscaler to start nodes.
    resources.patience_seconds overrides the time that the caller gives them.

    Raises:
        ClusterError: the cluster cannot give them, or not within the time.
    """
    total = ray.cluster_resources()
    wants_gpu = total.get("GPU", 0) >= resources.workers if resources.gpu is None else resources.gpu
    each = float(wants_gpu) if gpus is None else gpus
    asked = WorkerResources(resources.workers, resources.cpus_per_worker * (1 - SHARE_OF_TASKS), each)
    if resources.address is None and not _fits(asked, resources, total):
        raise ClusterError(_refusal(resources, asked, "has only"))
    patience_seconds = resources.patience_seconds or patience_seconds
    group = placement_group([asked.bundle] * asked.workers, strategy="PACK")
    try:
        if not group.wait(timeout_seconds=patience_seconds):
            raise ClusterError(_refusal(resources, asked, f"did not give that within {patience_seconds:.0f} s; it has"))
    finally:
        remove_placement_group(group)
    _await_return(asked)
    return asked


def _fits(asked: WorkerResources, resources: Resources, total: Mapping[str, float]) -> bool:
    cpus = resources.workers * resources.cpus_per_worker
    return cpus <= total.get("CPU", 0) and asked.workers * asked.gpus <= total.get("GPU", 0)


def _await_return(asked: WorkerResources) -> None:
    """Wait a moment for the reservation to be given back, which Ray does in the background."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and ray.available_resources().get("CPU", 0) < asked.workers * asked.cpus:
        time.sleep(0.02)


def _refusal(resources: Resources, asked: WorkerResources, has: str) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    each = f"{resources.cpus_per_worker:g} CPUs" + (f" and {asked.gpus:g} GPU" if asked.gpus else "")
    there = ", ".join(f"{total.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))
    return (
        f"resources: asked for {asked.workers} workers with {each} each; the cluster {has} {there}. "
        "Lower resources.workers, resources.cpus_per_worker or resources.gpu"
    )


def _protect_token() -> None:
    """Ray writes its token file readable by all users of the machine; only its owner needs it."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)
