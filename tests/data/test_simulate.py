import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from aceray.data import simulate
from aceray.data.particles import CTF_UNITS
from aceray.data.simulate import CtfRanges, Plan, Recipe, plan, simulate_shard
from aceray.em.random import named_generator
from aceray.em.rotation import rotation_from_relion
from aceray.errors import AcerayError, ConfigError, DataError
from tests.data.test_atoms import pdb_text
from tests.references import density as reference

PACKAGE = Path(simulate.__file__).parent.parent
ELEMENTS = {"C": 6, "N": 7, "O": 8, "S": 16}
# strong enough that a wrong sign, axis or order shows: several rings below Nyquist, U and V far apart
CTF = CtfRanges(
    defocus_mean_angstrom=900.0,
    defocus_std_angstrom=200.0,
    defocus_min_angstrom=600.0,
    defocus_max_angstrom=1300.0,
    astigmatism_max_angstrom=500.0,
    b_factor_angstrom_sq=20.0,
)


@pytest.fixture
def molecule(tmp_path) -> str:
    generator = np.random.default_rng(8)
    lines = [(str(generator.choice(list(ELEMENTS))), *generator.normal(0, 4, 3).clip(-9, 9)) for _ in range(60)]
    path = tmp_path / "molecule.pdb"
    path.write_text(pdb_text(*lines))
    return str(path)


def recipe_of(molecule: str, **changes) -> Recipe:
    values = dict(model=molecule, box=16, pixel_size_angstrom=2.5, particles=40, rows_per_shard=16, snr_db=200.0)
    return Recipe(**{**values, "ctf": CTF, "shift_sigma_fraction": 0.05, "image_dtype": "float32", **changes})


def all_images(planned: Plan):
    parts = [simulate_shard(planned, shard) for shard in range(len(planned.recipe.shards))]
    columns = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
    return torch.cat([part[0] for part in parts]), columns


def row_of(columns, index):
    return {name: float(values[index]) for name, values in columns.items()}


def expected_image(planned: Plan, row: dict[str, float], with_ctf: bool = True) -> np.ndarray:
    """Slow twin of one image before the common scale, from the columns that are stored with it."""
    recipe = planned.recipe
    atoms = simulate.read_atoms(recipe.model)
    rotation = reference.rotation_from_angles(row["true_rot_deg"], row["true_tilt_deg"], row["true_psi_deg"])
    position_px = atoms.position_angstrom.numpy() / recipe.pixel_size_angstrom
    width = recipe.density_width_px
    image = reference.projection(position_px, atoms.atomic_number.numpy(), rotation, recipe.box, width)
    shift = -np.array([row["true_origin_x_angstrom"], row["true_origin_y_angstrom"]]) / recipe.pixel_size_angstrom
    b_factor = 0.0 if recipe.ctf is None else recipe.ctf.b_factor_angstrom_sq
    return reference.modulated(image, row if with_ctf else None, shift, recipe.pixel_size_angstrom, b_factor)


# ---- what an image is ---------------------------------------------------------------------------------------------


def test_images_are_the_projections_that_their_columns_describe(molecule):
    """CTF, astigmatism, shift, Euler angles and units against the slow twin, up to one common scale."""
    planned = plan(recipe_of(molecule))
    images, columns = all_images(planned)
    scales = []
    for index in (0, 17, 39):
        expected = expected_image(planned, row_of(columns, index))
        found = images[index].double().numpy()
        scale = np.sum(found * expected) / np.sum(expected**2)
        assert np.linalg.norm(found - scale * expected) < 0.005 * np.linalg.norm(found)
        scales.append(scale)
    assert max(scales) / min(scales) - 1 < 0.002


def test_the_truth_volume_has_the_scale_of_the_images(molecule):
    """Without CTF an image sums to what the volume sums to, and is the volume's own projection."""
    planned = plan(recipe_of(molecule, ctf=None, shift_sigma_fraction=0.0))
    images, columns = all_images(planned)
    assert_close(images.sum((1, 2)), planned.volume.sum().expand(40), rtol=3e-3, atol=0)
    scale = planned.volume.double().sum() / simulate.read_atoms(molecule).atomic_number.sum()
    expected = float(scale) * expected_image(planned, row_of(columns, 3), with_ctf=False)
    assert np.linalg.norm(images[3].double().numpy() - expected) < 0.005 * np.linalg.norm(expected)


def test_untilted_particles_show_the_volume_summed_along_z(molecule, tmp_path):
    table = tmp_path / "poses.parquet"
    pd.DataFrame({name: np.zeros(40) for name in simulate.ANGLES}).to_parquet(table)
    planned = plan(recipe_of(molecule, ctf=None, shift_sigma_fraction=0.0, pose_table=str(table)))
    images, _ = all_images(planned)
    expected = planned.volume.sum(0)
    assert (images[0] - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("ctf", [None, CTF])
def test_clean_images_have_unit_variance_over_the_full_box(molecule, ctf):
    images, _ = all_images(plan(recipe_of(molecule, ctf=ctf, particles=600, rows_per_shard=600)))
    assert float(images.flatten(1).var(dim=1, correction=0).mean()) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 6.0])
def test_the_noise_is_white_and_as_strong_as_the_snr_says(molecule, snr_db):
    clean, _ = all_images(plan(recipe_of(molecule)))
    noisy, _ = all_images(plan(recipe_of(molecule, snr_db=snr_db)))
    noise = (noisy - clean).double()
    sigma = 10 ** (-snr_db / 20)
    assert float(noise.std()) == pytest.approx(sigma, rel=0.02)
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean(0)
    # 40 images: each coefficient's power is known to 16%, the means over halves of the plane to 1%
    assert float(power[:, 4:13].mean() / power[:, [0, 1, 2, 3, 13, 14, 15]].mean()) == pytest.approx(1.0, abs=0.06)
    within_image = noise.flatten(1).std(dim=1)
    assert float(within_image.max() / within_image.min()) < 1.35


def test_one_noise_level_for_the_whole_set(molecule):
    planned = plan(recipe_of(molecule, snr_db=-20.0))
    assert planned.noise_std == pytest.approx(10.0)


# ---- distributions ------------------------------------------------------------------------------------------------


def many(molecule, **changes):
    planned = plan(recipe_of(molecule, particles=4000, rows_per_shard=4000, **changes))
    return planned.recipe, all_images(planned)[1]


def test_poses_are_uniform(molecule):
    _, columns = many(molecule)
    angles = [torch.from_numpy(columns[f"true_{name}"]) for name in simulate.ANGLES]
    rotation = rotation_from_relion(*angles)
    # under the Haar measure entries have mean 0 and variance 1/3, and rows of different axes are uncorrelated
    assert_close(rotation.mean(0), torch.zeros(3, 3).double(), atol=0.04, rtol=0)
    assert_close(rotation.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.025, rtol=0)
    assert_close(rotation.pow(4).mean(0), torch.full((3, 3), 0.2).double(), atol=0.025, rtol=0)


def test_shifts_are_gaussian_and_clipped_at_five_sigma(molecule, monkeypatch):
    recipe, columns = many(molecule)
    origins = np.stack([columns["true_origin_x_angstrom"], columns["true_origin_y_angstrom"]])
    sigma = 0.05 * recipe.box * recipe.pixel_size_angstrom
    assert np.std(origins, axis=1) == pytest.approx([sigma, sigma], rel=0.04)
    assert abs(np.corrcoef(origins)[0, 1]) < 0.06
    monkeypatch.setattr(simulate, "_SHIFT_CLIP_SIGMA", 1.0)
    _, columns = many(molecule)
    assert np.abs(columns["true_origin_x_angstrom"]).max() == pytest.approx(sigma, rel=1e-6)


def test_ctfs_are_drawn_from_their_ranges(molecule):
    _, columns = many(molecule)
    mean = (columns["defocus_u_angstrom"] + columns["defocus_v_angstrom"]) / 2
    difference = columns["defocus_u_angstrom"] - columns["defocus_v_angstrom"]
    assert mean.min() == pytest.approx(600, abs=0.1) and mean.max() == pytest.approx(1300, abs=0.1)
    assert mean.mean() == pytest.approx(905, abs=12)
    assert difference.min() >= 0 and difference.max() < 500.01 and difference.mean() == pytest.approx(250, abs=12)
    angle = columns["astigmatism_deg"]
    assert angle.min() >= 0 and angle.max() <= 180 and angle.mean() == pytest.approx(90, abs=4)
    for name, value in {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}.items():
        assert columns[name] == pytest.approx(value)


def test_half_sets_are_even(molecule):
    _, columns = many(molecule)
    assert np.bincount(columns["half_set"]).tolist() == [0, 2000, 2000]
    assert columns["particle_id"].tolist() == list(range(4000))


# ---- random streams -----------------------------------------------------------------------------------------------


def test_a_shard_depends_on_nothing_but_its_number(molecule):
    planned = plan(recipe_of(molecule, snr_db=0.0))
    first, columns = simulate_shard(planned, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(99)
        simulate_shard(planned, 0)
        again, columns_again = simulate_shard(plan(planned.recipe), 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, again)
    assert all(np.array_equal(columns[name], columns_again[name]) for name in columns)


def test_no_two_particles_share_a_pose_or_noise(molecule):
    images, columns = all_images(plan(recipe_of(molecule, snr_db=-40.0)))
    assert len(np.unique(columns["true_rot_deg"])) == 40
    correlation = torch.corrcoef(images.flatten(1)) - torch.eye(40)
    assert correlation.abs().max() < 0.35


def test_seeds_give_different_sets(molecule):
    first, _ = all_images(plan(recipe_of(molecule, seed=1)))
    second, _ = all_images(plan(recipe_of(molecule, seed=2)))
    assert not torch.isclose(first, second).all(dim=(1, 2)).any()


def test_poses_stay_when_the_ctf_is_left_out(molecule):
    _, first = all_images(plan(recipe_of(molecule)))
    _, second = all_images(plan(recipe_of(molecule, ctf=None, snr_db=0.0)))
    assert np.array_equal(first["true_psi_deg"], second["true_psi_deg"])
    assert np.array_equal(first["true_origin_x_angstrom"], second["true_origin_x_angstrom"])
    assert "defocus_u_angstrom" in first and "defocus_u_angstrom" not in second


def test_streams_of_the_simulation_are_its_own():
    """No generator of training may give what a simulation drew, though both may have the same seed."""
    own = {simulate.POSES, simulate.SHIFTS, simulate.CTFS, simulate.NOISE}
    assert len(own) == 4 and all(purpose.startswith("simulate/") for purpose in own)
    elsewhere = {
        (file.relative_to(PACKAGE), purpose)
        for file in PACKAGE.rglob("*.py")
        if file.name != "simulate.py"
        for purpose in re.findall(r"""named_generator\(\s*f?["']([^"']*)["']""", file.read_text(encoding="utf-8"))
    }
    assert not [where for where, purpose in elsewhere if purpose.startswith("simulate") or purpose in own]
    for package in ("train", "models"):
        for file in (PACKAGE / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert '"simulate/' not in text and "'simulate/" not in text, file
            assert "aceray.data.simulate" not in text, f"{file} imports the simulation"
    draws = [torch.rand(4, generator=named_generator(purpose, 1, 0)) for purpose in sorted(own)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


# ---- tables -------------------------------------------------------------------------------------------------------


def given_poses(count=40):
    generator = np.random.default_rng(2)
    return pd.DataFrame(
        {
            "rot_deg": generator.uniform(-180, 180, count),
            "tilt_deg": generator.uniform(0, 180, count),
            "psi_deg": generator.uniform(-180, 180, count),
        }
    )


def given_ctfs(count=40):
    generator = np.random.default_rng(3)
    fixed = {"voltage_kv": 200.0, "spherical_aberration_mm": 2.0, "amplitude_contrast": 0.07}
    defocus = generator.uniform(700, 1100, count)
    table = pd.DataFrame({"defocus_u_angstrom": defocus, "defocus_v_angstrom": defocus - 80, **fixed})
    return table.assign(astigmatism_deg=generator.uniform(0, 180, count), phase_shift_deg=30.0)


def test_poses_are_the_rows_of_a_table(molecule, tmp_path):
    poses = given_poses(50)
    poses.to_parquet(tmp_path / "poses.parquet")
    planned = plan(recipe_of(molecule, pose_table=str(tmp_path / "poses.parquet")))
    images, columns = all_images(planned)
    for name in simulate.ANGLES:
        np.testing.assert_array_equal(columns[f"true_{name}"], poses[name][:40])
    expected = expected_image(planned, row_of(columns, 20))
    found = images[20].double().numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9999
    assert np.std(columns["true_origin_x_angstrom"]) > 0  # no origins in the table: drawn


def test_origins_and_ctfs_of_tables_are_used(molecule, tmp_path):
    given_poses().assign(origin_x_angstrom=3.0, origin_y_angstrom=-2.0).to_parquet(tmp_path / "poses.parquet")
    given_ctfs().to_parquet(tmp_path / "ctfs.parquet")
    tables = {"pose_table": str(tmp_path / "poses.parquet"), "ctf_table": str(tmp_path / "ctfs.parquet")}
    planned = plan(recipe_of(molecule, ctf=None, **tables))
    images, columns = all_images(planned)
    assert planned.recipe.layout.ctf
    assert set(columns["true_origin_x_angstrom"]) == {3.0} and set(columns["true_origin_y_angstrom"]) == {-2.0}
    for name in CTF_UNITS:
        np.testing.assert_allclose(columns[name], given_ctfs()[name], rtol=1e-6)
    found, expected = images[7].double().numpy(), expected_image(planned, row_of(columns, 7))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9999


def test_a_star_file_serves_as_a_table(molecule, tmp_path):
    rows = [f"{10 + i} {20 + i} {30 + i} {i / 10} {-i / 10} 1" for i in range(40)]
    names = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup"]
    head = "data_particles\n\nloop_\n" + "".join(f"_{name}\n" for name in names)
    (tmp_path / "poses.star").write_text(head + "\n".join(rows) + "\n")
    _, columns = all_images(plan(recipe_of(molecule, pose_table=str(tmp_path / "poses.star"))))
    assert columns["true_tilt_deg"][5] == 25 and columns["true_origin_y_angstrom"][5] == -0.5


def test_a_star_file_of_relion_3_0_serves_as_a_table_of_ctfs(molecule, tmp_path):
    names = ["DefocusU", "DefocusV", "DefocusAngle", "Voltage", "SphericalAberration", "AmplitudeContrast", "OriginX"]
    rows = [f"{9000 + 10 * i} {8000 + 10 * i} {i} 300 2.0 0.1 {i}" for i in range(40)]
    head = "data_\n\nloop_\n" + "".join(f"_rln{name} #{1 + i}\n" for i, name in enumerate(names))
    (tmp_path / "old.star").write_text(head + "\n".join(rows) + "\n")
    _, columns = all_images(plan(recipe_of(molecule, ctf=None, ctf_table=str(tmp_path / "old.star"))))
    np.testing.assert_array_equal(columns["defocus_u_angstrom"], 9000 + 10 * np.arange(40))
    np.testing.assert_array_equal(columns["astigmatism_deg"], np.arange(40))
    assert set(columns["spherical_aberration_mm"]) == {2.0} and set(columns["phase_shift_deg"]) == {0.0}


def test_a_missing_table_of_ctfs_says_where_one_is(molecule, tmp_path):
    with pytest.raises(DataError, match=r"simulation\.ctf_table: .*gone\.star is not there; .*EMPIAR-10028") as caught:
        plan(recipe_of(molecule, ctf=None, ctf_table=str(tmp_path / "gone.star")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:39], r"has 39 rows for 40 particles; set simulation\.particles=39 or less"),
        (lambda table: table.drop(columns="tilt_deg"), "lacks the column tilt_deg"),
        (lambda table: table.assign(psi_deg=np.nan), "column psi_deg holds a value that is not a finite number"),
        (lambda table: table.assign(psi_deg="north"), "cannot be read as Parquet or STAR"),
    ],
)
def test_a_table_that_cannot_serve_is_named(molecule, tmp_path, change, message):
    change(given_poses()).to_parquet(tmp_path / "poses.parquet")
    with pytest.raises(DataError, match=message) as caught:
        plan(recipe_of(molecule, pose_table=str(tmp_path / "poses.parquet")))
    assert "poses.parquet" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("gone.parquet", None), ("gone.star", None), ("text.parquet", "hello")])
def test_an_unreadable_table_is_named(molecule, tmp_path, name, content):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: cannot"):
        plan(recipe_of(molecule, pose_table=str(tmp_path / name)))


# ---- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snr_db": math.nan}, r"simulation\.snr_db: nan is not a finite number of decibels"),
        ({"snr_db": math.inf}, r"simulation\.snr_db: inf is not a finite"),
        ({"box": 15}, r"simulation\.box: 15 is not an even number"),
        ({"box": 4}, r"simulation\.box: 4"),
        ({"pixel_size_angstrom": 0.0}, r"pixel_size_angstrom: 0\.0 is not a positive number"),
        ({"density_width_px": -1.0}, "density_width_px"),
        ({"shift_sigma_fraction": -0.1}, "shift_sigma_fraction"),
        ({"particles": 0}, "particles: 0 is less than one"),
        ({"rows_per_shard": 0}, "rows_per_shard"),
        ({"image_dtype": "int8"}, "image_dtype: int8 is neither"),
    ],
)
def test_values_without_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere.pdb"}, r"nowhere\.pdb: there is no such file"),
        ({"box": 8}, "choose a box of"),
    ],
)
def test_a_model_that_cannot_be_used_stops_the_plan(molecule, change, message):
    with pytest.raises(AcerayError, match=message):
        plan(recipe_of(molecule, **change))


def test_the_shards_are_all_particles_in_order(molecule):
    recipe = recipe_of(molecule)
    assert recipe.shards == [range(0, 16), range(16, 32), range(32, 40)]
    large = Recipe(box=256, particles=10_000, rows_per_shard=10_000)
    assert max(len(rows) for rows in large.shards) * large.layout.image_bytes <= 2**28


def test_the_digest_depends_on_every_value_and_on_the_files(molecule, tmp_path):
    recipe = recipe_of(molecule)
    digests = {recipe.sha256(), recipe_of(molecule).sha256()}
    assert len(digests) == 1
    changes = {"box": 18, "seed": 5, "snr_db": 1.0, "ctf": None, "image_dtype": "float16", "particles": 41}
    for name, value in changes.items():
        digests.add(dataclasses.replace(recipe, **{name: value}).sha256())
    digests.add(dataclasses.replace(recipe, ctf=dataclasses.replace(CTF, voltage_kv=200.0)).sha256())
    Path(molecule).write_text(Path(molecule).read_text() + "REMARK changed\n")
    digests.add(recipe.sha256())
    assert len(digests) == 9
