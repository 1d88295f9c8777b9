"""Memory, a full object store, workers and supervisors that hang: a line within a stated time, never a silent wait."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from aceray.api import tune
from aceray.config import Config
from aceray.data.particles import open_particles
from aceray.distributed import monitor, supervisor, sweep
from aceray.distributed.cluster import connect
from aceray.distributed.failures import known_error
from aceray.distributed.monitor import overseen
from aceray.distributed.run import exhaust, run
from aceray.distributed.shelf import Shelf
from aceray.distributed.trial import TrialEvent
from aceray.errors import ClusterError
from aceray.folder import RunFolder
from aceray.presets import load_config
from aceray.study import load_study
from aceray.train.loop import Progress
from tests.distributed import accidents
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles
from tests.faults.test_interrupts import crowded

ROOT = Path(__file__).parent.parent.parent
Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_particles(tmp_path_factory.mktemp("data") / "blobs").path


@pytest.fixture
def configure(tmp_path: Path, particles: Path) -> Configure:
    return lambda *overrides: load_config(f"data.path={particles}", f"runs={tmp_path / 'runs'}", *QUICK, *overrides)


@pytest.fixture
def own_ray() -> Iterator[None]:
    """The Ray of the test itself may not be that of others: it is stopped, or given limits."""
    if ray.is_initialized():
        pytest.skip("another Ray runs in this process; run this file alone")
    with connect(None):
        yield


# ---- processes that hang


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_hangs_is_replaced(configure: Configure, monkeypatch: pytest.MonkeyPatch, own_ray: None) -> None:
    """SIGSTOP: the process is there and answers nothing."""
    steady = run(configure("name=steady", "resources.workers=2"))
    monkeypatch.setitem(supervisor.ENVIRONMENT, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "5")
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.stopped_once)
    shaken = run(configure("resources.workers=2"))
    assert (shaken.folder / "stopped").exists()
    mine, theirs = (RunFolder(each.folder).read_checkpoint(40)[0] for each in (steady, shaken))
    assert all(theirs[name].equal(mine[name]) for name in mine)
    assert [row["step"] for row in RunFolder(shaken.folder).read_history()] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_always_hang_are_one_line(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, own_ray: None
) -> None:
    monkeypatch.setitem(supervisor.ENVIRONMENT, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "5")
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.stopped_always)
    with pytest.raises(ClusterError, match=r"3 times in all \(.*has been hanging for .* seconds.*then resume") as error:
        run(configure("resources.workers=2"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_do_not_compute_are_one_line(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, own_ray: None
) -> None:
    """Their process answers Ray; it is the other worker that waits in vain."""
    monkeypatch.setattr(supervisor, "SECONDS_TO_MEET", 10)
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.asleep_always)
    with pytest.raises(ClusterError, match=r"3 times in all \(.*then resume") as error:
        run(configure("resources.workers=2"))
    print(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lone_worker_that_makes_no_step_is_told(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own_ray: None
) -> None:
    """Nobody waits for it but the user, whose run goes on when it does."""
    monkeypatch.setattr(monitor, "SECONDS_WITHOUT_A_STEP", 3.0)
    monkeypatch.setattr(monitor, "SLOWER_THAN_EVER", 1.0)
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.asleep_for_a_while)
    result = run(configure("resources.workers=1"))
    assert any(re.match(r"run: no step for .* min \(the last was step \d+\); if", text) for text in caplog.messages)
    assert [row["step"] for row in RunFolder(result.folder).read_history()] == list(range(1, 41))


def waits(pauses: list[float], train_steps: int = 100) -> Generator[Progress, None, str]:
    """Steps that take so many seconds."""
    for step, pause in enumerate(pauses, 1):
        time.sleep(pause)
        yield Progress(step, train_steps, {}, 1.0)
    return "end"


@pytest.mark.parametrize(
    ("pauses", "train_steps", "told"),
    [
        ([0.8, 0.0, 0.8, 0.8, 0.0], 100, ["step 2"]),  # the start may take longer; then it has been as slow before
        ([0.0, 0.8, 0.0, 0.8], 2, ["step 1"]),  # rounds may take longer
        ([0.0, 1.6], 1, ["step 1"]),
        ([1.6], 1, ["the first has not come"]),
    ],
)
def test_a_step_that_does_not_come_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pauses: list[float],
    train_steps: int,
    told: list[str],
) -> None:
    monkeypatch.setattr(monitor, "SECONDS_WITHOUT_A_STEP", 0.4)
    monkeypatch.setattr(monitor, "SECONDS_WITHOUT_A_ROUND", 1.2)
    monkeypatch.setattr(monitor, "SLOWER_THAN_EVER", 1.5)
    before = threading.active_count()
    steps: list[int] = []

    def slow(event: Progress) -> None:
        time.sleep(0.6 if event.step == 1 else 0.0)  # its own time is not the run's
        steps.append(event.step)

    assert exhaust(overseen(waits(pauses), "it", train_steps), slow) == "end"
    assert steps == list(range(1, len(pauses) + 1))
    assert len(caplog.messages) == len(told)
    assert all(text in message for text, message in zip(told, caplog.messages, strict=True))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_that_does_not_answer_is_told(
    tmp_path: Path, particles: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP of its process; it goes on when it is told to."""
    monkeypatch.setattr(sweep, "SECONDS_TO_CALL", 5.0)
    base = [*QUICK, "train.evaluate_every=5", f"data.path={particles}"]
    objective = "objective: {metric: select/d4_consistency, mode: min}"
    text = f"name: s\nstudies: {tmp_path}\nbase: {base}\nspace:\n  pip.weight: [0.0]\n{objective}\n"
    (tmp_path / "s.yaml").write_text(text)
    stopped: list[psutil.Process] = []

    def stop(event: TrialEvent) -> None:
        if event.report is not None and not stopped:
            children = psutil.Process().children(recursive=True)
            stopped.extend(each for each in children if each.name().startswith("ray::ImplicitFu"))
            stopped[0].send_signal(signal.SIGSTOP)
            threading.Timer(15.0, stopped[0].send_signal, (signal.SIGCONT,)).start()

    result = tune(load_study(str(tmp_path / "s.yaml")), on_event=stop)
    (told,) = (text for text in caplog.messages if "the trial's process has not answered for" in text)
    assert "go on with it (--resume)" in told and "\n" not in told
    assert result.count("finished") == 1


def test_the_shelf_tells_the_study_what_its_trials_say() -> None:
    shelf = Shelf()
    assert not shelf.call("a", ["careful"], kept=False)
    assert shelf.news(told=False).warnings == [("a", "careful")]
    assert shelf.news(told=True).warnings == []
    assert shelf.call("a", [], kept=False)
    assert shelf.call("a", [], kept=True)
    news = shelf.news(told=False)
    assert news.kept == {"a"} and 0 <= news.silent_seconds["a"] < 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_supervisor_that_hangs_is_one_line(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, own_ray: None
) -> None:
    stopped: list[float] = []

    def stop(event: object) -> None:
        if not stopped:
            children = psutil.Process().children(recursive=True)
            (found,) = [each for each in children if "ray::Supervisor" in " ".join(each.cmdline())]
            found.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(supervisor, "SECONDS_TO_ANSWER", 5.0)
            stopped.append(time.monotonic())

    with pytest.raises(ClusterError, match=r"did not answer within 5 s; .* resume") as error:
        run(configure("resources.workers=1", "train.steps=100000"), on_progress=stop)
    assert "\n" not in str(error.value)
    assert time.monotonic() - stopped[0] < 20 * crowded()


# ---- memory

LIMITED = """
import resource, sys
from aceray.api import load_config, train
from aceray.errors import AcerayError
def hold(event):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
try:
    train(load_config(*sys.argv[1:]), "error", hold)
except AcerayError as error:
    print("told:", error)
"""


def test_memory_that_the_system_refuses_is_one_line(configure: Configure, tmp_path: Path) -> None:
    """After the first step the process may take one more megabyte."""
    overrides = [*QUICK, f"runs={tmp_path / 'runs'}", f"data.path={configure().data.path}"]
    overrides += ["encoder.width=1024", "train.evaluate_every=2", "train.checkpoint_every=2"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^told: the memory of this machine is used up \(.*\); lower train.batch", done.stdout), (
        done.stdout
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_takes_all_memory_is_one_line(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's monitor kills it before the kernel would; the threshold is 4 GB above what is used now."""
    if ray.is_initialized():
        pytest.skip("another Ray runs in this process; run this file alone")
    memory = psutil.virtual_memory()
    if memory.available < 8 * 2**30:
        pytest.skip("needs 8 GB of memory")
    used = memory.total - memory.available
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(used + 4 * 2**30) / memory.total:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setattr("aceray.distributed.run.train_share", accidents.hungry)
    with pytest.raises(ClusterError, match=r"memory") as error:
        run(configure("resources.workers=1"))
    assert re.search(r"the memory of a node is used up|look at the memory", str(error.value))
    assert "\n" not in str(error.value)


# ---- Ray's object store


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_particles_that_do_not_fit_into_the_object_store(tmp_path: Path, configure: Configure) -> None:
    """A store of 80 MB, particles of 200 MB: Ray moves them to disk and the run is the same."""
    if ray.is_initialized():
        pytest.skip("another Ray runs in this process; run this file alone")
    large = write_large(tmp_path / "large", 12_800)
    settings = (f"data.path={large}", "train.steps=4", "train.evaluate_every=100", "encoder.width=16")
    here = run(configure("name=here", *settings))
    ray.init(
        address="local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    try:
        there = run(configure("name=there", "resources.workers=1", *settings))
    finally:
        ray.shutdown()
    mine, theirs = (RunFolder(each.folder).read_checkpoint(4)[0] for each in (here, there))
    assert all(theirs[name].equal(mine[name]) for name in mine)


def write_large(path: Path, count: int) -> Path:
    """Noise of 64 px, 16 kB a particle once it is read."""
    import torch

    from aceray.data.manifest import ImageLayout
    from aceray.data.writer import ParticleWriter

    layout = ImageLayout(box=64, pixel_size_angstrom=2.0, ctf=False, image_dtype="float16")
    generator = torch.Generator().manual_seed(1)
    with ParticleWriter(path, layout) as writer:
        for first in range(0, count, 2560):
            number = torch.arange(first, first + 2560)
            images = torch.randn(2560, 64, 64, generator=generator)
            writer.write(images, {"particle_id": number.numpy(), "half_set": (number % 2 + 1).numpy()})
        writer.finish({"kind": "noise"})
    assert len(open_particles(path).row_groups()) == count // 256
    return path


@pytest.mark.parametrize(
    ("error", "advice"),
    [(ObjectStoreFullError("full"), "lower data.box"), (OutOfDiskError("full"), "free some space")],
)
def test_a_full_store_whose_disk_is_full_is_one_line(error: Exception, advice: str) -> None:
    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = error
    known = known_error(wrapped)
    assert isinstance(known, ClusterError) and advice in str(known) and "\n" not in str(known)
