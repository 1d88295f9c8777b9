"""Damaged and hostile files of every kind a user can be given: an AcerayError or a result, never anything else.

Each reader gets files that were valid and then changed. `make test` tries EXAMPLES of them, always the same; the slow
test MANY others (5,000, or as many as ACERAY_FUZZ says), and watches the memory of the process.
"""

import gc
import json
import os
import pickle
import time
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from aceray.data.cryosparc import particles_from_cs, read_record_array
from aceray.data.manifest import Manifest
from aceray.data.mrc import read_volume, write_volume
from aceray.data.particle_table import Findings
from aceray.data.pose_files import read_star, unpickle_arrays
from aceray.data.source import SourceFiles, open_source
from aceray.data.stacks import open_stack, read_images
from aceray.errors import AcerayError
from aceray.folder import RunFolder
from aceray.presets import load_config, to_yaml
from aceray.study import load_study
from aceray.tracking.journal import JOURNAL, STATE, Journal
from aceray.tracking.run import JournalTracker
from tests.data.inputs import cs_columns, some_images, write_cs, write_stack, write_star

EXAMPLES, MANY = 40, int(os.environ.get("ACERAY_FUZZ", "5000"))
# of one small file; of a thousand of them, when the readers have imported what they need
MOST_BYTES, MOST_GROWTH = 48 * 2**20, 16 * 2**20
# of this process alone: a crowded machine makes none of them slow; one that waits forever meets pytest's own limit
CPU_SECONDS = 10.0
EXTREMES = (0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**40, 2**62, 1024)
# what text files are broken with: other types, other files, code, bombs, control characters
NASTY = (
    b"nan", b"-inf", b"1e999", b"99999999999999999999999", b"''", b'"', b"[]", b"{}", b"null", b"true", b"0@a.mrcs",
    b"7@../../x.mrcs", b"1@/etc/passwd", b"data_", b"loop_", b"_rlnImageName #1", b"_rlnImageName #1\n_rlnImageName #2",
    b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"*a", b"<<: *a", b"[" * 3000, b"{a: " * 500, b"\x00",
    b"\xff\xfe", b"\r", b"\t", b": ", b"- ", b"#", b"9" * 5000, b"0x7fffffffffffffffff", b"${HOME}", b"\xe2\x80\xa8",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A kind of file: one that is valid, and everything that reads it."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]


def make_checkpoint(path: Path) -> None:
    folder = RunFolder(path.parent / "run")
    made = folder.write_checkpoint({"weight": torch.arange(6.0), "step": torch.tensor(3)}, {"step": 3}, keep=1)
    path.write_bytes(made.read_bytes())


def read_checkpoint(path: Path) -> object:
    folder = RunFolder(path.parent / "run")
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    folder.checkpoint_file(3).write_bytes(path.read_bytes())
    return folder.read_checkpoint(3)


def make_manifest(path: Path) -> None:
    shard = {"file": "a.parquet", "bytes": 9, "sha256": "0" * 64, "particles": 4, "row_groups": 1}
    values = {"format": "aceray-particles", "version": 1, "particles": 4, "box": 16, "pixel_size_angstrom": 2.0}
    values |= {"noise_std": 1.0, "ctf": True, "image_dtype": "float16", "shards": [shard], "source": {"kind": "x"}}
    path.write_text(json.dumps(values | {"truth_volume": {"file": "t.mrc", "bytes": 9, "sha256": "1" * 64}}))


def read_manifest(path: Path) -> object:
    (path.parent / "manifest.json").write_bytes(path.read_bytes())
    return Manifest.read(path.parent)


def make_journal(path: Path) -> None:
    journal = Journal(path.parent)
    tracker = JournalTracker(journal)
    tracker.begin("a", {"b": 1}, {"c": "d"})
    for step in range(1, 5):
        tracker.log(step, {"train/loss_total": 0.5})
    tracker.end("FINISHED")
    journal.close()
    (path.parent / JOURNAL).rename(path)


def read_journal(path: Path) -> object:
    (path.parent / STATE).unlink(missing_ok=True)
    (path.parent / JOURNAL).write_bytes(path.read_bytes())
    journal = Journal(path.parent)
    try:
        JournalTracker(journal).log(9, {"train/loss_total": 0.5})
        return journal.backlog, list(journal.read(0))
    finally:
        journal.close()


def read_state(path: Path) -> object:
    (path.parent / JOURNAL).write_text("")
    (path.parent / STATE).write_bytes(path.read_bytes())
    journal = Journal(path.parent)
    journal.close()
    return journal.backlog


def read_stack(path: Path) -> object:
    stack = open_stack(path)
    return stack if stack.compression else read_images(stack, np.arange(min(3, stack.complete)))


def read_source(path: Path) -> object:
    return open_source(SourceFiles(path), Findings())


def read_cs(path: Path) -> object:
    return particles_from_cs(path, read_record_array(path), Findings())


def read_poses(path: Path) -> object:
    return read_star(path, ["rot_deg", "defocus_u_angstrom", "origin_x_angstrom", "voltage_kv"])


def write_text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


ANGLES = {name: [1.0, 2.0, 3.0] for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst")}
NAMES = ["1@a.mrcs", "2@a.mrcs", "1@b.mrcs"]
STATE_TEXT = '{"store": {"uri": "x", "experiment": "y"}, "offset": 3, "runs": {"": "abc"}, "refused": [1]}'
STUDY = (
    "name: s\nbase: [demo]\nspace:\n  pip.weight: [0.0, 2.0]\nobjective:\n  - metric: pose/coverage\n    mode: max\n"
)
FORMATS = [
    Format("volume.mrc", lambda path: write_volume(path, torch.randn(6, 6, 6), 2.0), read_volume),
    Format("stack.mrcs", lambda path: write_stack(path, some_images(3, 8), 2.0) and None, read_stack),
    Format("particles.star", lambda path: write_star(path, NAMES, **ANGLES) and None, read_source),
    Format("old.star", lambda path: write_star(path, NAMES, optics=False, **ANGLES) and None, read_source),
    Format("poses.star", lambda path: write_star(path, NAMES, **ANGLES) and None, read_poses),
    Format("particles.cs", lambda path: write_cs(path, cs_columns(4)) and None, read_cs),
    Format("list.txt", write_text("a.mrcs\nb.mrcs\n"), read_source),
    Format("poses.pkl", lambda path: path.write_bytes(pickle.dumps((np.eye(3)[None], np.zeros((1, 2))))) and None,
           unpickle_arrays),
    Format("config.yaml", lambda path: path.write_text(to_yaml(load_config("demo"))) and None,
           lambda path: load_config(str(path))),
    Format("study.yaml", write_text(STUDY), lambda path: load_study(str(path))),
    Format("data.json", make_manifest, read_manifest),
    Format("step.safetensors", make_checkpoint, read_checkpoint),
    Format("journal.jsonl", make_journal, read_journal),
    Format("state.json", write_text(STATE_TEXT), read_state),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "bytes", "number", "delete", "repeat", "insert", "nasty", "word"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
        st.sampled_from(EXTREMES),
        st.sampled_from(NASTY),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, edits: list[tuple[str, float, bytes, int, bytes]]) -> bytes:
    """The content after every edit, each at a fraction of its length; headers, at the start, are hit more often."""
    for kind, fraction, some, extreme, nasty in edits:
        at = int(fraction**2 * len(content))
        match kind:
            case "cut":
                content = content[:at]
            case "bytes":
                content = content[:at] + some + content[at + len(some) :]
            case "number":
                at, width = at // 4 * 4, 4 if abs(extreme) < 2**32 else 8
                content = content[:at] + (extreme % 2 ** (8 * width)).to_bytes(width, "little") + content[at + width :]
            case "delete":
                content = content[:at] + content[at + 16 :]
            case "repeat":
                content = content[:at] + content[at : at + 200] * 5 + content[at:]
            case "insert":
                content = content[:at] + some + content[at:]
            case "nasty":
                content = content[:at] + nasty + content[at:]
            case "word":
                words = content.split(b" ")
                words[int(fraction * (len(words) - 1))] = nasty
                content = b" ".join(words)
    return content


def survives(form: Format, folder: Path, content: bytes) -> None:
    """Read it; only an AcerayError of one line may be raised, and little memory taken on the way."""
    path = folder / form.name
    path.write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form.read(path)
    except AcerayError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
    except TypeCheckError as error:  # a shape that a function promised and did not keep
        raise AssertionError(error) from error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.process_time() - began < CPU_SECONDS
    assert peak < MOST_BYTES, f"{peak / 2**20:.0f} MiB for a file of {len(content)} bytes"


@pytest.fixture(params=FORMATS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Format:
    form: Format = request.param
    write_stack(tmp_path / "a.mrcs", some_images(3, 8), 2.0)
    write_stack(tmp_path / "b.mrcs", some_images(3, 8), 2.0)
    form.make(tmp_path / form.name)
    form.read(tmp_path / form.name)  # as it is, it can be read
    return form


def test_a_message_is_never_longer_than_a_page(tmp_path: Path) -> None:
    """Whatever a cell holds: here a number of 20,000 characters."""
    star = write_star(tmp_path / "p.star", NAMES, **{**ANGLES, "rlnAngleRot": ["1" + "[" * 20_000, 2.0, 3.0]})
    with pytest.raises(AcerayError, match="correct the file") as error:
        read_poses(star)
    assert len(str(error.value)) < 2000


def test_a_column_that_is_there_twice_is_one_line(tmp_path: Path) -> None:
    star = write_star(tmp_path / "p.star", NAMES, optics=False, **ANGLES)
    text = star.read_text().replace("_rlnAngleRot", "_rlnImageName")
    star.write_text(text)
    with pytest.raises(AcerayError, match="has the column rlnImageName twice"):
        read_source(star)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def test_changed_files_do_no_harm(form: Format, tmp_path: Path) -> None:
    whole = (tmp_path / form.name).read_bytes()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
    @given(edits=EDITS)
    def check(edits: list) -> None:
        survives(form, tmp_path, changed(whole, edits))

    check()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_changed_files_do_no_harm(form: Format, tmp_path: Path) -> None:
    whole = (tmp_path / form.name).read_bytes()
    tried: list[bytes] = []

    @settings(max_examples=MANY, deadline=None, database=None, suppress_health_check=QUIET)
    @given(edits=EDITS)
    def check(edits: list) -> None:
        content = changed(whole, edits)
        survives(form, tmp_path, content)
        tried.append(content)

    check()
    assert growth_bytes(form, tmp_path, tried[:: max(1, len(tried) // 200)]) < MOST_GROWTH


def growth_bytes(form: Format, folder: Path, contents: list[bytes]) -> int:
    """By how much this process grows when it reads the same files five times more; hypothesis keeps what it tried."""
    sizes = []
    for _ in range(6):
        for content in contents:
            (folder / form.name).write_bytes(content)
            with suppress(AcerayError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                form.read(folder / form.name)
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes[-1] - sizes[0]
