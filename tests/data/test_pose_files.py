import numpy as np
import pytest
import starfile
import torch
from torch.testing import assert_close

from aceray.data.particles import CTF_UNITS
from aceray.data.pose_files import read_star, write_poses_star
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_relion
from aceray.errors import DataError
from tests.data.conftest import BOX, PIXEL_SIZE, example_rows
from tests.references.density import rotation_from_angles


def some_poses(count=400):
    generator = named_generator("test/poses", 1)
    return random_rotations(count, generator), torch.randn(count, 2, generator=generator)


def test_poses_come_back_through_a_star_file(write_example, tmp_path):
    particles = write_example()
    rotation, shift_px = some_poses()
    write_poses_star(tmp_path / "poses.star", rotation, shift_px, particles)
    found = read_star(tmp_path / "poses.star")
    again = rotation_from_relion(found["rot_deg"], found["tilt_deg"], found["psi_deg"])
    assert_close(again.float(), rotation, atol=1e-5, rtol=0)
    origin = torch.stack([found["origin_x_angstrom"], found["origin_y_angstrom"]], dim=1)
    assert_close((-origin / PIXEL_SIZE).float(), shift_px, atol=1e-5, rtol=0)
    columns = {
        name: np.concatenate([example_rows(0, 300)[1][name], example_rows(300, 100)[1][name]]) for name in CTF_UNITS
    }
    for name in CTF_UNITS:
        np.testing.assert_allclose(found[name], columns[name], rtol=1e-6)


def test_the_file_is_what_relion_expects(write_example, tmp_path):
    """Angles by RELION's matrix, the origin minus the shift in angstrom, one optics table."""
    particles = write_example()
    rotation, shift_px = some_poses()
    write_poses_star(tmp_path / "poses.star", rotation, shift_px, particles)
    blocks = starfile.read(tmp_path / "poses.star")
    row = blocks["particles"].iloc[301]
    matrix = rotation_from_angles(row["rlnAngleRot"], row["rlnAngleTilt"], row["rlnAnglePsi"])
    np.testing.assert_allclose(matrix, rotation[301], atol=1e-5)
    assert row["rlnOriginXAngst"] == pytest.approx(-float(shift_px[301, 0]) * PIXEL_SIZE, abs=1e-5)
    assert row["rlnOriginYAngst"] == pytest.approx(-float(shift_px[301, 1]) * PIXEL_SIZE, abs=1e-5)
    assert row["rlnImageName"] == "000302@set.mrcs"
    assert row["rlnRandomSubset"] == 2
    assert row["rlnDefocusU"] == pytest.approx(301.0)
    optics = blocks["optics"].iloc[0]
    assert optics["rlnImagePixelSize"] == pytest.approx(PIXEL_SIZE)
    assert optics["rlnImageSize"] == BOX
    assert {"rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnOpticsGroup"} <= set(optics.index)


def test_every_distinct_microscope_is_an_optics_group(write_example, tmp_path):
    particles = write_example()  # the voltage of every example row is its own
    write_poses_star(tmp_path / "poses.star", *some_poses(), particles)
    blocks = starfile.read(tmp_path / "poses.star")
    assert len(blocks["optics"]) == 400
    merged = blocks["particles"].merge(blocks["optics"], on="rlnOpticsGroup")
    assert merged["rlnVoltage"].tolist() == pytest.approx([4000.0 + index for index in range(400)])


def test_a_set_without_ctf_has_poses_only(write_example, tmp_path):
    particles = write_example(ctf=False)
    write_poses_star(tmp_path / "poses.star", *some_poses(), particles)
    found = read_star(tmp_path / "poses.star")
    assert sorted(found) == ["origin_x_angstrom", "origin_y_angstrom", "psi_deg", "rot_deg", "tilt_deg"]


def test_as_many_poses_as_particles_are_needed(write_example, tmp_path):
    particles = write_example()
    with pytest.raises(ValueError, match="7 poses for 400 particles"):
        write_poses_star(tmp_path / "poses.star", *some_poses(7), particles)


STAR = """data_optics

loop_
_rlnOpticsGroup
_rlnVoltage
_rlnImagePixelSize
7 200.0 2.0
3 300.0 1.5

data_particles

loop_
_rlnAngleRot
_rlnOriginX
_rlnOriginY
_rlnOpticsGroup
10.0 1.0 2.0 3
20.0 1.0 2.0 7
"""


def test_values_of_the_group_are_looked_up_by_its_number(tmp_path):
    (tmp_path / "a.star").write_text(STAR)
    found = read_star(tmp_path / "a.star")
    assert found["voltage_kv"].tolist() == [300.0, 200.0]
    # origins in pixels become angstrom
    assert found["origin_x_angstrom"].tolist() == [1.5, 2.0]
    assert found["origin_y_angstrom"].tolist() == [3.0, 4.0]


def test_a_single_optics_group_may_be_a_simple_block(tmp_path):
    blocks = STAR.split("data_particles")
    simple = "data_optics\n\n_rlnOpticsGroup 3\n_rlnVoltage 120.0\n_rlnImagePixelSize 1.0\n\ndata_particles"
    (tmp_path / "a.star").write_text(simple + blocks[1].replace(" 7\n", " 3\n"))
    assert read_star(tmp_path / "a.star")["voltage_kv"].tolist() == [120.0, 120.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a\.star: cannot read it"),
        ("hello\n", "holds no block data_particles"),
        (STAR.replace("2.0 7", "2.0 8"), "optics group 8 is used but not in data_optics"),
        (STAR.replace("_rlnImagePixelSize\n", "").replace(" 2.0\n3", "\n3").replace(" 1.5", ""), "is in pixels and no"),
        (STAR.replace("10.0", "north"), "holds something else than numbers"),
        (STAR.replace("data_particles", "data_micrographs"), "holds no block data_particles"),
    ],
)
def test_a_star_file_that_cannot_serve_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.star").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_star(tmp_path / "a.star")
    assert "a.star" in str(caught.value) and "\n" not in str(caught.value)
