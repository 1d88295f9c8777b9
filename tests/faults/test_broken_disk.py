"""Writes that fail with an input/output error on the way: one line, no half file, what was there as it was.

Slow: each case is a command of its own, under a library that makes its writes fail. Needs a C compiler.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aceray import api
from aceray.folder import RunFolder
from aceray.presets import load_config
from tests.distributed.conftest import QUICK
from tests.faults.test_outputs import SIMULATED, contents, data, finished, star

__all__ = ["data", "finished", "star"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc: not installed"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("library") / "broken_disk.so"
    source = Path(__file__).parent / "broken_disk.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"], check=True)
    return made


def refused(library: Path, name: str, after_bytes: int, *words: str) -> None:
    """The command ends with one line when the disk breaks below paths with `name` after so many bytes."""
    broken = {"LD_PRELOAD": str(library), "BROKEN_NAME": name, "BROKEN_BYTES": str(after_bytes)}
    command = [str(Path(sys.executable).with_name("aceray")), *words]
    done = subprocess.run(command, env=os.environ | broken, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, (words, done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Input/output error" in line and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("after_bytes", [0, 3_000, 100_000])
def test_conversion_and_simulation(library: Path, star: Path, tmp_path: Path, after_bytes: int) -> None:
    made = tmp_path / "victim"
    refused(library, "victim", after_bytes, "prepare", str(star), "--out", str(made))
    assert not made.exists()
    api.prepare(star, made)  # goes on
    whole = contents(made)
    refused(library, "victim", after_bytes, "prepare", str(star), "--out", str(made), "--existing", "overwrite")
    assert contents(made) == whole
    refused(library, "second", after_bytes, "simulate", *SIMULATED, f"data.path={tmp_path / 'second'}")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("after_bytes", [0, 3_000])
def test_export_and_prediction(library: Path, finished: Path, data: Path, tmp_path: Path, after_bytes: int) -> None:
    out = tmp_path / "victim"
    api.export(finished, out)
    before = contents(out)
    refused(library, "victim", after_bytes, "export", str(finished), "--out", str(out))
    now = contents(out)  # poses.star has the time of its writing
    assert now.keys() == before.keys() and all(len(now[name]) == len(before[name]) for name in now)
    refused(
        library, "predicted", after_bytes, "predict", str(finished), str(data), "--out", str(tmp_path / "predicted")
    )
    assert not [name for name in contents(tmp_path) if name.endswith((".partial", ".lock"))]


def test_a_checkpoint_that_cannot_be_written(library: Path, data: Path, tmp_path: Path) -> None:
    settings = [*QUICK, f"data.path={data}", f"runs={tmp_path / 'runs'}", "name=x", "train.checkpoint_every=10"]
    config = load_config(*settings)
    undisturbed = api.train(load_config(*settings, "name=y"))
    size = RunFolder(undisturbed.folder).checkpoint_file(40).stat().st_size
    refused(library, "step-", 2 * size + size // 2, "train", *settings)  # in the third of four
    folder = RunFolder(tmp_path / "runs" / "x")
    assert folder.checkpoint_steps()[-1] == 20
    assert sorted(path.suffix for path in folder.checkpoints.iterdir()) == [".safetensors"] * 2
    again = api.train(config, existing="resume")
    assert contents(again.folder / "checkpoints").keys() == contents(undisturbed.folder / "checkpoints").keys()
    last = folder.read_checkpoint(40)[0]
    for name, tensor in RunFolder(undisturbed.folder).read_checkpoint(40)[0].items():
        assert tensor.equal(last[name]), name
