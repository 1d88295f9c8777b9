"""Memory, a full object store, workers and supervisors that hang: a line within a stated time, never a silent wait."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from aceray.config import Config
from aceray.data.particles import open_particles
from aceray.distributed import supervisor
from aceray.distributed.cluster import connect
from aceray.distributed.failures import known_error
from aceray.distributed.run import run
from aceray.errors import ClusterError
from aceray.folder import RunFolder
from aceray.presets import load_config
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
