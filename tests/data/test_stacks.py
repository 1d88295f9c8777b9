import gzip
import os

import mrcfile
import numpy as np
import pytest

from aceray.data.stacks import StackFinder, open_stack, read_images, unpack
from aceray.errors import DataError
from tests.data.inputs import SIDE, some_images, write_stack


@pytest.mark.parametrize("kind", ["<i1", "<i2", "<f4", "<u2", "<f2", ">i2", ">f4", ">u2", ">f2"])
def test_every_mode_and_byte_order(tmp_path, kind):
    """Modes 0, 1, 2, 6 and 12; mode 0 is signed."""
    images = np.round(some_images(6) * 5 - 60).astype(kind)
    assert images.min() < 0 or "u" in kind
    stack = open_stack(write_stack(tmp_path / "a.mrcs", images, pixel_size=1.5))
    assert (stack.images, stack.complete, stack.box) == (6, 6, SIDE)
    assert stack.pixel_size_angstrom == pytest.approx(1.5)
    order = np.array([4, 0, 1, 5])
    found = read_images(stack, order)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, images[order].astype(np.float32))


def test_a_volume_header_and_an_extended_header_do_not_matter(tmp_path):
    images = some_images(4)
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(images)
        file.set_volume()
        file.set_extended_header(np.zeros(64, dtype="V1"))
    np.testing.assert_array_equal(read_images(open_stack(tmp_path / "a.mrc"), np.array([3])), images[3:])


def test_a_truncated_stack_keeps_what_is_whole(tmp_path):
    path = write_stack(tmp_path / "a.mrcs", some_images(5))
    os.truncate(path, 1024 + int(3.5 * SIDE * SIDE * 4))
    stack = open_stack(path)
    assert (stack.images, stack.complete) == (5, 3)
    with pytest.raises(DataError, match="has become shorter"):
        read_images(stack, np.array([3]))


def test_a_packed_stack_is_unpacked_as_far_as_it_goes(tmp_path):
    images = some_images(40)
    plain = write_stack(tmp_path / "a.mrcs", images).read_bytes()
    (tmp_path / "a.mrcs.gz").write_bytes(gzip.compress(plain))
    packed = open_stack(tmp_path / "a.mrcs.gz")
    assert packed.compression == "gzip" and packed.images == 40
    stack = unpack(packed, tmp_path / "b.mrcs")
    np.testing.assert_array_equal(read_images(stack, np.arange(40)), images)
    (tmp_path / "a.mrcs.gz").write_bytes(gzip.compress(plain)[:-9000])
    assert 0 < unpack(packed, tmp_path / "c.mrcs").complete < 40


def test_files_that_are_no_stacks(tmp_path):
    (tmp_path / "text.mrcs").write_text("hello\n" * 400)
    (tmp_path / "short.mrcs").write_text("hello")
    write_stack(tmp_path / "wide.mrcs", np.zeros((3, 8, 12), dtype=np.float32))
    with mrcfile.new(tmp_path / "complex.mrcs") as file:
        file.set_data(np.zeros((2, 8, 8), dtype=np.complex64))
    for name, message in (
        ("text", "is not a readable MRC file"),
        ("short", "is not a readable MRC file"),
        ("wide", "12 x 8 px; aceray needs square"),
        ("complex", "complex numbers"),
        ("absent", "cannot read it"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_stack(tmp_path / f"{name}.mrcs")
        assert f"{name}.mrcs" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in ("here/a.mrcs", "meta/b.mrcs", "meta/sub/c.mrcs", "data/x/d.mrcs", "data/e.mrcs", "secret/f.mrcs"):
        write_stack(tmp_path / name, some_images(1))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_names_are_tried_in_the_order_that_users_expect(project):
    finder = StackFinder(project / "meta" / "p.star", project / "data")
    expected = {
        "a.mrcs": "here/a.mrcs",
        "b.mrcs": "meta/b.mrcs",
        "sub/c.mrcs": "meta/sub/c.mrcs",
        "x/d.mrcs": "data/x/d.mrcs",
        ">x/d.mrcs": "data/x/d.mrcs",
        "Extract/job1/e.mrcs": "data/e.mrcs",
        "/old/machine/e.mrcs": "data/e.mrcs",
        str(project / "meta" / "b.mrcs"): "meta/b.mrcs",
    }
    assert {name: finder.find(name).relative_to(project).as_posix() for name in expected} == expected


@pytest.mark.parametrize("name", ["../secret/f.mrcs", "{}/secret/f.mrcs", "sub/../../secret/f.mrcs"])
def test_a_name_may_not_leave_the_allowed_folders(project, name):
    finder = StackFinder(project / "meta" / "p.star", project / "data")
    with pytest.raises(DataError, match=r"outside its folder.*--datadir .*/secret"):
        finder.find(name.format(project))
    assert StackFinder(project / "meta" / "p.star", project / "secret").find(name.format(project)).name == "f.mrcs"


def test_a_missing_stack_comes_with_the_option_that_helps(project):
    finder = StackFinder(project / "meta" / "sub" / "p.star")
    with pytest.raises(DataError, match=r"names the stack q.mrcs, which is not there; give its folder with --datadir"):
        finder.find("q.mrcs")
    with pytest.raises(DataError, match=rf"give --datadir {project}\."):
        finder.find("data/e.mrcs")
