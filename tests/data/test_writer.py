import errno
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from aceray.data import writer as writer_module
from aceray.data.manifest import ImageLayout
from aceray.data.writer import MAX_SHARD_BYTES, ParticleWriter, max_rows_per_shard, write_shard
from aceray.errors import DataError
from tests.data.conftest import children, example_layout, example_rows


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_dataset_folder_holds_nothing_but_the_dataset(write_example, tmp_path):
    path = write_example().path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["set"]
    names = ["manifest.json", "particles-00000.parquet", "particles-00001.parquet", "truth.mrc"]
    assert sorted(entry.name for entry in path.iterdir()) == names


def test_pages_carry_checksums(write_example):
    path = write_example().path / "particles-00000.parquet"
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read_row_group(0)


def test_an_existing_non_empty_folder_is_refused_and_untouched(write_example, tmp_path):
    write_example()
    before = children(tmp_path)
    with pytest.raises(DataError, match="set: the folder exists and is not empty"):
        write_example()
    assert children(tmp_path) == before


def test_an_empty_folder_is_used(write_example, tmp_path):
    (tmp_path / "set").mkdir()
    assert write_example().manifest.particles == 400


def test_a_file_in_the_way_is_refused(write_example, tmp_path):
    (tmp_path / "set").write_text("a file")
    with pytest.raises(DataError, match="set: cannot write it"):
        write_example()
    assert children(tmp_path) == {"set": b"a file"}


def test_overwriting_replaces_the_whole_set(write_example, tmp_path):
    write_example("float32", ctf=True)
    replaced = write_example("float16", ctf=False, existing="overwrite")
    assert replaced.manifest.image_dtype == "float16" and not replaced.manifest.ctf
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("name", ["thesis.txt", "photos/cat.jpg"])
def test_a_folder_with_anything_else_is_never_overwritten(write_example, tmp_path, name):
    write_example()
    stranger = tmp_path / "set" / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("precious")
    before = children(tmp_path)
    with pytest.raises(DataError, match=rf"holds {Path(name).parts[0]}, so it is not just a dataset"):
        write_example(existing="overwrite")
    assert children(tmp_path) == before


def test_a_folder_with_a_foreign_manifest_is_never_overwritten(write_example, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(DataError, match="its manifest is not one of aceray's"):
        write_example(existing="overwrite")


def test_an_error_half_way_leaves_no_trace(tmp_path):
    with (
        pytest.raises(RuntimeError, match="half way"),
        ParticleWriter(tmp_path / "deep" / "set", example_layout()) as writer,
    ):
        writer.write(*example_rows(0, 10))
        raise RuntimeError("half way")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_error_while_overwriting_keeps_the_old_set(write_example, tmp_path, monkeypatch):
    write_example()
    before = children(tmp_path)
    monkeypatch.setattr(writer_module.pq, "write_table", no_space)
    with pytest.raises(DataError):
        write_example("float16", existing="overwrite")
    assert children(tmp_path) == before


@pytest.mark.parametrize("target", ["pq.write_table", "os.rename", "flush_to_disk", "write_volume"])
def test_a_full_disk_is_one_line_and_leaves_nothing(write_example, tmp_path, monkeypatch, target):
    if target == "write_volume":
        monkeypatch.setattr("mrcfile.new", no_space)
    else:
        monkeypatch.setattr(f"aceray.data.writer.{target}", no_space)
    with pytest.raises(DataError, match=r"No space left on device.*free some space") as caught:
        write_example()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_swap_puts_the_old_set_back(write_example, tmp_path, monkeypatch):
    write_example()
    before = children(tmp_path)
    rename, calls = writer_module.os.rename, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            no_space()
        rename(source, target)

    monkeypatch.setattr(writer_module.os, "rename", fail_second)
    with pytest.raises(DataError, match="No space left"):
        write_example("float16", existing="overwrite")
    assert children(tmp_path) == before


def test_a_folder_without_permission_is_one_line(write_example, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"Permission denied.*choose a folder you may write to"):
        write_example()


def test_pixels_beyond_float16_are_refused(tmp_path):
    images, columns = example_rows(0, 4)
    with pytest.raises(DataError, match="do not fit float16; rescale or use float32"):
        write_shard(tmp_path, 0, example_layout("float16"), images * 1e6, columns)
    assert list(tmp_path.iterdir()) == []


def test_shards_may_come_in_any_order(tmp_path):
    with ParticleWriter(tmp_path / "set", example_layout()) as writer:
        for index in (1, 0):
            writer.add(index, write_shard(writer.folder, index, writer.layout, *example_rows(10 * index, 10)))
        particles = writer.finish({})
    table = particles.read(particles.row_groups())
    assert table["particle_id"].to_pylist() == list(range(20))


def test_the_largest_shard_stays_below_256_mib():
    for box in (32, 64, 128, 256, 512):
        layout = ImageLayout(box, 1.0, ctf=True, image_dtype="float32")
        rows = max_rows_per_shard(layout)
        assert rows % 256 == 0
        assert rows * layout.image_bytes <= MAX_SHARD_BYTES or rows == 256


def test_nothing_of_the_writer_depends_on_torch_threads(tmp_path):
    images, columns = example_rows(0, 200)
    threads = torch.get_num_threads()
    written = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            written.append(write_shard(tmp_path, 0, example_layout(), images, columns))
    finally:
        torch.set_num_threads(threads)
    assert written[0] == written[1]
