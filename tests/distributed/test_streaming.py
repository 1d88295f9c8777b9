"""Runs whose images are streamed: what runs in memory give, exactly resumed, within their memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack, open_particles, streamed_stack
from aceray.data.stream import StreamedImages
from aceray.distributed import ingest, memory
from aceray.distributed.ingest import parts_by_ray_data, read_here
from aceray.distributed.run import evaluate_run, evaluate_run_with_oracle, exhaust, run, run_steps
from aceray.distributed.share import Place, train_share
from aceray.errors import ConfigError, DataError
from aceray.folder import RunFolder, RunResult
from aceray.presets import load_config
from aceray.train.loop import Progress
from tests.distributed import particles as blobs
from tests.distributed.conftest import QUICK
from tests.distributed.particles import BOX, write_particles

ROOT = Path(__file__).parents[2]
Configure = Callable[..., Config]
GROUP = 256 * BOX**2 * 4  # bytes
ROUNDS = ("refine={}", "refine.registers=false", "refine.search_rounds=1", "refine.polish_rounds=1")
SHORT = (*ROUNDS, "encoder.heads=1", "train.steps=8")


def gib(groups: float) -> str:
    return f"data.memory_gib={groups * GROUP / 2**30}"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ParticleSet:
    """3,072 particles in 12 row groups, whose truth is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blobs, "SHARDS", 6)
        return write_particles(tmp_path_factory.mktemp("many") / "blobs", truth=True)


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[ParticleStack]:
    """What runs in this process were given to train on."""
    seen: list[ParticleStack] = []

    def watched(config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place):
        seen.append(stack)
        return train_share(config, folder, particles, stack, place)

    monkeypatch.setattr("aceray.distributed.run.train_share", watched)
    return seen


def journal(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "train/particles_per_second"} for row in rows]


def assert_same(ours: RunResult, theirs: RunResult) -> None:
    assert journal(ours.folder) == journal(theirs.folder)
    np.testing.assert_array_equal(ours.volume, theirs.volume)
    pandas.testing.assert_frame_equal(ours.poses, theirs.poses)


@pytest.mark.parametrize(
    ("groups", "settings"),
    [(4.5, ("pip.noise.kind=background", "data.heldout_fraction=0.1", "train.lanes=2")), (2.5, ("data.half_set=2",))],
)
def test_streamed_through_one_window_a_run_is_that_in_memory(
    configure: Configure, stacks: list[ParticleStack], groups: float, settings: tuple[str, ...]
) -> None:
    """Training, refinement, poses and metrics, to the last bit: the images fit, but not with their coefficients."""
    inside = run(configure("name=inside", *SHORT, *settings))
    streamed = run(configure("name=streamed", gib(groups), *SHORT, *settings))
    assert isinstance(stacks[0].images, torch.Tensor) and isinstance(stacks[1].images, StreamedImages)
    assert_same(streamed, inside)


def test_only_the_refinement_streams_where_the_crops_fit(configure: Configure, stacks: list[ParticleStack]) -> None:
    inside = run(configure("name=inside", "data.box=8", *SHORT))
    streamed = run(configure("name=streamed", "data.box=8", gib(5), *SHORT))
    assert all(isinstance(stack.images, torch.Tensor) for stack in stacks)
    assert not memory.fits(
        configure("data.box=8", gib(5), *SHORT),
        open_particles(configure().data.path),
        open_particles(configure().data.path).row_groups(),
        BOX,
        "cpu",
        memory.bytes_held(stacks[1]),
    )
    assert_same(streamed, inside)


@pytest.fixture(scope="module")
def windows(many: ParticleSet, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of windows of two row groups, three of them in an epoch of a lane."""
    paths = f"data.path={many.path}", f"runs={tmp_path_factory.mktemp('windows')}"
    return run(load_config(*paths, *QUICK, *SHORT, "train.steps=16", "train.batch=256", "train.lanes=2", gib(8)))


@pytest.mark.parametrize("stop", [14, pytest.param(17, marks=pytest.mark.slow)])
def test_a_run_of_windows_goes_on_exactly(windows: RunResult, tmp_path: Path, stop: int) -> None:
    """Step 14 ends amid a window of the second epoch, 17 is a round of refinement."""

    def interrupt(event: Progress) -> None:
        if event.step == stop:
            raise KeyboardInterrupt

    config = load_config(str(windows.folder / "config.yaml"), f"runs={tmp_path}", "train.checkpoint_every=1")
    with pytest.raises(KeyboardInterrupt):
        run(config, on_progress=interrupt)
    assert_same(run(config, existing="resume"), windows)


def test_a_run_of_windows_is_evaluated_again_and_by_the_oracle(
    windows: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("everything was read into memory")

    monkeypatch.setattr("aceray.distributed.share.read_here", refused)
    monkeypatch.setattr("aceray.train.oracle.SEARCHED_PARTICLES", 64)
    before = windows.metrics
    again = evaluate_run(windows.folder).metrics
    for name in ("refine/energy", "pose/rotation_sqfrob_mean", "select/d4_consistency"):
        assert again[name] == pytest.approx(before[name], rel=1e-6)
    found = evaluate_run_with_oracle(windows.folder).metrics
    assert found["oracle/fsc/resolution_px_0.5"] < found["fsc/resolution_px_0.5"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_streaming_workers_do_what_one_does_with_twice_the_memory(windows: RunResult, tmp_path: Path) -> None:
    paths = str(windows.folder / "config.yaml"), f"runs={tmp_path}", "refine=null", "train.steps=8"
    one = run(load_config(*paths, "name=one"))
    two = run(load_config(*paths, "name=two", "resources.workers=2", gib(4)))
    for ours, theirs in zip(journal(two.folder), journal(one.folder), strict=True):
        kept = {name: value for name, value in ours.items() if name.startswith("train/")}
        assert kept == pytest.approx({name: theirs[name] for name in kept}, rel=2e-4)
    np.testing.assert_allclose(two.volume, one.volume, atol=2e-3 * np.abs(one.volume).max())
    assert two.poses["particle_id"].tolist() == list(range(3072))


@pytest.mark.usefixtures("ray_session")
def test_ray_data_streams_the_same(many: ParticleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "BYTES_A_TASK", 1)
    plans: list[int] = []
    plan_reading = ingest.plan_reading

    def counted(particles: ParticleSet, groups: list, *rest: object) -> object:
        plans.append(len(groups))
        return plan_reading(particles, groups, *rest)

    monkeypatch.setattr(ingest, "plan_reading", counted)
    half = open_particles(many.path, 1)
    groups = many.row_groups()[::-1]
    here = read_here(half, groups, 12)
    there = streamed_stack(half, groups, 12, 20 * GROUP, parts_by_ray_data(1))
    assert isinstance(there.images, StreamedImages)
    buffer = there.images.buffer(12)
    buffer.keep([7, 2, 9, 4, 0], [])
    assert plans == [5]
    rows = torch.isin(there.images.part_of(torch.arange(len(here))), torch.tensor(sorted(buffer.held))).nonzero()[:, 0]
    assert torch.equal(buffer.take(rows), here.images[rows])
    # a few are not worth a plan
    assert torch.equal(there.images[rows[:200]], here.images[rows[:200]]) and plans == [5]


# ---- what does not fit


@pytest.mark.parametrize(("workers", "needed"), [(0, "0.0020"), (2, "0.0010")])
def test_a_bound_too_small_to_stream_is_refused(many: ParticleSet, tmp_path: Path, workers: int, needed: str) -> None:
    paths = f"data.path={many.path}", f"runs={tmp_path}"
    with pytest.raises(ConfigError) as error:
        run(load_config(*paths, *QUICK, "train.lanes=4", f"resources.workers={workers}", "data.memory_gib=0.0003"))
    lanes = 4 // max(1, workers)
    assert str(error.value) == (
        f"data.memory_gib: 0.0003 GiB do not hold two row groups (256 images of 16 px) for each of a worker's {lanes} "
        f"lanes; give it at least {needed}"
    )
    assert not (tmp_path / "run").exists()
    # what fits need not be streamed
    memory.check_bound(load_config(*paths, *QUICK, "train.lanes=16", gib(100)), many, many.row_groups())


def test_images_that_memory_clearly_does_not_hold_are_refused_before_they_are_read(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("aceray.distributed.share.read_here", refused)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    config = configure("refine={}", "data.box=12")
    with pytest.raises(ConfigError) as error:
        run(config)
    assert str(error.value) == (
        "data.memory_gib: null holds all images in memory, 0.0 GiB for 1024 particles of 16 px, and 0.0 GiB are "
        "available; set data.memory_gib=0.1 to stream them, or use a smaller box (data.box, refine.box) or more workers"
    )
    particles = open_particles(config.data.path)
    need = [memory.bytes_in_memory(1024, box) for box in (12, 16)]
    assert need[1] > 1024 * (4 * 16**2 + 8 * 3.14 / 8 * 14**2)
    monkeypatch.setattr(memory, "available_bytes", lambda: sum(need))
    assert memory.fits(config, particles, particles.row_groups(), 12, "cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda: sum(need) - 1)
    with pytest.raises(ConfigError):
        memory.fits(config, particles, particles.row_groups(), 12, "cpu")
    assert memory.fits(config, particles, particles.row_groups(), 16, "cpu")


def test_an_evaluation_that_does_not_fit_streams_by_itself(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process evaluates what many workers trained."""
    result = run(configure())
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    again = evaluate_run(result.folder)
    assert again.metrics["select/d4_consistency"] == result.metrics["select/d4_consistency"]


def test_the_tightest_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = tmp_path / own.removeprefix("0::").strip("/")
    group.mkdir(parents=True, exist_ok=True)
    for name, value in (("max", "9000"), ("current", "5000"), ("stat", "anon 4\ninactive_file 1000\n")):
        (group / f"memory.{name}").write_text(value)
    assert memory.available_bytes() == 5000
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 2**20


def test_a_gpu_too_small_for_the_coefficients_takes_them_from_the_main_memory(
    configure: Configure, particle_set: ParticleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = particle_set.row_groups()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**7))
    assert not memory.fits(configure(gib(100)), particle_set, groups, BOX, "cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**7, 10**7))
    assert memory.fits(configure(gib(100)), particle_set, groups, BOX, "cuda:0")


def test_a_trial_with_a_bound_reads_for_itself(configure: Configure) -> None:
    def refused(config: Config) -> tuple[ParticleSet, ParticleStack]:
        raise AssertionError("the shared particles were asked for")

    steps: Generator[Progress, None, RunResult] = run_steps(configure("train.steps=3", gib(2)), read_stack=refused)
    assert exhaust(steps, None).metrics["train/steps"] == 3


def test_a_shard_that_is_damaged_on_the_way_ends_the_run(many: ParticleSet, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(many.path, tmp_path / "copy")
    file = tmp_path / "copy" / many.manifest.shards[3].file

    def damage(event: Progress) -> None:
        if event.step == 1:
            content = bytearray(file.read_bytes())
            content[len(content) // 3] ^= 1
            file.write_bytes(content)

    paths = f"data.path={tmp_path / 'copy'}", f"runs={tmp_path}"
    with pytest.raises(DataError, match=r"particles-00003\.parquet: the shard is damaged"):
        run(load_config(*paths, *QUICK, "train.batch=256", gib(4)), on_progress=damage)


# ---- peak memory

CHILD = """
import sys
from aceray.build import build_trainer
from aceray.data.particles import open_particles
from aceray.distributed.share import Place, load
from aceray.presets import load_config

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

config = load_config(*sys.argv[1:])
particles = open_particles(config.data.path)
small = particles.row_groups()[:4]
for groups in (small, particles.row_groups()):
    before = peak()
    stack = load(config, particles, groups, particles.manifest.box, Place())
    trainer = build_trainer(config, particles, stack)
    for _ in trainer.run():
        pass
    trainer.predict()
    del stack, trainer
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """4,096 images of 64 px: 67 MB, and 51 MB of coefficients."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SHARDS", 8), ("BOX", 64)):
            patch.setattr(blobs, name, value)
        yield write_particles(tmp_path_factory.mktemp("large") / "blobs").path


def growth(path: Path, *overrides: str) -> int:
    """By how much the peak of a process grows, in bytes, when it trains on all of the particles after a few."""
    few = [word for word in QUICK if not word.startswith("train.steps")]
    settings = [f"data.path={path}", *few, "train.steps=60", "data.box=null", "train.batch=256", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *settings],
        cwd=ROOT,
        # what is freed goes back to the system at once
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
def test_the_peak_of_memory_is_bounded(large: Path) -> None:
    """What 1,024 images at work take was reached before, with the first of them: only the bound comes on top."""
    bound = 8 * 256 * 64**2 * 4
    inside, streamed = growth(large), growth(large, f"data.memory_gib={bound / 2**30}")
    assert inside > 60e6
    assert streamed < bound
