"""STAR files of RELION 3.0 to 5, Scipion and others: their tables, as text and as typed columns; and written back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import starfile
from jaxtyping import Float, Int

from aceray.data.location import Location
from aceray.data.particle_table import Findings, ParticleTable
from aceray.data.storage import local_copy, storage_error, written_atomically
from aceray.errors import DataError

ANGLES = {"rlnAngleRot": "rot_deg", "rlnAngleTilt": "tilt_deg", "rlnAnglePsi": "psi_deg"}
ORIGINS = {"rlnOriginXAngst": "origin_x_angstrom", "rlnOriginYAngst": "origin_y_angstrom"}
OLD_ORIGINS = {"rlnOriginX": "origin_x_angstrom", "rlnOriginY": "origin_y_angstrom"}
DEFOCUS = {
    "rlnDefocusU": "defocus_u_angstrom",
    "rlnDefocusV": "defocus_v_angstrom",
    "rlnDefocusAngle": "astigmatism_deg",
    "rlnPhaseShift": "phase_shift_deg",
}
MICROSCOPE = {
    "rlnVoltage": "voltage_kv",
    "rlnSphericalAberration": "spherical_aberration_mm",
    "rlnAmplitudeContrast": "amplitude_contrast",
}
# not one of RELION's: it says so, and keeps the column as text ("will ignore (but maintain)", its metadata_table.cpp)
SPREAD = "acerayPoseSpreadDeg"
# aberrations that RELION corrects for and aceray does not
_NOT_USED = ("rlnBeamTiltX", "rlnBeamTiltY", "rlnOddZernike", "rlnEvenZernike", "rlnMagMat00")


@dataclass(frozen=True)
class StarFile:
    """All blocks of a STAR file, in their order, every value as the text that was there.

    A block is a table, or a mapping where it is no loop. `particles` and `optics` name the blocks that are these.
    """

    path: Location
    blocks: Mapping[str, Any]
    particles: str
    optics: str | None

    def table(self) -> pd.DataFrame:
        """The particle table as text."""
        return self.blocks[self.particles]

    def optics_table(self) -> pd.DataFrame | None:
        """The optics table as text, one row a group."""
        found = None if self.optics is None else self.blocks[self.optics]
        return found if found is None or isinstance(found, pd.DataFrame) else pd.DataFrame([found])


def read_star_file(path: Location) -> StarFile:
    """Read a STAR file. The particles are the block of that name, else the largest that has rlnImageName or is alone.

    Raises DataError when the file is missing, is no STAR file, or holds no particles.
    """
    try:
        with local_copy(path) as copy, open(copy, encoding="utf-8") as stream:
            labels = {line.split()[0][1:] for line in stream if line.startswith("_")}
            blocks: dict[str, Any] = dict(starfile.read(copy, always_dict=True, parse_as_string=sorted(labels)))  # pyright: ignore
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a STAR file ({error}); check it.") from error
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame) and block.columns.has_duplicates:
            twice = block.columns[block.columns.duplicated()][0]
            raise DataError(f"{path}: block data_{name} has the column {twice} twice; correct the file.")
    optics = next((name for name in blocks if name.lower() == "optics"), None)
    tables = {name: len(block) for name, block in blocks.items() if isinstance(block, pd.DataFrame) and name != optics}
    named = [name for name in tables if name.lower() == "particles"]
    images = [name for name in tables if "rlnImageName" in blocks[name]]
    alone = list(tables) if len(blocks) == 1 else []
    candidates = named or images or alone
    if not candidates or len(blocks[max(candidates, key=tables.__getitem__)].columns) == 0:
        raise DataError(f"{path}: holds no block data_particles; aceray needs a particle STAR file.")
    return StarFile(path, blocks, max(candidates, key=tables.__getitem__), optics)


def joined(star: StarFile) -> pd.DataFrame:
    """The particle table with the columns of each particle's optics group, numbers as numbers where all are.

    What the group says wins over a column of the same name in the particle table, as in RELION. Raises DataError when
    a particle names no group, or one that is not described.
    """
    particles = star.table().apply(_numbers)
    optics = star.optics_table()
    if optics is None:
        return particles
    optics = optics.apply(_numbers)
    for name, table in (("data_optics", optics), (f"block data_{star.particles}", particles)):
        if "rlnOpticsGroup" not in table:
            raise DataError(f"{star.path}: {name} lacks the column rlnOpticsGroup; write the file again.")
    optics = optics.drop_duplicates("rlnOpticsGroup").set_index("rlnOpticsGroup")
    unknown = sorted(set(particles["rlnOpticsGroup"]) - set(optics.index), key=str)
    if unknown:
        raise DataError(f"{star.path}: optics group {unknown[0]} is used but not in data_optics; correct the file.")
    return particles.drop(columns=[name for name in optics if name in particles]).join(optics, on="rlnOpticsGroup")


def _numbers(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def particles_from_star(star: StarFile, findings: Findings) -> ParticleTable:
    """The typed table of a STAR file; what is wrong goes to `findings`.

    Pixel size: rlnImagePixelSize, or 1e4 rlnDetectorPixelSize / rlnMagnification, or rlnPixelSize. A missing phase
    shift is zero. Raises DataError when there is no rlnImageName.
    """
    table = joined(star)
    if "rlnImageName" not in table or len(table) == 0:
        raise DataError(f"{star.path}: lists no images (rlnImageName); give the STAR file of particles.")
    names, stack, index = _image_names(star.path, table["rlnImageName"], findings)
    pixel_size = _pixel_size(star.path, table, findings)
    half = _column(star.path, table, "rlnRandomSubset", findings)
    for name in _NOT_USED:
        if name in table and not (table[name].astype(str).isin(["0", "0.0", "1.0", "1", "[]"])).all():
            findings.warnings.append(f"{star.path}: {name} is not used; correct for it in RELION if it is large.")
            break
    return ParticleTable(
        stack_names=names,
        stack=stack,
        stack_index=index,
        source_row=np.arange(len(table)),
        pixel_size_angstrom=pixel_size,
        ctf=_ctf(star.path, table, findings),
        pose=_pose(star.path, table, pixel_size, findings),
        half_set=None if half is None else half.astype(np.int64),
    )


def _image_names(
    path: Location, column: pd.Series, findings: Findings
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Stacks, the stack of each particle and its place there from 0; a name without a number is a file of one image."""
    parts = column.astype(str).str.extract(r"^(?:\s*(\d+)@)?(.+)$")
    unnamed = parts[1].isna()
    if unnamed.any():
        findings.errors.append(f"{path}: row {int(unnamed.to_numpy().argmax()) + 1} has no image name; correct it.")
    codes, names = pd.factorize(parts[1].fillna(""))
    number = pd.to_numeric(parts[0].fillna("1")).to_numpy(dtype=np.int64)
    return tuple(str(name) for name in names), codes.astype(np.int64), number - 1


def _pixel_size(path: Location, table: pd.DataFrame, findings: Findings) -> Float[np.ndarray, "n"]:
    if "rlnImagePixelSize" in table:
        found = _column(path, table, "rlnImagePixelSize", findings)
    elif {"rlnMagnification", "rlnDetectorPixelSize"} <= set(table):
        magnification = _column(path, table, "rlnMagnification", findings)
        detector = _column(path, table, "rlnDetectorPixelSize", findings)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = None if magnification is None or detector is None else 1e4 * detector / magnification
    else:
        found = _column(path, table, "rlnPixelSize", findings)
    return np.full(len(table), np.nan) if found is None else found


def _ctf(path: Location, table: pd.DataFrame, findings: Findings) -> dict[str, np.ndarray] | None:
    if "rlnDefocusU" not in table:
        return None
    found = {}
    for name, ours in (DEFOCUS | MICROSCOPE).items():
        if name == "rlnPhaseShift" and name not in table:
            found[ours] = np.zeros(len(table))
        elif name not in table:
            findings.errors.append(
                f"{path}: has defoci but no {name}; add it to data_optics or to every row, or estimate CTFs again."
            )
        elif (values := _column(path, table, name, findings)) is not None:
            found[ours] = values
    return found if len(found) == len(DEFOCUS | MICROSCOPE) else None


def _pose(
    path: Location, table: pd.DataFrame, pixel_size: np.ndarray, findings: Findings
) -> dict[str, np.ndarray] | None:
    if not set(ANGLES) <= set(table):
        return None
    found = {ours: _column(path, table, name, findings) for name, ours in ANGLES.items()}
    for (new, ours), old in zip(ORIGINS.items(), OLD_ORIGINS, strict=True):
        origin = _column(path, table, new, findings)
        pixels = _column(path, table, old, findings) if origin is None else None
        found[ours] = origin if pixels is None else pixels * pixel_size
        if found[ours] is None:
            found[ours] = np.zeros(len(table))
    known = {name: values for name, values in found.items() if values is not None}
    return known if len(known) == len(found) else None


def _column(path: Location, table: pd.DataFrame, name: str, findings: Findings) -> Float[np.ndarray, "n"] | None:
    """A column of numbers, or None where it is absent or, noted, holds something else."""
    if name not in table:
        return None
    try:
        return table[name].to_numpy(dtype=np.float64)
    except (ValueError, TypeError) as error:
        findings.errors.append(f"{path}: column {name} holds something else than numbers ({error}); correct the file.")
        return None


def write_star_poses(
    path: Location, star: StarFile, rows: Int[np.ndarray, "m"], poses: Mapping[str, Float[np.ndarray, "m"]]
) -> None:
    """Write those rows of a STAR file with other poses; every other column, value and block stays as it was.

    `poses` has rot_deg, tilt_deg, psi_deg and the origins, in angstrom and (origin_x_px, origin_y_px) in pixels of the
    original images: files of RELION 3.0 have the latter. pose_spread_deg, where it is there, becomes a column of ours.
    Raises DataError when it cannot be written.
    """
    table = star.table().iloc[rows].reset_index(drop=True).copy()
    in_pixels = star.optics is None and "rlnOriginXAngst" not in table and "rlnImagePixelSize" not in table
    columns = dict(ANGLES)
    if in_pixels:
        columns |= {"rlnOriginX": "origin_x_px", "rlnOriginY": "origin_y_px"}
    else:
        table = table.drop(columns=[name for name in OLD_ORIGINS if name in table])
        columns |= ORIGINS
    for name, ours in columns.items():
        table[name] = [f"{value:.6f}" for value in poses[ours]]
    table = table.drop(columns=[name for name in (SPREAD,) if name in table])
    if "pose_spread_deg" in poses:
        table[SPREAD] = [f"{value:.3f}" for value in poses["pose_spread_deg"]]
    write_star_file(path, {**star.blocks, star.particles: table})


def write_star_file(path: Location, blocks: Mapping[str, Any]) -> None:
    """Write blocks of text under their names. Raises DataError when it cannot be written."""
    with written_atomically(path) as temporary:
        starfile.write(dict(blocks), temporary, na_rep="nan")
