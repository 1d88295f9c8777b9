import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close

from aceray.data.particles import (
    CTF_UNITS,
    OBSERVED_COLUMNS,
    TRUTH_COLUMNS,
    ParticleStack,
    RowGroup,
    open_particles,
    stack_from_table,
)
from aceray.em.rotation import rotation_from_relion
from aceray.errors import DataError
from tests.data.conftest import BOX, PIXEL_SIZE, example_rows


def all_rows():
    parts = [example_rows(0, 300), example_rows(300, 100)]
    images = torch.cat([part[0] for part in parts])
    return images, {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}


def test_float32_images_and_columns_come_back_as_they_were(write_example):
    particles = write_example("float32")
    images, columns = all_rows()
    table = particles.read(particles.row_groups(), [*OBSERVED_COLUMNS, *TRUTH_COLUMNS])
    stack = stack_from_table(table, particles.manifest, BOX)
    assert torch.equal(stack.images, images)
    assert torch.equal(stack.particle_id, torch.arange(400))
    for name in CTF_UNITS:
        assert_close(getattr(stack.ctf, name), torch.from_numpy(columns[name]))
    for name in TRUTH_COLUMNS:
        np.testing.assert_array_equal(table[name].to_numpy(), columns[name])
    np.testing.assert_array_equal(table["half_set"].to_numpy(), columns["half_set"])


def test_float16_images_come_back_rounded_to_half_precision(write_example):
    particles = write_example("float16")
    images, _ = all_rows()
    stack = stack_from_table(particles.read(particles.row_groups()), particles.manifest, BOX)
    assert torch.equal(stack.images, images.half().float())


def test_row_groups_are_small_and_read_in_the_order_asked_for(write_example):
    particles = write_example()
    groups = particles.row_groups()
    assert groups == [RowGroup(0, 0), RowGroup(0, 1), RowGroup(1, 0)]
    table = particles.read([groups[2], groups[1]])
    assert table["particle_id"].to_pylist() == [*range(300, 400), *range(256, 300)]
    stack = stack_from_table(table, particles.manifest, BOX)
    assert torch.equal(stack.images, all_rows()[0][stack.particle_id])


def test_no_row_groups_give_an_empty_stack(write_example):
    particles = write_example()
    stack = stack_from_table(particles.read([]), particles.manifest, BOX)
    assert len(stack) == 0 and stack.images.shape == (0, BOX, BOX)


def test_a_sliced_table_decodes_its_own_rows(write_example):
    particles = write_example()
    table = particles.read(particles.row_groups()).slice(290, 20)
    stack = stack_from_table(table, particles.manifest, BOX)
    assert torch.equal(stack.images, all_rows()[0][290:310])


def test_cropping_keeps_the_low_frequencies_and_the_noise_level(write_example):
    particles = write_example("float32")
    table = particles.read(particles.row_groups())
    cropped = stack_from_table(table, particles.manifest, 8).images.numpy().astype(float)
    images = all_rows()[0].numpy().astype(float)
    # direct transform at one frequency of both boxes, origin at pixel d // 2, orthonormal
    for ky, kx in ((0, 0), (2, 1), (-3, 2)):
        expected, found = ((stack * _wave(stack.shape[-1], ky, kx)).sum((1, 2)) for stack in (images, cropped))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def _wave(box: int, ky: int, kx: int) -> np.ndarray:
    y, x = np.mgrid[:box, :box] - box // 2
    return np.exp(-2j * np.pi * (ky * y + kx * x) / box) / box


def test_the_default_columns_and_the_stack_know_no_pose(write_example):
    particles = write_example()
    table = particles.read(particles.row_groups())
    assert not [name for name in table.column_names if "true" in name]
    assert {field.name for field in dataclasses.fields(ParticleStack)} == {"images", "ctf", "particle_id"}


def test_every_column_states_its_unit(write_example):
    particles = write_example("float16")
    schema = pq.read_schema(particles.path / "particles-00000.parquet")
    assert schema.field("image").type == pa.binary(2 * BOX * BOX)
    assert schema.field("image").metadata[b"shape"] == b"[12, 12]"
    assert schema.field("image").metadata[b"dtype"] == b"float16"
    assert all(b"unit" in field.metadata for field in schema if field.name != "image")


def test_the_manifest_states_the_noise_measured_on_the_stored_images(write_example):
    manifest = write_example("float16").manifest
    images = all_rows()[0].half().double().numpy()
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    outside = images[:, x**2 + y**2 > (BOX / 2) ** 2]
    expected = np.sqrt(np.mean(outside.var(axis=1, ddof=1)))
    assert manifest.noise_std == pytest.approx(expected, rel=1e-5)
    assert manifest.noise_std == pytest.approx(3.0, rel=0.05)


def test_truth_is_the_rotation_and_minus_the_origin_in_pixels(write_example):
    truth = write_example().read_truth()
    assert truth is not None
    columns = all_rows()[1]
    origin = np.stack([columns["true_origin_x_angstrom"], columns["true_origin_y_angstrom"]], axis=-1)
    np.testing.assert_allclose(truth.shift_px, -origin / PIXEL_SIZE, rtol=1e-6)
    angles = [torch.from_numpy(columns[name]) for name in TRUTH_COLUMNS[:3]]
    assert_close(truth.rotation, rotation_from_relion(*angles).float())
    assert torch.equal(truth.particle_id, torch.arange(400))


def test_empty_truth_columns_are_no_truth(write_example):
    assert write_example(truth=False).read_truth() is None


def test_absent_truth_columns_change_nothing_but_the_truth(write_example):
    particles = write_example()
    whole = stack_from_table(particles.read(particles.row_groups()), particles.manifest, BOX)
    rewrite_shards(particles.path, lambda table: table.drop_columns(list(TRUTH_COLUMNS)))
    stripped = open_particles(particles.path)
    assert stripped.read_truth() is None
    again = stack_from_table(stripped.read(stripped.row_groups()), stripped.manifest, BOX)
    assert torch.equal(again.images, whole.images)


def rewrite_shards(folder: Path, change) -> None:
    """Replace every shard by a changed one and bring the manifest's sizes up to date, as a stranger's tool might."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        table = change(pq.read_table(path))
        pq.write_table(table, path, row_group_size=256, compression="none", use_dictionary=False)
        shard["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_set_without_ctf_has_none(write_example):
    particles = write_example(ctf=False)
    assert stack_from_table(particles.read(particles.row_groups()), particles.manifest, BOX).ctf is None


def test_a_missing_ctf_value_is_refused(write_example):
    particles = write_example()

    def lose_one(table):
        values = table["defocus_u_angstrom"].to_pylist()
        values[5] = None
        position = table.column_names.index("defocus_u_angstrom")
        return table.set_column(position, table.schema.field(position), pa.array(values, pa.float32()))

    rewrite_shards(particles.path, lose_one)
    particles = open_particles(particles.path)
    with pytest.raises(DataError, match="defocus_u_angstrom"):
        stack_from_table(particles.read(particles.row_groups()), particles.manifest, BOX)


def test_take_and_concatenate_select_whole_particles(write_example):
    particles = write_example()
    stack = stack_from_table(particles.read(particles.row_groups()), particles.manifest, BOX)
    index = torch.tensor([7, 3, 399])
    taken = ParticleStack.concatenate([stack.take(index[:1]), stack.take(index[1:])])
    assert torch.equal(taken.particle_id, index)
    assert torch.equal(taken.images, stack.images[index])
    assert torch.equal(taken.ctf.voltage_kv, stack.ctf.voltage_kv[index])
    with pytest.raises(ValueError, match="CTF"):
        ParticleStack.concatenate([stack, dataclasses.replace(stack, ctf=None)])


def test_the_truth_volume_comes_back(write_example):
    volume = write_example().read_truth_volume()
    assert_close(volume, torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(3)))


def test_a_larger_box_than_stored_is_refused(write_example):
    particles = write_example()
    with pytest.raises(DataError, match=r"data\.box: 14 px is larger than the stored images \(12 px\)"):
        stack_from_table(particles.read(particles.row_groups()), particles.manifest, 14)


# ---- damage -------------------------------------------------------------------------------------------------------


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.7])
def test_a_flipped_bit_in_an_image_is_found_when_it_is_read(write_example, where):
    particles = write_example()
    path = particles.path / "particles-00000.parquet"
    images = pq.ParquetFile(path).metadata.row_group(0).column(0)
    flip_byte(path, images.data_page_offset + int(where * images.total_compressed_size))
    with pytest.raises(DataError, match=r"particles-00000\.parquet: the shard is damaged"):
        particles.read(particles.row_groups())
    with pytest.raises(DataError, match=r"particles-00000\.parquet: is damaged \(its SHA-256"):
        particles.verify()


def test_a_flipped_bit_in_a_pose_is_found_when_it_is_read(write_example):
    particles = write_example()
    path = particles.path / "particles-00001.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "true_psi_deg")
    flip_byte(path, column.data_page_offset + column.total_compressed_size - 9)
    with pytest.raises(DataError, match=r"particles-00001\.parquet"):
        particles.read_truth()


def test_a_damaged_footer_is_found(write_example):
    particles = write_example()
    path = particles.path / "particles-00000.parquet"
    flip_byte(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match=r"particles-00000\.parquet"):
        particles.read(particles.row_groups())


def test_an_undamaged_set_passes_the_whole_check(write_example):
    write_example().verify()


def test_a_damaged_truth_volume_is_found(write_example):
    particles = write_example()
    flip_byte(particles.path / "truth.mrc", 2000)
    with pytest.raises(DataError, match=r"truth\.mrc: is damaged"):
        particles.read_truth_volume()


@pytest.mark.parametrize("name", ["particles-00001.parquet", "truth.mrc"])
def test_a_missing_file_is_named_on_opening(write_example, name):
    particles = write_example()
    (particles.path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        open_particles(particles.path)


def test_a_shard_lost_after_opening_is_named(write_example):
    particles = write_example()
    (particles.path / "particles-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"particles-00001\.parquet: the shard is missing"):
        particles.read(particles.row_groups())


def test_a_shortened_shard_is_named_on_opening(write_example):
    particles = write_example()
    path = particles.path / "particles-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"particles-00000\.parquet: has \d+ bytes, the manifest says"):
        open_particles(particles.path)


def test_a_shard_of_another_set_is_refused(write_example):
    particles = write_example()
    rewrite_shards(particles.path, lambda table: table.slice(0, 50))
    particles = open_particles(particles.path)
    with pytest.raises(DataError, match=r"particles-00000\.parquet: holds 50 particles in 1 row groups"):
        particles.read(particles.row_groups())


def test_a_shard_with_other_columns_is_refused(write_example):
    particles = write_example()
    rewrite_shards(particles.path, lambda table: table.drop_columns(["voltage_kv"]))
    particles = open_particles(particles.path)
    with pytest.raises(DataError, match="column voltage_kv is missing"):
        particles.read(particles.row_groups())


def test_an_image_with_a_nan_is_refused_and_named(write_example):
    particles = write_example()

    def spoil(table):
        images = np.frombuffer(b"".join(table["image"].to_pylist()), np.float32).reshape(-1, BOX * BOX).copy()
        images[17, 4] = np.nan
        column = pa.array([row.tobytes() for row in images], pa.binary(4 * BOX * BOX))
        return table.set_column(0, table.schema.field("image"), column)

    rewrite_shards(particles.path, spoil)
    particles = open_particles(particles.path)
    with pytest.raises(DataError, match="particle 17: its image holds values that are not finite"):
        stack_from_table(particles.read(particles.row_groups()), particles.manifest, 8)


# ---- manifests ----------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        open_particles(tmp_path / "nowhere")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a dataset")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        open_particles(tmp_path)


@pytest.mark.parametrize("text", ["{", "\xff\xfe", "[1, 2]", '{"format": "another"}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest\.json: is not"):
        open_particles(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is of version 2, this aceray reads version 1: upgrade aceray"),
        ({"box": "12"}, "field box is missing or not of type int"),
        ({"noise_std": None}, "field noise_std is missing or not of type float"),
        ({"noise_std": float("nan")}, "field noise_std"),
        ({"ctf": 1}, "field ctf"),
        ({"particles": 401}, "do not add up to 401 particles"),
        ({"image_dtype": "int8"}, "neither float16 nor float32"),
        ({"pixel_size_angstrom": 0}, "out of range"),
        ({"truth_volume": {"file": "../../etc/passwd", "bytes": 1, "sha256": ""}}, "not a plain name"),
        ({"truth_volume": "truth.mrc"}, "describes a file by 'truth.mrc'"),
    ],
)
def test_a_wrong_manifest_is_refused(write_example, change, message):
    path = write_example().path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(DataError, match=message) as caught:
        open_particles(path)
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_digest_of_the_particles_depends_on_them_alone(write_example, tmp_path):
    first = write_example("float32").manifest
    again = write_example("float32", existing="overwrite").manifest
    other = write_example("float16", existing="overwrite").manifest
    assert first.sha256 == again.sha256 != other.sha256
