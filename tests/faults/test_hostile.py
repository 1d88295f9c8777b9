"""Files made to do harm: a few bytes that ask for gigabytes, for code, for other files; and files of other times."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from aceray.data.cryosparc import read_record_array
from aceray.data.manifest import Manifest
from aceray.data.mrc import read_volume, write_volume
from aceray.data.particle_table import Findings
from aceray.data.pose_files import unpickle_arrays
from aceray.data.source import SourceFiles, open_source, subset_rows
from aceray.data.stacks import open_stack
from aceray.errors import AcerayError, ConfigError, DataError
from aceray.folder import RunFolder
from aceray.presets import load_config
from aceray.study import load_study
from tests.data.inputs import cs_columns, some_images, write_cs, write_stack

ROOT = Path(__file__).parent.parent.parent
MOST_BYTES = 8 * 2**20


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak / 2**20:.0f} MiB"


def with_numbers(path: Path, numbers: dict[int, int], byte_order: str = "<") -> Path:
    """Replace 32-bit words of the header, counted from 0."""
    content = bytearray(path.read_bytes())
    for word, number in numbers.items():
        struct.pack_into(f"{byte_order}i", content, 4 * word, number)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({0: 30000, 1: 30000, 2: 30000}, "its header claims 108,000,000,001,024 bytes, it has 1,888"),
        ({0: 2**31 - 1, 1: 2**31 - 1, 2: 2**31 - 1}, "its header claims"),
        ({23: 2**31 - 1}, "its header claims 2,147,485,535 bytes"),
        ({23: -1024}, "its header has negative lengths"),
        ({0: -6, 1: -6}, "its header has negative lengths"),
        ({3: 77}, "mode"),
    ],
)
def test_a_volume_that_claims_what_it_has_not(tmp_path: Path, numbers: dict[int, int], message: str) -> None:
    write_volume(tmp_path / "map.mrc", torch.ones(6, 6, 6), 2.0)
    with pytest.raises(DataError, match=message):
        read_volume(with_numbers(tmp_path / "map.mrc", numbers))


def test_a_packed_volume_that_claims_what_it_has_not(tmp_path: Path) -> None:
    import bz2
    import gzip

    write_volume(tmp_path / "map.mrc", torch.ones(6, 6, 6), 2.0)
    content = with_numbers(tmp_path / "map.mrc", {0: 4000, 1: 4000, 2: 4000}).read_bytes()
    for name, pack in (("a.mrc", gzip.compress), ("b.mrc", bz2.compress)):
        (tmp_path / name).write_bytes(pack(content))
        with pytest.raises(DataError, match="it has 1,888"):
            read_volume(tmp_path / name)
        (tmp_path / name).write_bytes(pack(content)[:-20])
        with pytest.raises(DataError, match="readable MRC file"):
            read_volume(tmp_path / name)


def test_a_stack_that_claims_what_it_has_not_has_the_images_that_are_there(tmp_path: Path) -> None:
    path = with_numbers(write_stack(tmp_path / "a.mrcs", some_images(3, 16), 2.0), {2: 2**31 - 1})
    stack = open_stack(path)
    assert (stack.images, stack.complete) == (2**31 - 1, 3)
    assert open_stack(with_numbers(path, {23: 2**31 - 1})).complete == 0
    assert open_stack(with_numbers(path, {23: 0, 0: 46000, 1: 46000})).complete == 0


def npy(shape: str, kind: str = "[('uid', '<u8')]", length: int | None = None, data: bytes = b"12345678") -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 13) % 64) + b"\n"
    return b"\x93NUMPY\x02\x00" + (length or len(header)).to_bytes(4, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        npy("(4000000000,)"),
        npy("(2,)"),
        npy("(-1,)"),
        npy("(1,)", length=2**32 - 1),
        npy("(1,)", kind="[('uid', 'V2000000000')]"),
        npy("(1,)", kind="'|O'"),
        npy("(" * 5000),
        npy("(1,)", kind="__import__('os').system('true')"),
        npy("(1,)\x00"),
        b"PK\x03\x04" + bytes(50),
        b"\x93NUMPY",
        b"",
    ],
)
def test_arrays_that_are_not_what_they_claim(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.cs").write_bytes(content)
    with pytest.raises(DataError, match="no cryoSPARC particle file"):
        read_record_array(tmp_path / "a.cs")
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match="holds no row numbers"):
        subset_rows(str(tmp_path / "a.npy"), 10, 0)


def test_the_array_of_that_test_is_read_when_it_is_right(tmp_path: Path) -> None:
    (tmp_path / "a.cs").write_bytes(npy("(1,)"))
    assert read_record_array(tmp_path / "a.cs")["uid"][0] == int.from_bytes(b"12345678", "little")
    assert len(read_record_array(write_cs(tmp_path / "b.cs", cs_columns(3)))) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr" + (2**27).to_bytes(4, "little") + b".",  # remembers None as number 134,217,728
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",  # a terabyte of bytes
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(" * 100_000,
        b"\x80\x04]" + b"]" * 50_000 + b"." * 3,
    ],
)
def test_pickles_that_ask_for_more(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.pkl: "):
        unpickle_arrays(tmp_path / "a.pkl")


def bomb() -> str:
    """Ten lines that are 3,486,784,401 values when they are written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb() + "\ntracking: {uri: *a9}\n", "more than 100,000 values"),
        ("tracking: &a {uri: *a}\n", "more than 100,000 values"),
        ("tracking:\n  uri: " + "[" * 5000, "nested too deeply|not valid YAML"),
        ("seed: " + "9" * 50_000, "not valid YAML|seed"),
        ("include: 5\n", "no such preset"),
        ("include: {a: b}\n", "no such preset"),
        ("name: !!python/object/apply:os.system ['touch made']\n", "not valid YAML"),
        ("name: !!python/name:os.system\n", "not valid YAML"),
        ("? [a, b]\n: c\n", "preset is lines|not valid YAML"),
    ],
)
def test_yaml_that_asks_for_more(tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(tmp_path / "a.yaml"))
    assert len(str(error.value)) < 2000
    with pytest.raises(ConfigError):
        load_study(str(tmp_path / "a.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_manifests_and_checkpoints_of_another_time_or_place(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "aceray-particles", "version": 7}))
    with pytest.raises(DataError, match=r"is of version 7, this aceray reads version 1: upgrade aceray"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        Manifest.read(tmp_path)
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    folder.checkpoint_file(3).write_bytes(save({"w": torch.ones(2)}, {"format": "pt"}))
    with pytest.raises(DataError, match="not a checkpoint of aceray"):
        folder.read_checkpoint(3)
    folder.checkpoint_file(3).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        folder.read_checkpoint(3)
    folder.checkpoint_file(3).write_bytes(save({"w": torch.ones(2)}, {"aceray": "[" * 100_000, "sha256": ""}))
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        folder.read_checkpoint(3)
    folder.write_checkpoint({"w": torch.ones(2)}, {"step": 3}, keep=1)
    assert folder.read_checkpoint(3)[1] == {"step": 3}


def test_names_that_lead_out_are_not_followed_by_any_reader(tmp_path: Path) -> None:
    """A manifest, a state of tracking and a stack's name may come from anywhere."""
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", "/etc/passwd", "a/../../secret", ".hidden", "a\x00b", "a/b"):
        shard = {"file": name, "bytes": 1, "sha256": "0" * 64, "particles": 1, "row_groups": 1}
        values = {"format": "aceray-particles", "version": 1, "shards": [shard]}
        (tmp_path / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match="is not a plain name in the dataset's folder"):
            Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["9" * 5000, "a\x00b.mrcs", "~nobody/a.mrcs", "/" * 300 + "a", "\u2028", "a" * 300 + ".mrcs"]
)
def test_names_that_no_file_can_have_are_missing_stacks(tmp_path: Path, name: str) -> None:
    findings = Findings()
    (tmp_path / "a.txt").write_text(f"b.mrcs\n{name}\n")
    open_source(SourceFiles(tmp_path / "a.txt"), findings)
    assert findings.errors and all("is not there" in error for error in findings.errors)


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    """The whole program, with little memory, on files that claim a hundred terabytes."""
    write_volume(tmp_path / "map.mrc", torch.ones(6, 6, 6), 2.0)
    with_numbers(tmp_path / "map.mrc", {0: 30000, 1: 30000, 2: 30000})
    np.save(tmp_path / "poses.cs", np.zeros(3), allow_pickle=False)
    code = (
        "import aceray.api as a, sys\n"
        "from aceray.errors import AcerayError\n"
        "for path in sys.argv[1:]:\n"
        "    try: a.check(path)\n"
        "    except AcerayError as error: print(error)\n"
    )
    (tmp_path / "map.mrc").rename(tmp_path / "map.mrcs")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "map.mrcs"), str(tmp_path / "poses.cs.npy")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert issubclass(DataError, AcerayError) and "Traceback" not in done.stderr
