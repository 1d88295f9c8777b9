"""Data sets, exports, predictions and the results of a study: two writers, and disks that refuse."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aceray import api
from aceray.distributed import export, study_run
from aceray.distributed.run import run
from aceray.errors import DataError
from aceray.presets import load_config
from aceray.study import load_study
from tests.data.inputs import some_images, write_stack, write_star
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles
from tests.faults.test_checkpoints import disk  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent.parent
SIMULATED = ("data/spliceosome_32_clean", "simulation.particles=600", "seed=1")
STUDY = "name: s\nstudies: {folder}\nbase: {base}\nspace:\n  pip.weight: [0.0]\nobjective: select/d4_consistency\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_particles(tmp_path_factory.mktemp("data") / "blobs").path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return run(load_config(*QUICK, f"data.path={data}", f"runs={folder}", "train.steps=2")).folder


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    write_stack(folder / "a.mrcs", some_images(600), 4.0)
    return write_star(folder / "p.star", [f"{number + 1}@a.mrcs" for number in range(600)])


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- two writers


class Second:
    """Tries the same once while the first is at it, and keeps what it was told."""

    def __init__(self, attempt: Callable[[], object]) -> None:
        self.attempt, self.told = attempt, ""

    def __call__(self, *_: object, **__: object) -> None:
        if not self.told:
            with pytest.raises(DataError) as error:
                self.attempt()
            self.told = str(error.value)


def test_two_simulations(tmp_path: Path) -> None:
    config = load_config(*SIMULATED, f"data.path={tmp_path / 'set'}")
    second = Second(lambda: api.simulate(config, "overwrite"))
    api.simulate(config, "error", second)
    assert re.search(rf"/set: process {os.getpid()} on .* writes here at this moment; nothing was touched", second.told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    api.simulate(config, "overwrite")


def test_two_conversions(tmp_path: Path, star: Path) -> None:
    second = Second(lambda: api.prepare(star, tmp_path / "set", "overwrite"))
    api.prepare(star, tmp_path / "set", "error", second)
    assert "another process is writing this dataset" in second.told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_two_predictions_and_an_export(tmp_path: Path, finished: Path, data: Path) -> None:
    out = tmp_path / "out"
    second = Second(lambda: api.predict(finished, data, out))
    third = Second(lambda: api.export(finished, out))
    api.predict(finished, data, out, lambda progress: (second(), third()))
    assert all(f"process {os.getpid()} on " in told and "writes here" in told for told in (second.told, third.told))
    assert not list(out.glob(".*"))
    api.predict(finished, data, out)


def test_two_exports(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Second(lambda: api.export(finished, tmp_path / "out"))
    write = export._write_poses
    monkeypatch.setattr(export, "_write_poses", lambda *given: (second(), write(*given))[1])
    api.export(finished, tmp_path / "out")
    assert "writes here" in second.told
    assert not list((tmp_path / "out").glob(".*"))


def test_two_comparisons(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a study runs its results may be looked at, by one process at a time."""
    (tmp_path / "s.yaml").write_text(STUDY.format(folder=tmp_path, base=[*QUICK, "train.steps=2", f"data.path={data}"]))
    looked: list[int] = []

    def look(event: object) -> None:
        looked.append(len(api.compare(tmp_path / "s").trials))

    api.tune(load_study(str(tmp_path / "s.yaml")), address="none", on_event=look)
    assert set(looked) <= {0, 1} and looked
    second = Second(lambda: api.compare(tmp_path / "s"))
    write = study_run.write_study_results
    monkeypatch.setattr(study_run, "write_study_results", lambda *given: (second(), write(*given))[1])
    api.compare(tmp_path / "s")
    assert "leaderboard.md: process" in second.told
    assert not (tmp_path / "s" / ".leaderboard.md.lock").exists()


def test_what_a_kill_left_of_an_export_is_taken_away(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".volume.mrc.0123456789ab.partial").write_bytes(b"half")
    (out / ".poses.star.lock").touch()
    api.export(finished, out)
    assert not list(out.glob(".*"))
    (out / ".mine").touch()
    with pytest.raises(DataError, match=r"holds \.mine, which is none of our files"):
        api.export(finished, out)


# ---- disks


def test_a_read_only_disk_is_one_line(disk: Path, finished: Path, star: Path, data: Path) -> None:  # noqa: F811
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    config = load_config(*SIMULATED, f"data.path={disk / 'made'}")
    attempts: list[Callable[[], object]] = [
        lambda: api.simulate(config, "overwrite"),
        lambda: api.prepare(star, disk / "set", "overwrite"),
        lambda: api.export(finished, disk / "exported"),
        lambda: api.predict(finished, data, disk / "predicted"),
    ]
    for attempt in attempts:
        attempt()
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for attempt in attempts:
        with pytest.raises(DataError, match=r"Read-only file system\); choose a folder on a disk") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert contents(disk) == before


LIMITED = """
import resource, signal, sys
from aceray.cli import main
import aceray.distributed.assign, aceray.distributed.export, aceray.distributed.convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("limit", [100, 15_000])
def test_a_limit_of_the_file_size_is_one_line(
    tmp_path: Path, finished: Path, star: Path, data: Path, limit: int
) -> None:
    """What needs no root. What was there stays, whole; what is new has no half under a final name."""
    out = str(tmp_path / "out")
    api.export(finished, out)
    before = contents(tmp_path / "out")
    verbs = [
        ["simulate", *SIMULATED, f"data.path={tmp_path / 'made'}"],
        ["prepare", str(star), "--out", str(tmp_path / "set")],
        ["export", str(finished), "--out", out],
        ["predict", str(finished), str(data), "--out", str(tmp_path / "predicted")],
    ]
    for verb in verbs:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *verb], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2, (verb, done.stderr)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "File too large); raise the limit of the file size" in line, line
        assert "Traceback" not in done.stderr
    assert contents(tmp_path / "out").keys() == before.keys()
    assert not (tmp_path / "made").exists() and not (tmp_path / "set").exists()
    assert not [name for name in contents(tmp_path) if name.endswith((".partial", ".lock"))]
    api.prepare(star, tmp_path / "set")
