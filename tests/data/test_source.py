import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import starfile
import torch

from aceray.data.cryosparc import read_record_array, write_cs_poses
from aceray.data.particle_table import Findings
from aceray.data.particles import CTF_UNITS
from aceray.data.source import SourceFiles, open_source, refused_by_header, subset_rows
from aceray.data.stacks import read_images
from aceray.data.star import particles_from_star, read_star_file, write_star_poses
from aceray.em.rotation import rotation_from_relion
from aceray.errors import DataError
from tests.data.inputs import SIDE, cs_columns, some_images, write_cs, write_stack, write_star

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not there")


@pytest.fixture
def stacks(tmp_path):
    """a.mrcs of 5 and b.mrcs of 3 images."""
    for name, count in (("a.mrcs", 5), ("b.mrcs", 3)):
        write_stack(tmp_path / name, some_images(count, seed=count))
    return tmp_path


NAMES = ["000002@a.mrcs", "3@b.mrcs", "000001@a.mrcs"]


def opened(path, **options):
    findings = Findings()
    return open_source(SourceFiles(path, **options), findings), findings


def images_of(source):
    table = source.table
    return np.concatenate(
        [read_images(source.stacks[s], np.array([i])) for s, i in zip(table.stack, table.stack_index, strict=True)]
    )


def same_particles(first, second):
    np.testing.assert_array_equal(images_of(first), images_of(second))
    np.testing.assert_allclose(first.table.pixel_size_angstrom, second.table.pixel_size_angstrom, rtol=1e-6)
    for name in CTF_UNITS:
        np.testing.assert_allclose(first.table.ctf[name], second.table.ctf[name], rtol=1e-5, err_msg=name)


@needs_shared
def test_real_particles_are_the_same_through_star_and_cs():
    folder = SHARED / "particles_10076"
    star, _ = opened(folder / "empiar_10076_7.star")
    cs, findings = opened(folder / "empiar_10076_7.cs")
    assert len(star.table) == 7 and not findings.errors
    same_particles(star, cs)
    assert star.table.pixel_size_angstrom[0] == pytest.approx(1.31, abs=1e-3)
    assert star.table.ctf["defocus_u_angstrom"][2] == 15150.7 and star.table.ctf["astigmatism_deg"][0] == 5.28


@needs_shared
def test_real_particles_are_the_same_in_both_block_orders():
    folder = SHARED / "particles_relion31"
    stack = "000001@relion31.mrcs"
    first, findings = opened(folder / "relion31.star", datadir=folder)
    second, more = opened(folder / "relion31.v2.star", datadir=folder)
    assert not findings.errors + more.errors and len(first.table) == 5 and first.table.label(0) == stack
    same_particles(first, second)
    for name, values in first.table.pose.items():
        np.testing.assert_array_equal(values, second.table.pose[name])
    assert set(first.table.half_set) <= {1, 2}


def test_relion_3_files_state_everything_in_every_row(stacks):
    path = write_star(stacks / "p.star", NAMES, optics=False, rlnOriginX=[1.0, 2.0, -3.0], rlnOriginY=[0.0] * 3,
                      rlnAngleRot=[10.0] * 3, rlnAngleTilt=[20.0] * 3, rlnAnglePsi=[30.0] * 3)  # fmt: skip
    source, findings = opened(path)
    assert not findings.errors
    assert source.table.pixel_size_angstrom.tolist() == [2.0] * 3
    assert source.table.pose["origin_x_angstrom"].tolist() == [2.0, 4.0, -6.0]
    assert source.table.ctf["phase_shift_deg"].tolist() == [0.0] * 3
    expected = np.concatenate([some_images(5, seed=5)[[1]], some_images(3, seed=3)[[2]], some_images(5, seed=5)[[0]]])
    np.testing.assert_array_equal(images_of(source), expected)


def test_values_of_optics_groups_are_looked_up_for_every_particle(stacks):
    """Any number of groups, named in any order, after the particles, without #n, with list-valued columns."""
    text = (
        "data_particles\n\nloop_\n_rlnImageName\n_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\n_rlnOpticsGroup\n"
        "_rlnVoltage\n_rlnCoordinateList\n"
        "1@a.mrcs 1e4 1.1e4 5 9 100 [1,2]\n2@a.mrcs 2e4 2.1e4 6 2 100 [3,4]\n1@b.mrcs 3e4 3.1e4 7 9 100 [5]\n\n"
        "data_general\n\n_rlnFinalResolution 3.5\n\n"
        "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
        "_rlnImagePixelSize\n2 200 2.0 0.07 1.5\n9 300 2.7 0.1 1.2\n"
    )
    (stacks / "p.star").write_text(text)
    source, findings = opened(stacks / "p.star")
    assert not findings.errors
    # the group's voltage wins over the particle's
    assert source.table.ctf["voltage_kv"].tolist() == [300.0, 200.0, 300.0]
    assert source.table.ctf["amplitude_contrast"].tolist() == [0.1, 0.07, 0.1]
    assert source.table.pixel_size_angstrom.tolist() == [1.2, 1.5, 1.2]


def test_scipion_files_name_their_blocks_otherwise(stacks):
    path = write_star(stacks / "p.star", NAMES, optics=False)
    path.write_text(path.read_text().replace("data_\n", "data_Particles\n") + "\ndata_micrographs\n\nloop_\n_a\n1\n")
    assert len(opened(path)[0].table) == 3


def test_everything_that_is_wrong_is_found_at_once(stacks):
    """Missing stacks, image numbers beyond a stack, impossible values: one line each."""
    os.truncate(stacks / "b.mrcs", 1024 + 2 * SIDE * SIDE * 4)
    names = [*NAMES, "6@a.mrcs", "1@gone.mrcs", "1@lost.mrcs"]
    path = write_star(stacks / "p.star", names, rlnDefocusU=[15000.0, float("nan"), 1e9, 1, 2, 3])
    source, findings = opened(path)
    errors = "\n".join(findings.errors)
    assert "gone.mrcs" in errors and "lost.mrcs" in errors and "--datadir" in errors
    assert "defocus_u_angstrom of 000003@b.mrcs is nan (and of 1 others)" in errors
    assert refused_by_header(source) == {1: "the file is truncated", 3: "the stack has only 5 images"}
    with pytest.raises(DataError, match=r"2 more errors: see --check"):
        findings.raise_errors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("_rlnVoltage", "_rlnVolume"), "defoci but no rlnVoltage"),
        (("300.0", "many"), "rlnVoltage holds something else than numbers"),
        (("opticsGroup1 300.0", "opticsGroup1 0"), "voltage_kv of 000002@a.mrcs is 0"),
        (("_rlnImagePixelSize", "_rlnNothing"), "no pixel size for 3 particles.*--pixel-size"),
        (("000001@a.mrcs", "000000@a.mrcs"), "image number 0; from 1 on"),
    ],
)
def test_a_mistake_in_a_star_file_says_what_to_do(stacks, change, message):
    path = write_star(stacks / "p.star", NAMES)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DataError, match=message):
        opened(path)[1].raise_errors()


def test_a_pixel_size_from_the_header_is_a_warning_and_a_given_one_wins(stacks):
    path = write_stack(stacks / "c.mrcs", some_images(3), pixel_size=1.7)
    source, findings = opened(path)
    assert source.table.pixel_size_angstrom.tolist() == pytest.approx([1.7] * 3)
    assert "1.7 A) is from the stacks' headers" in findings.warnings[0] and not findings.errors
    source, findings = opened(path, pixel_size_angstrom=3.0)
    assert source.table.pixel_size_angstrom.tolist() == [3.0] * 3 and "header" not in findings.warnings[0]


def test_lists_of_stacks(stacks):
    (stacks / "list.txt").write_text("b.mrcs\n\na.mrcs\n")
    source, _ = opened(stacks / "list.txt", pixel_size_angstrom=2.0)
    assert [source.table.label(row) for row in (0, 3)] == ["000001@b.mrcs", "000001@a.mrcs"] and len(source.table) == 8


def test_cryosparc_files_and_their_passthrough(stacks):
    columns = cs_columns(4, ">a.mrcs")
    blob = {name: values for name, values in columns.items() if not name.startswith("ctf/")}
    ctf = {name: np.asarray(values)[::-1] for name, values in columns.items() if name[:3] in ("uid", "ctf")}
    path = write_cs(stacks / "p.cs", blob)
    source, findings = opened(path, passthrough=(write_cs(stacks / "pass.cs", ctf),))
    assert not findings.errors
    same_particles(source, opened(write_cs(stacks / "whole.cs", columns))[0])
    assert source.table.ctf["defocus_u_angstrom"][0] == 15000
    assert source.table.ctf["astigmatism_deg"][0] == pytest.approx(30)
    ctf["uid"] = ctf["uid"] + 1
    with pytest.raises(DataError, match=r"pass.cs: lacks 1 of the particles"):
        opened(path, passthrough=(write_cs(stacks / "pass.cs", ctf),))
    with pytest.raises(DataError, match="names no images"):
        opened(write_cs(stacks / "ctf.cs", ctf))


@pytest.mark.parametrize("group", ["alignments3D", "alignments_class_0"])
def test_cryosparc_poses_are_relions(stacks, group):
    """A pose about z by 40 degrees: R is the transpose of its matrix, so psi + rot = 40; the shift is the origin's."""
    columns = cs_columns(2) | {
        f"{group}/pose": np.array([[0, 0, np.deg2rad(40)], [0, np.deg2rad(30), 0]], np.float32),
        f"{group}/shift": np.array([[1.5, -2.0], [0, 0]], np.float32),
        f"{group}/psize_A": np.full(2, 4.0, np.float32),
        "alignments3D/split": np.array([0, 1], np.uint32),
    }
    table = opened(write_cs(stacks / "p.cs", columns))[0].table
    assert (table.pose["rot_deg"] + table.pose["psi_deg"])[0] == pytest.approx(40, abs=1e-4)
    assert table.pose["tilt_deg"].tolist() == pytest.approx([0, 30], abs=1e-4)
    assert (table.pose["origin_x_angstrom"][0], table.pose["origin_y_angstrom"][0]) == (6.0, -8.0)
    assert table.half_set.tolist() == [1, 2]


def test_ctfs_and_poses_of_cryodrgn(stacks):
    ctf = np.array([[SIDE, 1.25, 2e4 + i, 1.9e4, 45, 200, 2.0, 0.07, 0] for i in range(5)])
    rotation = np.tile(np.diag([-1.0, -1.0, 1.0]), (5, 1, 1))
    (stacks / "ctf.pkl").write_bytes(pickle.dumps(ctf))
    (stacks / "pose.pkl").write_bytes(pickle.dumps((rotation, np.full((5, 2), 0.25))))
    table = opened(stacks / "a.mrcs", ctf=stacks / "ctf.pkl", poses=stacks / "pose.pkl")[0].table
    assert table.pixel_size_angstrom.tolist() == [1.25] * 5 and table.ctf["defocus_u_angstrom"][3] == 20003
    assert table.ctf["voltage_kv"][0] == 200 and table.ctf["phase_shift_deg"][0] == 0
    assert abs(table.pose["psi_deg"][0]) == 180 and table.pose["origin_x_angstrom"][0] == 0.25 * SIDE * 1.25
    (stacks / "ctf.pkl").write_bytes(pickle.dumps(ctf[:4]))
    with pytest.raises(DataError, match=r"\(4, 9\) instead of \(5, 9\)"):
        opened(stacks / "a.mrcs", ctf=stacks / "ctf.pkl")
    (stacks / "ctf.pkl").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(DataError, match="no pickle of NumPy arrays alone"):
        opened(stacks / "a.mrcs", ctf=stacks / "ctf.pkl")


def test_subsets(tmp_path):
    rows = subset_rows("30", 100, seed=2)
    assert len(np.unique(rows)) == 30 and rows.tolist() == subset_rows("30", 100, seed=2).tolist()
    assert rows.tolist() != subset_rows("30", 100, seed=3).tolist()
    assert subset_rows("11:13", 100, 1).tolist() == [10, 11, 12] and len(subset_rows("91:", 100, 1)) == 10
    np.save(tmp_path / "i.npy", np.array([5, 3, 3]))
    (tmp_path / "i.pkl").write_bytes(pickle.dumps(np.array([5, 3])))
    (tmp_path / "i.txt").write_text("3 5\n")
    for name in ("i.npy", "i.pkl", "i.txt"):
        assert subset_rows(str(tmp_path / name), 100, 1).tolist() == [3, 5]
        with pytest.raises(DataError, match="beyond the 5 particles"):
            subset_rows(str(tmp_path / name), 5, 1)
    for wrong in ("nowhere.txt", "0", "9:3"):
        with pytest.raises(DataError):
            subset_rows(wrong, 100, 1)


def random_star(generator: np.random.Generator) -> dict[str, list[str]]:
    """A table such as RELION's, of random size, with text, lists, whole and other numbers of many digits."""
    count = int(generator.integers(1, 12))
    words = ["mic_001.mrc", "0012", "[0.1,-2,3e-5]", "a:b;c", "nan", "-0", "1e-30", "000017@x/y.mrcs"]
    table = {"rlnImageName": [f"{i + 1:06d}@a.mrcs" for i in generator.integers(0, 5, count)]}
    table |= {f"rlnDefocus{name}": [f"{v:.3f}" for v in generator.uniform(5e3, 3e4, count)] for name in ("U", "V")}
    table["rlnDefocusAngle"] = [repr(float(v)) for v in generator.uniform(-180, 180, count)]
    for number in range(int(generator.integers(0, 6))):
        table[f"rlnOther{number}"] = [str(word) for word in generator.choice(words, count)]
    return table


@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_is_what_was_read(stacks, seed):
    """read(write(x)) == x for random tables: poses come back, everything else is the same text."""
    generator = np.random.default_rng(seed)
    optics = bool(seed % 2)
    columns = random_star(generator)
    extra = {name: values for name, values in columns.items() if name != "rlnImageName"}
    path = write_star(stacks / "x.star", columns["rlnImageName"], optics, **extra)
    star = read_star_file(path)
    count = len(columns["rlnImageName"])
    rows = generator.permutation(count)[: int(generator.integers(1, count + 1))]
    angles = {name: generator.uniform(1, 179, len(rows)) for name in ("rot_deg", "tilt_deg", "psi_deg")}
    pixels = {f"origin_{axis}_px": generator.normal(0, 3, len(rows)) for axis in "xy"}
    poses = angles | pixels | {f"origin_{axis}_angstrom": 2.0 * pixels[f"origin_{axis}_px"] for axis in "xy"}
    write_star_poses(stacks / "y.star", star, rows, poses)
    again = read_star_file(stacks / "y.star")
    assert list(again.blocks) == list(star.blocks)
    for name in star.table():
        assert again.table()[name].astype(str).tolist() == star.table()[name].iloc[rows].astype(str).tolist(), name
    if optics:
        assert again.optics_table().equals(star.optics_table())
    findings = Findings()
    table = particles_from_star(again, findings)
    assert not findings.errors
    for name in ("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom"):
        np.testing.assert_allclose(table.pose[name], poses[name], atol=2e-6)
    # pixels where the file is of RELION 3.0, angstrom where it has optics groups
    assert ("rlnOriginX" in again.table()) == (not optics)


def test_starfile_itself_reads_what_we_write(stacks):
    star = read_star_file(write_star(stacks / "x.star", NAMES))
    zero = {name: np.zeros(3) for name in ("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom")}
    write_star_poses(stacks / "y.star", star, np.arange(3), zero)
    blocks = starfile.read(stacks / "y.star")
    assert blocks["particles"]["rlnImageName"].tolist() == NAMES and blocks["optics"]["rlnVoltage"].tolist() == [300.0]


def test_cryosparc_rows_come_back_with_their_poses(stacks):
    original = read_record_array(write_cs(stacks / "p.cs", cs_columns(4)))
    rows = np.array([3, 1])
    poses = {"rot_deg": np.array([10.0, -50.0]), "tilt_deg": np.array([70.0, 120.0]), "psi_deg": np.array([5.0, 170.0])}
    poses |= {"origin_x_px": np.array([1.0, -2.5]), "origin_y_px": np.array([0.5, 3.0])}
    write_cs_poses(stacks / "q.cs", original, rows, poses | {"pixel_size_angstrom": np.full(2, 2.0)})
    again = read_record_array(stacks / "q.cs")
    for name in original.dtype.names:
        np.testing.assert_array_equal(again[name], original[name][rows], err_msg=name)
    table = opened(stacks / "q.cs")[0].table

    def matrices(angles):
        return rotation_from_relion(*(torch.from_numpy(angles[n]) for n in ("rot_deg", "tilt_deg", "psi_deg")))

    np.testing.assert_allclose(matrices(table.pose), matrices(poses), atol=1e-6)
    assert table.pose["origin_x_angstrom"].tolist() == [2.0, -5.0]


def test_files_of_no_known_kind(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for name, message in (("a.csv", "has no known ending"), ("b.star", "cannot read it"), ("c.txt", "cannot read it")):
        with pytest.raises(DataError, match=message):
            opened(tmp_path / name)
