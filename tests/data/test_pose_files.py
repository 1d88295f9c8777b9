import math
import os
import pickle

import numpy as np
import pytest
import starfile
import torch
from torch.testing import assert_close

from aceray.data.particles import CTF_UNITS
from aceray.data.pose_files import read_poses, read_star, write_poses_star
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_relion
from aceray.errors import DataError
from tests.data.conftest import BOX, PIXEL_SIZE, example_rows
from tests.references.density import rotation_from_angles

NAMES = ("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom", *CTF_UNITS)


def some_poses(count=400):
    generator = named_generator("test/poses", 1)
    return random_rotations(count, generator), torch.randn(count, 2, generator=generator)


def test_poses_come_back_through_a_star_file(write_example, tmp_path):
    particles = write_example()
    rotation, shift_px = some_poses()
    write_poses_star(tmp_path / "poses.star", rotation, shift_px, particles)
    found = read_star(tmp_path / "poses.star", NAMES)
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
    found = read_star(tmp_path / "poses.star", NAMES)
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
    found = read_star(tmp_path / "a.star", NAMES)
    assert found["voltage_kv"].tolist() == [300.0, 200.0]
    # origins in pixels become angstrom
    assert found["origin_x_angstrom"].tolist() == [1.5, 2.0]
    assert found["origin_y_angstrom"].tolist() == [3.0, 4.0]


# RELION 3.0: no groups, an unnamed block, origins in pixels whose size is stated by other columns
OLD_STAR = """
data_

loop_
_rlnImageName #1
_rlnDefocusU #2
_rlnDefocusV #3
_rlnDefocusAngle #4
_rlnVoltage #5
_rlnSphericalAberration #6
_rlnAmplitudeContrast #7
_rlnMagnification #8
_rlnDetectorPixelSize #9
_rlnOriginX #10
_rlnOriginY #11
000001@a.mrcs 15301.1 14916.4 5.28 300 2.0 0.1 104478 14 1.5 -2
000002@a.mrcs 15303.0 14918.4 5.28 300 2.0 0.1 104478 14 0.5 3
"""


def test_a_file_without_optics_groups_gives_its_ctfs_whatever_its_origins(tmp_path):
    (tmp_path / "old.star").write_text(OLD_STAR)
    found = read_star(tmp_path / "old.star", CTF_UNITS)
    assert found["defocus_u_angstrom"].tolist() == [15301.1, 15303.0]
    assert found["spherical_aberration_mm"].tolist() == [2.0, 2.0]
    assert set(found) == set(CTF_UNITS) - {"phase_shift_deg"}
    with pytest.raises(DataError, match="rlnOriginX is in pixels"):
        read_star(tmp_path / "old.star", ["origin_x_angstrom"])


def test_a_single_optics_group_may_be_a_simple_block(tmp_path):
    blocks = STAR.split("data_particles")
    simple = "data_optics\n\n_rlnOpticsGroup 3\n_rlnVoltage 120.0\n_rlnImagePixelSize 1.0\n\ndata_particles"
    (tmp_path / "a.star").write_text(simple + blocks[1].replace(" 7\n", " 3\n"))
    assert read_star(tmp_path / "a.star", NAMES)["voltage_kv"].tolist() == [120.0, 120.0]


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
        read_star(tmp_path / "a.star", NAMES)
    assert "a.star" in str(caught.value) and "\n" not in str(caught.value)


def write_cs(path, **columns):
    """A cryoSPARC file with columns such as alignments3D__pose."""
    arrays = {name.replace("__", "/"): np.asarray(values) for name, values in columns.items()}
    table = np.zeros(
        len(next(iter(arrays.values()))), dtype=[(name, a.dtype, a.shape[1:]) for name, a in arrays.items()]
    )
    for name, values in arrays.items():
        table[name] = values
    with open(path, "wb") as stream:
        np.save(stream, table, allow_pickle=False)
    return path


QUARTER = [0.0, 0.0, np.pi / 2]
EIGHTH = [np.pi / 4, 0.0, 0.0]
HALF = math.sqrt(0.5)
# rows are the image's x, y and beam in the object's frame: the transposed exponentials
TURNED = {
    "quarter": [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    "eighth": [[1.0, 0.0, 0.0], [0.0, HALF, HALF], [0.0, -HALF, HALF]],
}


@pytest.mark.parametrize("group", ["alignments3D", "alignments_class_0"])
def test_cryosparc_poses_by_index(write_example, tmp_path, group):
    manifest = write_example().manifest
    columns = {
        "blob__path": np.array([b"a.mrc", b"a.mrc"]),
        "blob__idx": np.array([399, 7], dtype=np.uint32),
        f"{group}__pose": np.array([QUARTER, EIGHTH], dtype=np.float32),
        f"{group}__shift": np.array([[2.0, -1.0], [0.5, 3.0]], dtype=np.float32),
        f"{group}__psize_A": np.array([2.5, 5.0], dtype=np.float32),
    }
    rotation, shift_px, number = read_poses(write_cs(tmp_path / "a.cs", **columns), manifest)
    assert number.tolist() == [7, 399]
    assert_close(rotation, torch.tensor([TURNED["eighth"], TURNED["quarter"]]), atol=1e-6, rtol=0)
    # pixels of 5 A are two of ours
    assert shift_px.tolist() == [[-1.0, -6.0], [-2.0, 1.0]]


def test_cryosparc_poses_by_order(write_example, tmp_path):
    manifest = write_example().manifest
    vector, shift = np.tile(QUARTER, (400, 1)), np.arange(800.0).reshape(400, 2)
    stacks = {"blob__path": np.array([b"a.mrc", b"b.mrc"] * 200), "blob__idx": np.arange(400) // 2}
    for names in ({}, stacks):
        path = write_cs(tmp_path / "a.cs", **names, alignments3D__pose=vector, alignments3D__shift=shift)
        rotation, shift_px, number = read_poses(path, manifest)
        assert number.tolist() == list(range(400))
        assert_close(rotation[0], torch.tensor(TURNED["quarter"]), atol=1e-6, rtol=0)
        # without a pixel size the data set's own
        assert shift_px[3].tolist() == [-6.0, -7.0]


def test_cryosparc_files_that_cannot_serve(write_example, tmp_path):
    manifest = write_example().manifest
    pose = {"alignments3D__pose": [QUARTER], "alignments3D__shift": [[0.0, 0.0]]}
    broken = {
        "lacks alignments3D/pose": {"blob__idx": [0]},
        "lacks alignments3D/shift": {"blob__idx": [0], "alignments3D__pose": [QUARTER]},
        "has 1 rows and no blob/idx": pose,
        "blob/idx does not count particles 0 to 399": {"blob__idx": [400], **pose},
        "not a finite number": {"blob__idx": [0], **pose, "alignments3D__pose": [[np.nan, 0.0, 0.0]]},
        r"has the shape \(1, 2\) instead of \(1, 3\)": {"blob__idx": [0], **pose, "alignments3D__pose": [[0.0, 0.0]]},
        "in several classes": {**pose, "alignments_class_1__pose": [QUARTER]},
    }
    for message, columns in broken.items():
        refused(write_cs(tmp_path / "a.cs", **columns), manifest, message)
    (tmp_path / "text.cs").write_text("hello\nworld\n")
    np.save(tmp_path / "objects.npy", np.array([{}, None], dtype=object))
    (tmp_path / "objects.npy").rename(tmp_path / "objects.cs")
    (tmp_path / "empty.cs").write_bytes(b"")
    (tmp_path / "half.cs").write_bytes((tmp_path / "a.cs").read_bytes()[:-5])
    for name in ("text", "objects", "empty", "half"):
        refused(tmp_path / f"{name}.cs", manifest, "is no cryoSPARC particle file")
    refused(tmp_path / "absent.cs", manifest, "cannot read it")
    refused(tmp_path / "a.csv", manifest, "has no known ending")


def refused(path, manifest, message):
    with pytest.raises(DataError, match=message) as caught:
        read_poses(path, manifest)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("version", [1, 2])
def test_cryodrgn_poses(write_example, tmp_path, protocol, version):
    """cryoDRGN moves the image by +t boxes to centre it: the content's shift is minus that."""
    manifest = write_example().manifest
    rotation = np.tile(np.array(TURNED["quarter"], dtype=np.float32), (400, 1, 1))
    rotation[5] = TURNED["eighth"]
    translation = np.zeros((400, 2))
    translation[5] = 0.25, -0.5
    content = pickle.dumps((rotation, translation), protocol)
    if version == 1:
        content = as_numpy_1(content)
    assert (b"numpy.core." if version == 1 else b"numpy._core.") in content
    (tmp_path / "pose.pkl").write_bytes(content)
    found, shift_px, number = read_poses(tmp_path / "pose.pkl", manifest)
    assert number.tolist() == list(range(400))
    assert_close(found, torch.from_numpy(rotation), atol=1e-6, rtol=0)
    assert shift_px[5].tolist() == [-0.25 * BOX, 0.5 * BOX] and float(shift_px.abs().sum()) == 0.75 * BOX


def as_numpy_1(content):
    """The same pickle with NumPy's functions under the names of its version 1."""
    for module in (b"multiarray", b"numeric"):
        old, new = b"numpy._core." + module, b"numpy.core." + module
        framed = [b"\x8c" + bytes([len(name)]) + name for name in (old, new)]
        replaced = content.replace(*framed)
        if replaced != content and content[2:3] == b"\x95":
            length = int.from_bytes(content[3:11], "little") - 1
            replaced = replaced[:3] + length.to_bytes(8, "little") + replaced[11:]
        content = replaced.replace(b"c" + old + b"\n", b"c" + new + b"\n")
    return content


def test_cryodrgn_poses_without_translations(write_example, tmp_path):
    manifest = write_example().manifest
    rotation = np.tile(np.eye(3), (400, 1, 1))
    for content in (rotation, (rotation,)):
        (tmp_path / "pose.pkl").write_bytes(pickle.dumps(content))
        assert float(read_poses(tmp_path / "pose.pkl", manifest)[1].abs().max()) == 0


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_in_a_pickle_is_executed(write_example, tmp_path):
    manifest = write_example().manifest
    rotation, folder = np.tile(np.eye(3), (400, 1, 1)), tmp_path / "made"
    hidden = np.array([Harmful(folder)], dtype=object)
    for content in (Harmful(folder), (rotation, Harmful(folder)), [rotation, {"t": Harmful(folder)}], hidden):
        for protocol in (0, 2, 5):
            (tmp_path / "pose.pkl").write_bytes(pickle.dumps(content, protocol))
            refused(tmp_path / "pose.pkl", manifest, r"\((asks for \w+\.mkdir|holds an array of type O8)\)")
    assert not folder.exists()


class Forged:
    """Asks to call NumPy with these arguments when it is unpickled."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_forged_arrays_touch_no_memory(write_example, tmp_path):
    """Bytes taken for pointers to objects, and a type whose flags say so."""
    manifest = write_example().manifest
    reconstruct = np.empty(0).__reduce__()[0]
    objects = np.dtype("O")
    flagged = Forged(np.dtype, ("f8", False, True), (3, "<", None, None, None, 8, 8, 63))
    forged = [
        Forged(np.ndarray, ((5,), objects, b"A" * 40)),
        Forged(reconstruct, (np.ndarray, (0,), b"b"), (1, (5,), objects, False, b"A" * 40)),
        Forged(reconstruct, (np.ndarray, (0,), b"b"), (1, (5,), np.dtype("f8"), False, [1, 2, 3, 4, 5])),
    ]
    for content in forged:
        (tmp_path / "pose.pkl").write_bytes(pickle.dumps(content))
        refused(tmp_path / "pose.pkl", manifest, "is no pickle of NumPy arrays alone")
    whole = Forged(reconstruct, (np.ndarray, (0,), b"b"), (1, (5,), flagged, False, b"A" * 40))
    (tmp_path / "pose.pkl").write_bytes(pickle.dumps(whole))
    refused(tmp_path / "pose.pkl", manifest, "the rotations has the shape")


def test_cryodrgn_files_that_cannot_serve(write_example, tmp_path):
    manifest = write_example().manifest
    rotation, translation = np.tile(np.eye(3), (400, 1, 1)), np.zeros((400, 2))
    broken = {
        "holds no rotations and translations": {"rotation": 1},
        "has 7 rows": (rotation[:7], translation[:7]),
        "are no rotations": (-rotation, translation),
        "moves an image by 3 boxes": (rotation, translation + 3.0),
        "the translations has the shape": (rotation, translation[:, :1]),
        "the rotations has the shape": (translation, rotation),
        "holds a value that is not a finite number": (rotation, translation + np.inf),
    }
    for message, content in broken.items():
        (tmp_path / "pose.pkl").write_bytes(pickle.dumps(content))
        refused(tmp_path / "pose.pkl", manifest, message)
    for content in (b"", b"hello\n", pickle.dumps((rotation, translation))[:-9]):
        (tmp_path / "pose.pkl").write_bytes(content)
        refused(tmp_path / "pose.pkl", manifest, "is no pickle of NumPy arrays alone")
    refused(tmp_path / "absent.pkl", manifest, "cannot read it")
