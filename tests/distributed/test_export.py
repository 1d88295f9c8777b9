"""Results in other programs' terms, and poses for new particles by a trained encoder."""

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch

import aceray
from aceray.data.cryosparc import read_record_array
from aceray.data.mrc import write_volume
from aceray.data.original import read_original_poses
from aceray.data.particle_table import Findings
from aceray.data.particles import open_particles, stack_from_table
from aceray.data.source import SourceFiles, open_source
from aceray.data.star import read_star_file
from aceray.distributed.results import write_poses
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_relion, rotation_sqfrob
from aceray.errors import DataError
from aceray.folder import create_run_folder
from aceray.train.predict import Poses
from tests.data.inputs import cs_columns, some_images, write_cs, write_stack, write_star
from tests.distributed.particles import write_particles

ANGLES = ("rot_deg", "tilt_deg", "psi_deg")
COUNT = 40


def finished_run(tmp_path, dataset) -> tuple[object, Poses]:
    """A run folder with a volume and random poses of the dataset's particles, as training would leave it."""
    manifest = open_particles(dataset).manifest
    folder = create_run_folder(aceray.load_config(f"data.path={dataset}", f"runs={tmp_path / 'runs'}", "name=r"))
    folder.write_notes(dataset_sha256=manifest.sha256)
    generator = named_generator("tests/export", 1)
    rotation = random_rotations(manifest.particles, generator)
    shift_px = torch.randn(manifest.particles, 2, generator=generator)
    poses = Poses(torch.arange(manifest.particles), rotation, shift_px, torch.rand(manifest.particles))
    write_poses(folder, poses, manifest.pixel_size_angstrom)
    write_volume(folder.volume, torch.randn(12, 12, 12), manifest.pixel_size_angstrom * manifest.box / 12)
    folder.fsc.write_text("shell,fsc\n1,1.0\n")
    return folder, poses


def rows_by_name(particles, names):
    """Places in the dataset of images by the names that the STAR file has for them."""
    table = particles.read(particles.row_groups(), ["stack_name", "stack_index"]).to_pandas()
    known = {f"{index + 1:06d}@{name}": row for row, (name, index) in enumerate(zip(*table.to_numpy().T, strict=True))}
    return [known[f"{int(name.split('@')[0]):06d}@{name.split('@')[1]}"] for name in names]


@pytest.mark.parametrize("optics", [True, False])
def test_exported_poses_refer_to_the_original_particles(tmp_path, optics):
    """A 24-px stack of 2 A, cropped to 12 px of 4 A: names, order, columns and angstroms are those of the STAR file."""
    write_stack(tmp_path / "a.mrcs", some_images(COUNT, side=24))
    names = [f"{index + 1}@a.mrcs" for index in np.random.default_rng(0).permutation(COUNT)]
    extra = {"rlnCoordinateX": [f"{value}.50" for value in range(COUNT)], "rlnGroupName": ["007"] * COUNT}
    extra |= {"rlnOriginX": [99.0] * COUNT, "rlnOriginY": [99.0] * COUNT} if not optics else {}
    star = write_star(tmp_path / "p.star", names, optics, **extra)
    dataset = aceray.prepare(star, tmp_path / "set", box=12, subset="1:30").path
    folder, poses = finished_run(tmp_path, dataset)
    exported = aceray.export(folder.path, tmp_path / "out")
    assert set(exported.paths) == {"volume", "fsc", "poses.star", "poses.cs", "poses.parquet"}
    before, after = read_star_file(star), read_star_file(tmp_path / "out" / "poses.star")
    found = after.table()
    assert sorted(found["rlnImageName"]) == sorted(names[:30])
    if optics:
        assert after.optics_table().equals(before.optics_table())
    merged = before.table().merge(found, on="rlnImageName", suffixes=("", "_after"))
    for name in ("rlnCoordinateX", "rlnGroupName", "rlnDefocusU"):
        assert (merged[name] == merged[f"{name}_after"]).all()
    rows = rows_by_name(open_particles(dataset), found["rlnImageName"])
    angles = [
        torch.tensor(found[name].astype(float).to_numpy()) for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    ]
    torch.testing.assert_close(rotation_from_relion(*angles).float(), poses.rotation[rows], atol=1e-4, rtol=0)
    # 4 A of the stored images; the old file counts pixels of the original 2 A
    columns, unit = (("rlnOriginXAngst", "rlnOriginYAngst"), 4.0) if optics else (("rlnOriginX", "rlnOriginY"), 2.0)
    origin = torch.tensor(found[list(columns)].astype(float).to_numpy()).float()
    torch.testing.assert_close(origin, -poses.shift_px[rows] * unit, atol=1e-4, rtol=1e-4)
    # our own reader understands both files alike
    again = open_source(SourceFiles(tmp_path / "out" / "poses.star", datadir=tmp_path), Findings()).table
    as_cs = open_source(SourceFiles(tmp_path / "out" / "poses.cs", datadir=tmp_path), Findings()).table
    for name in ("origin_x_angstrom", "origin_y_angstrom"):
        np.testing.assert_allclose(again.pose[name], as_cs.pose[name], atol=1e-4)
    assert [again.label(row) for row in range(30)] == [as_cs.label(row) for row in range(30)]
    np.testing.assert_allclose(again.ctf["defocus_v_angstrom"], as_cs.ctf["defocus_v_angstrom"])


def test_the_exported_map_has_its_voxel_size_and_origin(tmp_path):
    write_stack(tmp_path / "a.mrcs", some_images(COUNT, side=24), pixel_size=1.5)
    dataset = aceray.prepare(tmp_path / "a.mrcs", tmp_path / "set", box=16).path
    folder, _ = finished_run(tmp_path, dataset)
    (folder.path / "half_1.mrc").write_bytes(folder.volume.read_bytes())
    exported = aceray.export(folder.path, tmp_path / "out")
    assert "half_1" in exported.paths
    with mrcfile.open(exported.paths["volume"]) as file:
        assert file.voxel_size.x == pytest.approx(24 * 1.5 / 12) and file.is_volume()
        assert [float(file.header.origin[axis]) for axis in "xyz"] == [0, 0, 0]
        assert [int(file.header[name]) for name in ("nxstart", "nystart", "nzstart")] == [0, 0, 0]
    # a stack without a STAR file gets one of RELION 3.1 that names it, in its own pixel size
    found = read_star_file(exported.paths["poses.star"])
    assert found.optics_table()["rlnImagePixelSize"].astype(float).tolist() == [1.5]
    assert found.optics_table()["rlnImageSize"].tolist() == ["24"] and len(found.table()) == COUNT
    aceray.export(folder.path, tmp_path / "out")  # again, over its own files
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"holds thesis\.tex"):
        aceray.export(folder.path, tmp_path / "out")
    folder.volume.unlink()
    with pytest.raises(DataError, match="no volume and poses yet"):
        aceray.export(folder.path, tmp_path / "other")


def test_cryosparc_rows_keep_their_columns(tmp_path):
    write_stack(tmp_path / "a.mrcs", some_images(COUNT, side=24))
    columns = cs_columns(COUNT, ">a.mrcs") | {"location/micrograph_uid": np.arange(COUNT, dtype=np.uint64) * 7}
    cs = write_cs(tmp_path / "p.cs", columns)
    dataset = aceray.prepare(cs, tmp_path / "set", box=12).path
    folder, _ = finished_run(tmp_path, dataset)
    aceray.export(folder.path, tmp_path / "out")
    before, after = read_record_array(cs), read_record_array(tmp_path / "out" / "poses.cs")
    after = after[np.argsort(after["uid"])]
    for name in before.dtype.names:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert after["alignments3D/psize_A"].tolist() == [2.0] * COUNT
    # both files name the same images, the STAR file without cryoSPARC's mark
    star = tmp_path / "out" / "poses.star"
    assert sorted(read_star_file(star).table()["rlnImageName"])[0] == "000001@a.mrcs"
    by_star, by_cs = (read_original_poses(path, open_particles(dataset)) for path in (star, star.with_suffix(".cs")))
    torch.testing.assert_close(by_star[0], by_cs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(by_star[1], by_cs[1], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """1,024 projections as a stack and a STAR file, prepared, and a short run on them with shifts."""
    path = tmp_path_factory.mktemp("trained")
    particles = write_particles(path / "simulated")
    stack = stack_from_table(particles.read(particles.row_groups()), particles.manifest, 16)
    write_stack(path / "p.mrcs", stack.images.numpy())
    star = write_star(path / "p.star", [f"{index + 1}@p.mrcs" for index in range(1024)])
    aceray.prepare(star, path / "set")
    result = aceray.train(
        aceray.load_config(
            f"data.path={path / 'set'}", f"runs={path / 'runs'}", "name=r", "tracking.enabled=false", "train.steps=30",
            "refine=null",
            "train.batch=32", "encoder.width=32", "encoder.depth=2", "optim.warmup_steps=5", "train.threads=1",
            "data.shift_sigma_fraction=0.02",
        )
    )  # fmt: skip
    return path, star, result


def poses_of(path) -> tuple[pd.DataFrame, torch.Tensor]:
    table = pd.read_parquet(path).sort_values("source_row").reset_index(drop=True)
    return table, rotation_from_relion(*(torch.tensor(table[name].to_numpy()) for name in ANGLES))


def own_poses(path, result) -> tuple[pd.DataFrame, torch.Tensor]:
    """The run's own poses in the order of the STAR file."""
    dataset = open_particles(path / "set")
    table = result.poses.assign(source_row=dataset.read(dataset.row_groups(), ["source_row"])["source_row"].to_numpy())
    table = table.sort_values("source_row").reset_index(drop=True)
    return table, rotation_from_relion(*(torch.tensor(table[name].to_numpy()) for name in ANGLES))


@pytest.mark.parametrize("kind", ["star", "dataset"])
def test_training_particles_get_the_poses_that_the_run_gave_them(trained, tmp_path, kind):
    path, star, result = trained
    source = star if kind == "star" else path / "set"
    seen = []
    found = aceray.predict(result.folder, source, tmp_path / "out", seen.append, eightfold=False)
    assert (found.particles, found.refused) == (1024, 0) and seen[-1].done == seen[-1].particles == 1024
    assert set(found.paths) == {"poses.star", "poses.cs", "poses.parquet"} and found.particles_per_second > 0
    table, rotation = poses_of(found.paths["poses.parquet"])
    expected, rotation_before = own_poses(path, result)
    # stored pixels are float16, those of the stack float32: a few images choose another of the heads
    assert float((rotation_sqfrob(rotation, rotation_before) < 1e-3).double().mean()) > 0.98
    for name in ("origin_x_angstrom", "origin_y_angstrom"):
        np.testing.assert_allclose(table[name], expected[name], atol=0.05)
        assert table[name].std() > 0
    names = read_star_file(found.paths["poses.star"]).table()["rlnImageName"].tolist()
    assert sorted(names) == sorted(f"{index + 1}@p.mrcs" for index in range(1024))


def test_new_particles_in_part_and_with_bad_images(trained, tmp_path):
    path, _, result = trained
    images = np.array(mrcfile.read(path / "p.mrcs"))[100:140]
    images[3] = 0.0
    write_stack(tmp_path / "q.mrcs", images)
    starts = {"rlnDefocusU": 15100.0, "rlnDefocusV": 14100.0}
    defocus = {name: [low + index for index in range(40)] for name, low in starts.items()}
    star = write_star(tmp_path / "q.star", [f"{index + 1}@q.mrcs" for index in range(40)], **defocus)
    found = aceray.predict(result.folder, star, tmp_path / "out", eightfold=False)
    assert (found.particles, found.refused) == (39, 1)
    table, rotation = poses_of(found.paths["poses.parquet"])
    assert table["source_row"].tolist() == [row for row in range(40) if row != 3]
    _, before = own_poses(path, result)
    rows = 100 + table["source_row"].to_numpy()
    assert float((rotation_sqfrob(rotation, before[rows]) < 1e-3).double().mean()) > 0.9


def test_particles_that_do_not_fit_the_run(trained, tmp_path):
    path, star, result = trained
    with pytest.raises(DataError, match=r"64\.0 A wide, those the run was trained on 32\.0 A"):
        aceray.predict(result.folder, star, tmp_path / "out", pixel_size=4.0)
    with pytest.raises(DataError, match="has no CTFs"):
        aceray.predict(result.folder, path / "p.mrcs", tmp_path / "out", pixel_size=2.0)
    with pytest.raises(DataError, match="not the folder of a run"):
        aceray.predict(tmp_path, star, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_ray_datas_actors_give_the_same_poses(trained, tmp_path):
    _, star, result = trained
    here = aceray.predict(result.folder, star, tmp_path / "here")
    there = aceray.predict(result.folder, star, tmp_path / "there", workers=1)
    (first, rotation), (second, other) = (poses_of(each.paths["poses.parquet"]) for each in (here, there))
    torch.testing.assert_close(rotation, other, atol=1e-3, rtol=0)
    np.testing.assert_allclose(first["residual"], second["residual"], rtol=1e-3)
    np.testing.assert_allclose(first["pose_spread_deg"], second["pose_spread_deg"], atol=0.1)


def test_the_spread_of_eight_views_goes_with_the_poses(trained, tmp_path):
    """In every file, particle by particle, of new particles as of the run's own; files without it lose the column."""
    path, star, result = trained
    found = aceray.predict(result.folder, star, tmp_path / "out")
    assert found.method == "encoder, the best of eight turns and mirrors"
    table = pd.read_parquet(found.paths["poses.parquet"])
    spread = table["pose_spread_deg"].to_numpy()
    assert spread.min() > 0 and spread.max() <= 180 and spread.std() > 1
    rows = read_star_file(found.paths["poses.star"]).table()
    assert [int(name.split("@")[0]) - 1 for name in rows["rlnImageName"]] == table["stack_index"].tolist()
    np.testing.assert_allclose(rows["acerayPoseSpreadDeg"].astype(float), spread, atol=1e-3)
    np.testing.assert_allclose(read_record_array(found.paths["poses.cs"])["aceray/pose_spread_deg"], spread, rtol=1e-5)
    own = aceray.export(result.folder, tmp_path / "own", spread=True)
    again = pd.read_parquet(own.paths["poses.parquet"]).sort_values("source_row")["pose_spread_deg"]
    # float16 on disk
    np.testing.assert_allclose(again, table.sort_values("source_row")["pose_spread_deg"], atol=5.0)
    without = aceray.predict(result.folder, own.paths["poses.star"], tmp_path / "x", datadir=str(path), eightfold=False)
    assert "acerayPoseSpreadDeg" not in read_star_file(without.paths["poses.star"]).table()
    with pytest.raises(DataError, match="has no refined map"):
        aceray.predict(result.folder, star, tmp_path / "y", refine=True)


def test_the_runs_own_star_file_names_the_original_particles(trained):
    _, star, result = trained
    before, after = read_star_file(star), read_star_file(result.paths["poses_star"])
    assert after.optics_table().equals(before.optics_table())
    assert sorted(after.table()["rlnImageName"]) == sorted(before.table()["rlnImageName"])


@pytest.mark.parametrize("name", ["poses.star", "poses.cs"])
def test_poses_of_another_program_are_matched_by_name(trained, tmp_path, name):
    """The set is permuted: rows go to their particles by stack and number, in whatever order the file has them."""
    path, _, result = trained
    exported = aceray.export(result.folder, tmp_path / "out")
    rotation, shift_px, number = read_original_poses(exported.paths[name], open_particles(path / "set"))
    assert number.tolist() == list(range(1024))
    table = result.poses
    own = rotation_from_relion(*(torch.tensor(table[angle].to_numpy()) for angle in ANGLES)).float()
    torch.testing.assert_close(rotation, own, atol=1e-4, rtol=0)
    origin = torch.tensor(table[["origin_x_angstrom", "origin_y_angstrom"]].to_numpy()).float()
    torch.testing.assert_close(-shift_px * 2.0, origin, atol=1e-4, rtol=0)


def test_poses_of_other_images_are_refused(trained, tmp_path):
    path, _, _ = trained
    angles = {name: [1.0, 2.0] for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")}
    dataset = open_particles(path / "set")
    for names in (["1@p.mrcs", "1@q.mrcs"], ["1@p.mrcs", "1025@p.mrcs"], ["5@p.mrcs", "5@p.mrcs"]):
        with pytest.raises(DataError, match="does not hold, or an image twice"):
            read_original_poses(write_star(tmp_path / "x.star", names, **angles), dataset)
    with pytest.raises(DataError, match="lacks poses"):
        read_original_poses(write_star(tmp_path / "x.star", ["1@p.mrcs"]), dataset)


def test_a_simulated_set_is_a_stack_of_its_own_name(tmp_path):
    dataset = write_particles(tmp_path / "blobs").path
    folder, poses = finished_run(tmp_path, dataset)
    exported = aceray.export(folder.path, tmp_path / "out")
    found = read_star_file(exported.paths["poses.star"]).table()
    assert found["rlnImageName"][7] == "000008@blobs.mrcs"
    assert float(found["rlnOriginXAngst"][7]) == pytest.approx(-4.0 * float(poses.shift_px[7, 0]), abs=1e-5)
