"""RELION makes images, aceray solves them, RELION makes the map: its programs judge every convention."""

import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

import aceray
from aceray.folder import RunFolder

PROGRAMS = ("relion_project", "relion_reconstruct", "relion_image_handler", "relion_star_handler")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
PARTICLES, BOX, FIELD_A = 2000, 48, 544.0
PIXEL_A = FIELD_A / BOX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install relion)"),
]


def relion(folder: Path, program: str, **options: object) -> str:
    """What `relion_<program>` prints when it runs in a folder; `True` stands for an option without a value."""
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value) if part is not True]
    done = subprocess.run([f"relion_{program}", *given], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr  # warnings are on the second


def random_particles(generator: np.random.Generator) -> dict:
    """Orientations, shifts and defocus for `relion_project`, as tables of a RELION 3.1 STAR file."""
    defocus = generator.uniform(8000, 38000, PARTICLES)
    particles = {
        "rlnImageName": [f"{number + 1:06d}@none.mrcs" for number in range(PARTICLES)],
        "rlnOpticsGroup": 1,
        "rlnAngleRot": generator.uniform(-180, 180, PARTICLES),
        "rlnAngleTilt": np.degrees(np.arccos(generator.uniform(-1, 1, PARTICLES))),
        "rlnAnglePsi": generator.uniform(-180, 180, PARTICLES),
        "rlnOriginXAngst": generator.normal(0, 0.03 * FIELD_A, PARTICLES),
        "rlnOriginYAngst": generator.normal(0, 0.03 * FIELD_A, PARTICLES),
        "rlnDefocusU": defocus,
        "rlnDefocusV": defocus - generator.uniform(0, 500, PARTICLES),
        "rlnDefocusAngle": generator.uniform(0, 180, PARTICLES),
    }
    optics = {"rlnOpticsGroup": [1], "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
    optics |= {"rlnImagePixelSize": PIXEL_A, "rlnImageSize": BOX, "rlnImageDimensionality": 2}
    return {"optics": pd.DataFrame(optics), "particles": pd.DataFrame(particles)}


def images_of_relion(folder: Path) -> Path:
    """A STAR file of noisy projections of 5NRL, with CTFs, shifts and the true poses, by `relion_project`."""
    overrides = f"simulation.box={BOX}", f"simulation.pixel_size_angstrom={PIXEL_A}", "simulation.particles=16"
    aceray.simulate(aceray.load_config("data/spliceosome_32", *overrides, f"data.path={folder / 'molecule'}"))
    generator = np.random.default_rng(5)
    starfile.write(random_particles(generator), folder / "poses.star")
    relion(folder, "project", i="molecule/truth.mrc", ang="poses.star", ctf=True, angpix=PIXEL_A, o="clean")
    images = mrcfile.read(folder / "clean.mrcs")
    noisy = images / images.std() + generator.normal(0, 1, images.shape)
    with mrcfile.new(folder / "noisy.mrcs") as file:
        file.set_data(noisy.astype(np.float32))
        file.set_image_stack()
        file.voxel_size = PIXEL_A
    star = folder / "particles.star"
    star.write_text((folder / "clean.star").read_text().replace("@clean.mrcs", "@noisy.mrcs"))
    return star


def fsc_by_relion(folder: Path, one: str, other: str) -> np.ndarray:
    """The correlation of two maps in each shell, from `relion_image_handler`."""
    printed = relion(folder, "image_handler", i=one, fsc=other)
    rows = [line.split() for line in printed.splitlines()]
    return np.array([float(row[3]) for row in rows if len(row) == 4 and row[0].isdigit()])


def agreement_of_maps(folder: Path, poses: str) -> tuple[str, np.ndarray]:
    """What `relion_reconstruct` says of a STAR file; FSC of its map and aceray's in the shells below Nyquist."""
    said = relion(folder, "reconstruct", i=f"{poses}.star", ctf=True, o=f"{poses}.mrc")
    scale = {"angpix": PIXEL_A, "rescale_angpix": FIELD_A / 32, "new_box": 32}
    relion(folder, "image_handler", i=f"{poses}.mrc", o=f"{poses}_32.mrc", **scale)
    return said, fsc_by_relion(folder, "results/volume.mrc", f"{poses}_32.mrc")[:15]


def mirror_origins(star: Path, changed: Path) -> None:
    """The same poses with the sign of one origin turned, as a wrong convention would have it."""
    tables = starfile.read(star)
    tables["particles"]["rlnOriginXAngst"] *= -1
    starfile.write(tables, changed)


def test_relion_confirms_poses_and_map(tmp_path: Path) -> None:
    aceray.prepare(images_of_relion(tmp_path), tmp_path / "data", box=32, poses="input")
    settings = "name=solved", "resources.workers=0", "tracking.enabled=false", "train.evaluate_every=100000"
    config = aceray.load_config("demo", f"data.path={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}", *settings)
    result = aceray.train(config)
    # The angles and origins that RELION drew its images with are what the poses are compared with.
    mean, median = (result.metrics[f"pose/rotation_sqfrob_{what}"] for what in ("mean", "median"))
    shift = result.metrics["pose/shift_sq_px_median"]
    print(f"\nsquared rotation error {mean:.4f} (mean), {median:.4f} (median); shift error {shift:.4f} px2 (median)")
    assert mean < 0.002 and shift < 0.01

    aceray.export(RunFolder(result.folder).path, tmp_path / "results", spread=True)
    shutil.copy(tmp_path / "results" / "poses.star", tmp_path / "solved.star")  # names are relative to where it runs
    said, agreement = agreement_of_maps(tmp_path, "solved")
    assert "maintain" in said and "acerayPoseSpreadDeg" in said
    mirror_origins(tmp_path / "solved.star", tmp_path / "mistaken.star")
    _, mistaken = agreement_of_maps(tmp_path, "mistaken")
    print(f"FSC with RELION's map, least: {agreement.min():.3f}; with one sign turned {mistaken.min():.3f}")
    assert agreement.min() > 0.99 and mistaken.min() < 0.9

    relion(tmp_path, "star_handler", i="solved.star", select="rlnDefocusU", minval=30000, o="selected.star")
    kept = starfile.read(tmp_path / "selected.star")["particles"]
    assert 0 < len(kept) < PARTICLES and "acerayPoseSpreadDeg" in kept
