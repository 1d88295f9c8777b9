import errno

import mrcfile
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.data.mrc import read_volume, write_volume
from aceray.errors import DataError


def test_a_volume_comes_back_with_its_pixel_size(tmp_path):
    volume = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0))
    write_volume(tmp_path / "map.mrc", volume, 4.25)
    again, pixel_size = read_volume(tmp_path / "map.mrc")
    assert torch.equal(again, volume)
    assert pixel_size == pytest.approx(4.25)
    assert [path.name for path in tmp_path.iterdir()] == ["map.mrc"]


def test_equal_volumes_are_equal_files(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_volume(tmp_path / "a.mrc", torch.ones(4, 4, 4), 1.0)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_volume(tmp_path / "b.mrc", torch.ones(4, 4, 4), 1.0)
    assert (tmp_path / "a.mrc").read_bytes() == (tmp_path / "b.mrc").read_bytes()
    assert b"20" not in (tmp_path / "a.mrc").read_bytes()[220:1024]  # no date in a label
    assert mrcfile.validate(tmp_path / "a.mrc")


def test_x_is_the_fastest_axis_of_the_file(tmp_path):
    volume = torch.zeros(4, 4, 4)
    volume[0, 0, 1] = 7.0  # z = 0, y = 0, x = 1
    write_volume(tmp_path / "map.mrc", volume, 1.0)
    values = np.frombuffer((tmp_path / "map.mrc").read_bytes()[1024:], "<f4")
    assert values[1] == 7.0
    header = np.frombuffer((tmp_path / "map.mrc").read_bytes()[:1024], "<i4")
    assert header[3] == 2 and list(header[16:19]) == [1, 2, 3]


def test_an_axis_order_in_the_header_is_obeyed(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)
    with mrcfile.new(tmp_path / "map.mrc", data=values) as file:
        file.voxel_size = 2.0
        # columns run along z, rows along x, sections along y
        file.header.mapc, file.header.mapr, file.header.maps = 3, 1, 2
    volume, _ = read_volume(tmp_path / "map.mrc")
    # array[section = y, row = x, column = z]
    assert_close(volume, torch.from_numpy(values.transpose(2, 0, 1).copy()))


def test_writing_replaces_the_file_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "map.mrc"
    write_volume(path, torch.ones(4, 4, 4), 1.0)

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(DataError, match=r"map\.mrc: cannot write it \(No space left on device\); free some space"):
        write_volume(path, torch.zeros(4, 4, 4), 1.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.mrc"]
    assert read_volume(path)[0].sum() == 64


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.mrc: cannot read it \(No such file"):
        read_volume(tmp_path / "nothing.mrc")
    (tmp_path / "text.mrc").write_text("not a map" * 300)
    with pytest.raises(DataError, match=r"text\.mrc: is not a readable MRC file"):
        read_volume(tmp_path / "text.mrc")
    (tmp_path / "short.mrc").write_text("x")
    with pytest.raises(DataError, match=r"short\.mrc: is not a readable MRC file"):
        read_volume(tmp_path / "short.mrc")


def write_raw(path, values, voxel_size=2.0):
    with mrcfile.new(path, data=values) as file:
        file.voxel_size = voxel_size


@pytest.mark.parametrize(
    ("values", "voxel_size", "message"),
    [
        (np.zeros((4, 4, 6), np.float32), 2.0, "needs a cubic volume"),
        (np.zeros((4, 4), np.float32), 2.0, "needs a cubic volume"),
        (np.zeros((4, 4, 4), np.float32), 0.0, "needs one positive pixel size"),
        (np.zeros((4, 4, 4), np.float32), (2.0, 2.0, 3.0), "needs one positive pixel size"),
    ],
)
def test_volumes_we_cannot_use_are_refused(tmp_path, values, voxel_size, message):
    write_raw(tmp_path / "map.mrc", values, voxel_size)
    with pytest.raises(DataError, match=message):
        read_volume(tmp_path / "map.mrc")


def test_a_volume_with_a_nan_is_refused(tmp_path):
    write_volume(tmp_path / "map.mrc", torch.ones(4, 4, 4), 1.0)
    content = bytearray((tmp_path / "map.mrc").read_bytes())
    content[1024:1028] = np.float32(np.nan).tobytes()
    (tmp_path / "map.mrc").write_bytes(content)
    with pytest.raises(DataError, match="not finite"):
        read_volume(tmp_path / "map.mrc")
