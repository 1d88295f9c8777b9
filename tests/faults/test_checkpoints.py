"""Kills while a checkpoint is written, at any byte; two writers; a full, shrunken or read-only disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest
import torch

from aceray import api
from aceray.config import Config
from aceray.data.particles import open_particles
from aceray.data.storage import append_line, exclusive
from aceray.distributed.run import evaluate_run, run
from aceray.errors import DataError
from aceray.folder import RunFolder, create_run_folder
from aceray.presets import load_config
from aceray.train.loop import Progress
from tests.data.inputs import some_images, write_stack, write_star
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

ROOT = Path(__file__).parent.parent.parent
KILLS = 50
STEP = "aceray.display:RunDisplay.trained"
Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_particles(tmp_path_factory.mktemp("data") / "blobs").path


@pytest.fixture
def configure(tmp_path: Path, particles: Path) -> Configure:
    return lambda *overrides: load_config(f"data.path={particles}", f"runs={tmp_path / 'runs'}", *QUICK, *overrides)


# ---- kills


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(5000.0) * step, "bias": torch.ones(7) * step}


def killed_at(folder: RunFolder, step: int, place: int | str) -> None:
    """In a child process: die of SIGKILL after so many bytes of the checkpoint, or in place of a system call."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self: Path, content: bytes) -> int:
        with open(self, "wb", buffering=0) as file:
            file.write(content[:place] if isinstance(place, int) else content)
        if isinstance(place, int):
            die()
        return len(content)

    try:
        Path.write_bytes = write  # type: ignore[assignment, method-assign]
        if isinstance(place, str):
            setattr(Path if place == "unlink" else os, place, die)
        folder.write_checkpoint(tensors_of(step), {"step": step}, keep=2)
    finally:
        os._exit(0)


def test_a_kill_at_any_byte_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    config = load_config(f"runs={tmp_path}", "name=killed")
    folder = create_run_folder(config)
    size = folder.write_checkpoint(tensors_of(1), {"step": 1}, keep=2).stat().st_size
    folder.write_checkpoint(tensors_of(2), {"step": 2}, keep=2)
    chosen = random.Random(7)
    places: list[int | str] = [0, 1, size - 1, size, "fsync", "replace", "unlink"]
    places += [chosen.randrange(size) for _ in range(KILLS - len(places))]
    for place in places:
        killed_at(folder, 3, place)
        newest = 3 if place == "unlink" else 2  # its name was given before the old one is deleted
        assert folder.checkpoint_steps()[-1] == newest
        assert folder.set_aside_damaged() == []
        tensors, metadata = folder.read_checkpoint(newest)
        assert metadata == {"step": newest} and tensors["weight"].equal(tensors_of(newest)["weight"])
        create_run_folder(config, "resume")
        assert not list(folder.path.rglob("*.partial"))
        folder.checkpoint_file(3).unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "settings",
    [("train.steps=60", "train.checkpoint_every=2"), ("train.steps=6", "refine={}", "refine.search_rounds=3")],
    ids=["steps", "rounds"],
)
def test_a_run_killed_again_and_again_ends_with_the_same_parameters(
    configure: Configure, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """kill -9 of the driver, five times at random; the last attempt runs to its end."""
    steady = run(configure("name=steady", *settings))
    overrides = [*QUICK, *settings, "name=shaken", f"data.path={configure().data.path}", f"runs={tmp_path / 'runs'}"]
    chosen = random.Random(3)
    kills = 0
    for attempt in range(6):
        command = [sys.executable, "-m", "tests.faults.driver", STEP, "train", "--existing", "resume", *overrides]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        first = child.stdout.readline()  # a step was made
        if attempt < 5 and first:
            time.sleep(chosen.random() * 2)
            child.kill()
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
        if child.returncode == 0:
            break
    assert kills > 0
    mine, theirs = RunFolder(steady.folder), RunFolder(tmp_path / "runs" / "shaken")
    last = mine.checkpoint_steps()[-1]
    expected, got = mine.read_checkpoint(last)[0], theirs.read_checkpoint(last)[0]
    assert expected.keys() == got.keys() and all(got[name].equal(expected[name]) for name in expected)
    assert [row["step"] for row in theirs.read_history()] == [row["step"] for row in mine.read_history()]


def test_a_kill_between_a_checkpoint_and_its_row_leaves_no_row_out(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steady = run(configure("name=steady", "train.steps=8", "train.checkpoint_every=2"))
    config = configure("name=shaken", "train.steps=8", "train.checkpoint_every=2")

    def killed(path: Path, file: FileIO, line: str) -> None:
        if json.loads(line)["step"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        append_line(path, file, line)

    child = os.fork()
    if not child:
        monkeypatch.setattr("aceray.distributed.run.append_line", killed)
        run(config)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    folder = RunFolder(tmp_path / "runs" / "shaken")
    assert folder.checkpoint_steps() == [4, 6] and folder.read_history()[-1]["step"] == 5
    again = run(config, existing="resume")
    assert "before step 6 was written to history.jsonl; it goes on from step 4" in caplog.text
    assert [row["step"] for row in folder.read_history()] == list(range(1, 9))
    assert again.metrics["train/loss_total"] == steady.metrics["train/loss_total"]
    # of a history that ends before all checkpoints nothing can be saved: they stay
    folder.cut_history(1)
    assert folder.drop_unrecorded() == [] and folder.checkpoint_steps() == [6, 8]


# ---- two writers


def test_the_second_writer_is_refused_and_changes_nothing(configure: Configure) -> None:
    config = configure("train.steps=4", "train.checkpoint_every=2")
    seen: list[str] = []

    def meddle(event: Progress) -> None:
        if event.step == 3:
            for attempt in (
                lambda: run(config, "resume"),
                lambda: run(config, "overwrite"),
                lambda: evaluate_run(Path(config.runs) / config.name),
            ):
                with pytest.raises(DataError, match=rf"process {os.getpid()} on .* writes here") as error:
                    attempt()
                seen.append(str(error.value))

    result = run(config, on_progress=meddle)
    assert len(seen) == 3 and result.metrics["train/steps"] == 4
    run(config, "overwrite")
    assert not list(Path(config.runs).glob(".*"))


def test_a_killed_writer_lets_go(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        with exclusive(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with exclusive(tmp_path / "run"), pytest.raises(DataError, match="writes here"), exclusive(tmp_path / "run"):
        pass


# ---- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here (not root?)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def assert_whole(folder: RunFolder) -> None:
    """Nothing half-written under a final name."""
    assert not list(folder.path.rglob("*.partial"))
    for step in folder.checkpoint_steps():
        folder.read_checkpoint(step)
    lines = folder.history.read_text().splitlines() if folder.history.exists() else []
    assert len(folder.read_history()) == len(lines)


def fill(disk: Path, leave_bytes: int) -> Path:
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(max(0, free - leave_bytes)))
    return ballast


@pytest.mark.parametrize("leave_bytes", [0, 20_000, 60_000, 150_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    configure: Configure, disk: Path, leave_bytes: int
) -> None:
    """Whatever is written when there is no room left: the settings, the history, a checkpoint, the results."""
    config = configure(f"runs={disk}", "train.steps=12", "train.checkpoint_every=3", "encoder.width=16")
    ballast = fill(disk, leave_bytes)
    with pytest.raises(DataError, match=r"No space left on device\); free some space"):
        run(config)
    folder = RunFolder(disk / "run")
    assert_whole(folder)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert run(config, "resume" if folder.path.exists() else "error").metrics["train/steps"] == 12
    assert_whole(folder)


def test_a_disk_that_fills_up_in_a_checkpoint_keeps_the_one_before(configure: Configure, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    config = configure(f"runs={disk}", "train.steps=12", "train.checkpoint_every=3")

    def fill_up(event: Progress) -> None:
        if event.step == 4:
            fill(disk, 8192)

    with pytest.raises(DataError, match=r"step-000006\.safetensors: cannot write it \(No space left on device\)"):
        run(config, on_progress=fill_up)
    folder = RunFolder(disk / "run")
    assert folder.checkpoint_steps() == [3]
    assert_whole(folder)


def test_a_read_only_disk_is_one_line(configure: Configure, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    config = configure(f"runs={disk}", "train.steps=4", "train.checkpoint_every=2")
    run(config)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for attempt in (lambda: run(config, "resume"), lambda: run(configure(f"runs={disk}", "name=other"))):
        with pytest.raises(DataError, match=r"Read-only file system\); choose a folder on a disk"):
            attempt()
    assert_whole(RunFolder(disk / "run"))


LIMITED = """
import resource, signal, sys
from aceray.api import load_config, train
from aceray.errors import AcerayError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = load_config(*sys.argv[2:])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    train(config, "resume")
except AcerayError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "file"), [(500, "config.yaml"), (20_000, "step-000003.safetensors")])
def test_a_limit_of_the_file_size_is_one_line(configure: Configure, tmp_path: Path, limit: int, file: str) -> None:
    """What needs no root: the system refuses every byte of a file beyond the limit."""
    overrides = [*QUICK, "train.steps=6", "train.checkpoint_every=3", f"runs={tmp_path / 'runs'}"]
    overrides += [f"data.path={configure().data.path}"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *overrides], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert f"{file}: cannot write it (File too large); raise the limit" in done.stdout
    assert_whole(RunFolder(tmp_path / "runs" / "run"))


@pytest.mark.parametrize("leave_bytes", [0, 30_000, 100_000])
def test_a_conversion_on_a_full_disk_is_one_line_and_goes_on(disk: Path, tmp_path: Path, leave_bytes: int) -> None:
    write_stack(tmp_path / "in" / "a.mrcs", some_images(600), 4.0)
    star = write_star(tmp_path / "in" / "p.star", [f"{number + 1}@a.mrcs" for number in range(600)])
    ballast = fill(disk, leave_bytes)
    with pytest.raises(DataError, match=r"No space left on device"):
        api.prepare(star, disk / "set")
    assert not (disk / "set" / "manifest.json").exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    api.prepare(star, disk / "set")
    particles = open_particles(disk / "set")
    assert len(particles.read(particles.row_groups(), ["particle_id"])) == 600


# mrcfile lets go of a file that it cannot close without closing it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_export_to_a_full_disk_is_one_line(configure: Configure, disk: Path) -> None:
    folder = run(configure("train.steps=2")).folder
    ballast = fill(disk, 20_000)
    with pytest.raises(DataError, match=r"No space left on device"):
        api.export(folder, disk / "out")
    assert not list((disk / "out").rglob("volume.mrc"))
    ballast.unlink()
    assert all(path.exists() for path in api.export(folder, disk / "again").paths.values())
