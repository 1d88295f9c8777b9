"""A run on Ray Train: one supervising actor, workers that train together, and their progress as an iterator.

The supervisor runs the trainer and is the mailbox of the workers. It needs no core; all else that the run starts on the
cluster belongs to it, so that killing it ends the run and nothing is left behind.
"""

import contextlib
import dataclasses
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.train.torch import TorchTrainer, get_device
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from aceray.config import Config
from aceray.data.location import Location
from aceray.data.particles import ParticleSet, ParticleStack, RowGroup, open_particles, streamed_stack
from aceray.distributed import notice
from aceray.distributed.cluster import WorkerResources, connect, reserve
from aceray.distributed.failures import known_error, own_error
from aceray.distributed.ingest import collect, parts_by_ray_data, plan_reading
from aceray.distributed.memory import fits, room
from aceray.distributed.monitor import DeviceMonitor
from aceray.distributed.process_group import NodeAddressConfig
from aceray.distributed.share import Place, Share, within_memory
from aceray.distributed.shared_storage import check_shared
from aceray.errors import ClusterError
from aceray.folder import RunFolder
from aceray.train.loop import Progress

ATTEMPTS = 3
# Workers average their losses every so many steps, or seconds where steps are slow: a message costs more than a step's
# worth of waiting.
STEPS_BETWEEN_AVERAGES = 10
SECONDS_BETWEEN_AVERAGES = 1.0
SECONDS_BETWEEN_POSTS = 0.25
# How long the supervisor may not answer the driver; how long workers wait for one of them that is alive but does not
# compute, or still reads its particles.
SECONDS_TO_ANSWER = 60.0
SECONDS_TO_MEET = 900
ENVIRONMENT = {
    # How often Ray Train looks at its workers; also the longest wait at the end of a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How long a worker's process may not answer before it is killed and another started; Ray's own is ten minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # Workers keep their working directory: relative paths mean what they meant to the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

Told = Literal["", "driver", "worker"]
"""Who was told to end: nobody, the driver, by which the run ends, or a worker, whose successor goes on with it."""
_heard: list[Told] = []  # in a worker's process
_ADVICE_TO_RESUME = "the workers were told to end and have kept a checkpoint; resume from it (--existing resume)"
ShareOfRun = Callable[[Config, RunFolder, ParticleSet, ParticleStack, Place], Generator[Progress, None, Share]]


@dataclass(frozen=True)
class Task:
    """What every worker needs to do its share; `work` is what it does with its particles.

    `seconds_to_meet` is how long they wait for one of them.
    """

    config: Config
    folder: Path
    particles: Location
    groups: list[list[RowGroup]]
    box: int
    work: ShareOfRun
    seconds_to_meet: int


class EndedError(ClusterError):
    """The driver was told to end, and so the workers have ended, with a checkpoint of their last step."""


class WorkerEndedError(ClusterError):
    """The same of one worker; Ray Train starts another in its place."""


class Supervisor:
    """Runs the trainer; collects what workers post until the driver takes it."""

    def __init__(self) -> None:
        self._events: deque[Progress] = deque()  # posting and taking happen in different threads
        self._shares: dict[int, Share] = {}
        self._group: PlacementGroup | None = None
        self._starts = 0
        self._told: Told = ""

    def hold(self, group: PlacementGroup) -> None:
        """Called by rank 0 at its start: what the cluster has set aside for the workers."""
        self._group = group
        self._starts += 1

    def group(self) -> PlacementGroup | None:
        """Called by the driver at the end of a run: what it must give back."""
        return self._group

    def end(self) -> None:
        """Called by the driver when it is told to end: the workers shall keep a checkpoint and end."""
        self._told = "driver"

    def post(self, events: list[Progress]) -> Told:
        """Called by rank 0: steps that are done; whether there shall be more."""
        restarts = {"restarts": self._starts - 1.0}
        self._events.extend(dataclasses.replace(event, details=event.details | restarts) for event in events)
        return self._told

    def take(self) -> list[Progress]:
        """Called by the driver: the steps posted since the last call, in order."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def deliver(self, rank: int, share: Share) -> None:
        """Called by every rank at the end: its result."""
        self._shares[rank] = share

    def fit(self, task: Task, resources: WorkerResources) -> list[Share]:
        """Train, restarting lost workers from the newest checkpoint; the workers' results by rank."""
        particles = open_particles(task.particles, task.config.data.half_set)
        # Each task's process loads torch; more of them than cores would wait for one another.
        tasks_at_once = max(1, int(ray.cluster_resources().get("CPU", 1)) // resources.workers)
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "task": task,
                "gpus": resources.gpus,
                "tasks_at_once": tasks_at_once,
                "supervisor": ray.get_runtime_context().current_actor,
            },
            datasets={
                f"particles_{rank}": plan_reading(particles, groups, task.box, tasks_at_once)
                for rank, groups in enumerate(task.groups)
            },
            torch_config=NodeAddressConfig(timeout_s=task.seconds_to_meet),
            # Not split: a worker executes its own data set and no other.
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=resources.bundle
            ),
            run_config=ray.train.RunConfig(
                name="train",
                storage_path=str(RunFolder(task.folder).scratch),
                failure_config=ray.train.FailureConfig(
                    max_failures=ATTEMPTS - 1, controller_failure_limit=ATTEMPTS - 1
                ),
                callbacks=[StopOnKnownError()],
            ),
        )
        trainer.fit()
        return [self._shares[rank] for rank in range(resources.workers)]


class StopOnKnownError(ray.train.UserCallback):
    """Ends a run whose worker raised an AcerayError: it would raise it again after a restart."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, which gives up when this raises."""
        for error in worker_exceptions.values():
            known = own_error(error)
            if known is not None and not isinstance(known, WorkerEndedError):
                raise known


def train_on_ray(
    config: Config, folder: RunFolder, particles: ParticleSet, groups: list[list[RowGroup]], box: int, work: ShareOfRun
) -> Generator[Progress, None, list[Share]]:
    """Progress of the run as it comes from the workers; returns their results.

    Closing the generator, or an interrupt in it, ends the run on the cluster.

    Raises:
        ClusterError: the cluster does not answer, cannot give the workers, has a node that does not see the storage,
            or lost a worker too often.
        AcerayError: what a worker raised.
    """
    with connect(config.resources.address):
        resources = reserve(config.resources)
        if config.resources.address is not None:
            check_shared(folder.path, "runs", [particles.path])
        task = Task(config, folder.path, particles.path, groups, box, work, SECONDS_TO_MEET)
        # Several calls at once: workers post while the trainer runs.
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 4, "runtime_env": {"env_vars": ENVIRONMENT}}
        supervisor: Any = ray.remote(Supervisor).options(**options).remote()
        try:
            return (yield from _followed(supervisor, supervisor.fit.remote(task, resources)))
        except RayError as error:
            raise _explained(error, folder) from error
        finally:
            _stop(supervisor)
            shutil.rmtree(folder.scratch, ignore_errors=True)


def _followed(supervisor: Any, running: Any) -> Generator[Progress, None, list[Share]]:
    """What the workers post until they are done; a notice that the driver is given is handed on to them."""
    done: list[Any] = []
    events: list[Progress] = []
    while not done and not events:  # before the first step there is nothing to keep
        done, _ = ray.wait([running], timeout=SECONDS_BETWEEN_POSTS)
        events = ray.get(supervisor.take.remote(), timeout=SECONDS_TO_ANSWER)
    with notice.heeded():
        yield from events
        while not done:
            if notice.given():
                supervisor.end.remote()
            done, _ = ray.wait([running], timeout=SECONDS_BETWEEN_POSTS)
            yield from ray.get(supervisor.take.remote(), timeout=SECONDS_TO_ANSWER)
    return ray.get(running)


def _stop(supervisor: Any) -> None:
    """Kill the run; Ray would keep what it had set aside for killed workers as long as the driver lives."""
    group: Any = None
    with contextlib.suppress(RayError):
        group = ray.get(supervisor.group.remote(), timeout=2)
    ray.kill(supervisor)
    if group is not None:
        remove_placement_group(group)


def _explained(error: RayError, folder: RunFolder) -> BaseException:
    """What the user should see of an error that ended the run on the cluster; our own bugs keep their traceback."""
    known = known_error(error)
    if known is not None:
        return KeyboardInterrupt(str(known)) if isinstance(known, EndedError) else known
    steps = folder.checkpoint_steps()
    resume = f"then resume from step {steps[-1] if steps else 0} (--existing resume)"
    if isinstance(error, GetTimeoutError):
        return ClusterError(
            f"the run's supervisor did not answer within {SECONDS_TO_ANSWER:.0f} s; look at the cluster, {resume}"
        )
    cause = getattr(error, "cause", error)
    failures = [*getattr(cause, "worker_failures", {}).values(), getattr(cause, "controller_failure", None), cause]
    kinds = ("WorkerHealthCheck", "WorkerGroupStartup", "ActorDiedError", "ActorUnavailableError")
    # the last is what gloo says of a worker that does not come
    lost = [each for each in failures if type(each).__name__.startswith(kinds) or "Timed out waiting" in str(each)]
    if not lost:
        return error
    reason = " ".join(str(lost[0]).split())[:200]
    return ClusterError(
        f"workers were lost or did not start, {ATTEMPTS} times in all ({reason}); look at the memory and the logs of "
        f"their nodes, {resume}"
    )


def _work(settings: dict[str, Any]) -> None:
    """The training function of one Ray Train worker."""
    task: Task = settings["task"]
    supervisor = settings["supervisor"]
    context = ray.train.get_context()
    device = get_device() if settings["gpus"] else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    read = parts_by_ray_data(settings["tasks_at_once"])
    place = Place(context.get_world_rank(), context.get_world_size(), str(device), read)
    if place.rank == 0:
        supervisor.hold.remote(get_current_placement_group())
    torch.set_num_threads(task.config.train.threads or max(1, int(task.config.resources.cpus_per_worker)))
    ray.get_runtime_context().current_actor.__ray_call__.remote(_hear_sigterm)
    try:
        with within_memory(), contextlib.closing(DeviceMonitor(RunFolder(task.folder))) as monitor:
            opened = open_particles(task.particles, task.config.data.half_set)
            progress = task.work(task.config, RunFolder(task.folder), opened, _stack(task, opened, place), place)
            monitor.wake()
            share = _post(_averaged(progress, place), supervisor, place)
    except KeyboardInterrupt as end:
        raise (EndedError if "driver" in _heard else WorkerEndedError)(_ADVICE_TO_RESUME) from end
    ray.get(supervisor.deliver.remote(place.rank, share))


def _stack(task: Task, particles: ParticleSet, place: Place) -> ParticleStack:
    """The particles of this worker: all of them by Ray Data, or a stream that reads by it."""
    groups = task.groups[place.rank]
    if fits(task.config, particles, groups, task.box, place.device):
        planned: Any = ray.train.get_dataset_shard(f"particles_{place.rank}")
        return collect(planned)
    return streamed_stack(particles, groups, task.box, room(task.config), place.read)


def _hear_sigterm(actor: object) -> None:
    """Called in the main thread of a worker, which alone gets signals; Ray's own handler would end it at once."""
    signal.signal(signal.SIGTERM, lambda number, frame: _heard.append("worker"))


def _averaged(progress: Generator[Progress, None, Share], place: Place) -> Generator[list[Progress], None, Share]:
    """Portions of steps with losses and metrics averaged over the workers, which all come here at the same steps.

    There they also agree on whether they were told to end.
    """
    waiting: list[Progress] = []
    portion = 1
    while True:
        try:
            # poses and a volume would make messages of megabytes
            waiting.append(dataclasses.replace(next(progress), snapshot=None))
        except StopIteration as end:
            return end.value
        last = waiting[-1]
        if place.workers == 1 or last.step % portion == 0 or last.checkpoint_due:
            gathered = place.gather((waiting, list(_heard)))
            averaged = [_average(list(same)) for same in zip(*(steps for steps, _ in gathered), strict=True)]
            if any(heard for _, heard in gathered):
                _heard.extend(told for _, heard in gathered for told in heard)
                notice.give()
            # alike on all workers
            step_seconds = averaged[-1].details.get("step_seconds", 0.0) + 1e-9
            portion = max(1, min(STEPS_BETWEEN_AVERAGES, int(SECONDS_BETWEEN_AVERAGES / step_seconds)))
            yield averaged
            waiting = []


def _average(same_step: list[Progress]) -> Progress:
    first = same_step[0]
    count = len(same_step)
    return dataclasses.replace(
        first,
        losses={name: sum(one.losses[name] for one in same_step) / count for name in first.losses},
        metrics={name: sum(one.metrics[name] for one in same_step) / count for name in first.metrics},
        particles_per_second=sum(one.particles_per_second for one in same_step),
        # the slowest worker is the one that all wait for
        details={name: max(one.details[name] for one in same_step) for name in first.details},
    )


def _post(portions: Generator[list[Progress], None, Share], supervisor: Any, place: Place) -> Share:
    """Send the steps to the supervisor from rank 0, a few times a second; every rank reports its checkpoints to Ray."""
    waiting: list[Progress] = []
    posted = time.monotonic()
    try:
        while True:
            waiting += next(portions)
            last = waiting[-1]
            if time.monotonic() - posted >= SECONDS_BETWEEN_POSTS or last.checkpoint_due:
                _send(waiting, supervisor, place)
                waiting, posted = [], time.monotonic()
            if last.checkpoint_due:
                # The checkpoint itself is in the run folder; Ray only learns how far the run is.
                ray.train.report({"step": last.step, **last.losses})
    except StopIteration as end:
        return end.value
    finally:
        _send(waiting, supervisor, place)  # also the steps before an error


def _send(events: list[Progress], supervisor: Any, place: Place) -> None:
    # Waiting for the answer, about a millisecond, keeps the order and notices a supervisor that is gone.
    if place.rank == 0 and events and (told := ray.get(supervisor.post.remote(events))):
        _heard.append(told)
