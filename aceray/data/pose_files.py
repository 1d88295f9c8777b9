"""RELION 3.1 STAR files: an optics table and a particle table, joined by rlnOpticsGroup."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.manifest import Manifest
from aceray.data.particles import CTF_UNITS, ParticleSet
from aceray.data.storage import storage_error, written_atomically
from aceray.em.rotation import relion_from_rotation, rotation_from_relion
from aceray.errors import DataError

_PARTICLE_COLUMNS = {
    "rlnAngleRot": "rot_deg",
    "rlnAngleTilt": "tilt_deg",
    "rlnAnglePsi": "psi_deg",
    "rlnOriginXAngst": "origin_x_angstrom",
    "rlnOriginYAngst": "origin_y_angstrom",
    "rlnDefocusU": "defocus_u_angstrom",
    "rlnDefocusV": "defocus_v_angstrom",
    "rlnDefocusAngle": "astigmatism_deg",
    "rlnPhaseShift": "phase_shift_deg",
}
_OPTICS_COLUMNS = {
    "rlnVoltage": "voltage_kv",
    "rlnSphericalAberration": "spherical_aberration_mm",
    "rlnAmplitudeContrast": "amplitude_contrast",
}
_OLD_ORIGINS = {"rlnOriginX": "origin_x_angstrom", "rlnOriginY": "origin_y_angstrom"}


def write_poses_star(
    path: Path | str, rotation: Float[Tensor, "n 3 3"], shift_px: Float[Tensor, "n 2"], particles: ParticleSet
) -> None:
    """Write poses of all particles of a set, in their order, with the set's CTFs and half sets.

    `shift_px` are pixels of the stored box; rlnOrigin is minus the shift, in angstrom. rlnImageName counts the images
    of a stack named after the set's folder, which RELION needs beside the file. Raises DataError when it cannot be
    written.
    """
    manifest = particles.manifest
    if len(rotation) != manifest.particles:
        raise ValueError(f"{len(rotation)} poses for {manifest.particles} particles")
    names = ["half_set", *(CTF_UNITS if manifest.ctf else ())]
    known = particles.read(particles.row_groups(), names).to_pandas()
    rot, tilt, psi = relion_from_rotation(rotation.detach().cpu().double())
    origin = -shift_px.detach().cpu().double() * manifest.pixel_size_angstrom
    stack = f"{particles.path.name}.mrcs"
    table = pd.DataFrame({"rlnImageName": [f"{index + 1:06d}@{stack}" for index in range(len(known))]})
    for name, values in zip(_PARTICLE_COLUMNS, (rot, tilt, psi, origin[:, 0], origin[:, 1]), strict=False):
        table[name] = values.numpy()
    table["rlnRandomSubset"] = known["half_set"]
    optics, table["rlnOpticsGroup"] = _optics_groups(known)
    if manifest.ctf:
        for name, ours in list(_PARTICLE_COLUMNS.items())[5:]:
            table[name] = known[ours].astype(float)
    optics["rlnImagePixelSize"] = manifest.pixel_size_angstrom
    optics["rlnImageSize"] = manifest.box
    optics["rlnImageDimensionality"] = 2
    with written_atomically(Path(path)) as temporary:
        starfile.write({"optics": optics, "particles": table}, temporary)


def _optics_groups(known: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """One group for each distinct microscope, numbered from 1, and the group of every particle."""
    columns = {name: ours for name, ours in _OPTICS_COLUMNS.items() if ours in known}
    if columns:
        # what float32 stored as 2.7000000477 is written as 2.7
        rounded = known[list(columns.values())].astype(float).round(6)
        distinct = rounded.drop_duplicates().reset_index(drop=True)
        member = rounded.merge(distinct.assign(group=distinct.index + 1), how="left")["group"].to_numpy()
    else:
        distinct, member = pd.DataFrame(index=[0]), np.ones(len(known), dtype=np.int64)
    optics = pd.DataFrame({"rlnOpticsGroup": distinct.index + 1})
    optics["rlnOpticsGroupName"] = [f"opticsGroup{index + 1}" for index in distinct.index]
    for name, ours in columns.items():
        optics[name] = distinct[ours]
    return optics, member


def read_star(path: Path | str) -> dict[str, Float[Tensor, "n"]]:
    """Columns of a particle STAR file that aceray knows, float64, under its own names (rot_deg, defocus_u_angstrom, …).

    Per-group values are looked up by rlnOpticsGroup. Origins in pixels (RELION 3.0) are turned into angstrom where the
    optics table states rlnImagePixelSize. Raises DataError when the file is missing, is no STAR file, or refers to an
    optics group that it does not describe.
    """
    return _known_columns(path, _joined(Path(path)))


def read_poses_star(
    path: Path | str, manifest: Manifest
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Int[Tensor, "n"]]:
    """Rotations, shifts in pixels of the stored box and particle numbers, ascending, of any program's STAR file.

    Rows are particles by the number before the @ of rlnImageName, or by their order where the file has no such names or
    several stacks. Raises DataError when the file is missing or no STAR file, has no angles, or its rows cannot be
    assigned to particles.
    """
    table = _joined(Path(path))
    columns = _known_columns(path, table)
    missing = [name for name, ours in list(_PARTICLE_COLUMNS.items())[:3] if ours not in columns]
    if missing:
        raise DataError(f"{path}: lacks the column {missing[0]}; give a file with refined poses.")
    rotation = rotation_from_relion(columns["rot_deg"], columns["tilt_deg"], columns["psi_deg"]).float()
    zero = torch.zeros(len(table), dtype=torch.float64)
    origin = torch.stack([columns.get(f"origin_{axis}_angstrom", zero) for axis in "xy"], dim=1)
    shift_px = (-origin / manifest.pixel_size_angstrom).float()
    number, order = _particle_numbers(path, table, manifest.particles).sort()
    return rotation[order], shift_px[order], number


def _particle_numbers(path: Path | str, table: pd.DataFrame, particles: int) -> Int[Tensor, "n"]:
    names = table["rlnImageName"].astype(str) if "rlnImageName" in table else pd.Series(dtype=str)
    parts = names.str.extract(r"^(\d+)@(.+)$")
    if len(names) == 0 or parts[0].isna().any() or parts[1].nunique() > 1:
        if len(table) != particles:
            raise DataError(
                f"{path}: has {len(table)} rows and no rlnImageName of one stack, the data set {particles} particles; "
                "without such names all particles are needed, in their order."
            )
        return torch.arange(particles)
    number = torch.from_numpy(parts[0].astype("int64").to_numpy(copy=True)) - 1
    if int(number.min()) < 0 or int(number.max()) >= particles or len(number.unique()) < len(number):
        raise DataError(
            f"{path}: rlnImageName does not count particles 1 to {particles}, each once at most; give the poses of "
            "this data set."
        )
    return number


def _known_columns(path: Path | str, particles: pd.DataFrame) -> dict[str, Float[Tensor, "n"]]:
    found = {ours: particles[name] for name, ours in (_PARTICLE_COLUMNS | _OPTICS_COLUMNS).items() if name in particles}
    for name, ours in _OLD_ORIGINS.items():
        if name in particles and ours not in found:
            if "rlnImagePixelSize" not in particles:
                raise DataError(f"{path}: {name} is in pixels and no rlnImagePixelSize is given; convert the file.")
            found[ours] = particles[name] * particles["rlnImagePixelSize"]
    try:
        return {ours: torch.from_numpy(np.array(values, dtype=np.float64)) for ours, values in found.items()}
    except ValueError as error:
        raise DataError(f"{path}: a column holds something else than numbers ({error}); correct the file.") from error


def _joined(path: Path) -> pd.DataFrame:
    """The particle table with the columns of its optics groups."""
    try:
        blocks: dict[str, Any] = dict(starfile.read(path, always_dict=True))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a STAR file ({error}); check it.") from error
    tables = {name: pd.DataFrame(block) if isinstance(block, pd.DataFrame) else None for name, block in blocks.items()}
    optics = blocks.get("optics")
    particles = tables.get("particles")
    if particles is None and len(tables) == 1:
        particles = next(iter(tables.values()))
    if particles is None:
        raise DataError(f"{path}: holds no block data_particles; aceray needs a particle STAR file.")
    if optics is None:
        return particles
    optics = pd.DataFrame(optics if isinstance(optics, pd.DataFrame) else [optics]).set_index("rlnOpticsGroup")
    if "rlnOpticsGroup" not in particles:
        raise DataError(f"{path}: block data_particles lacks the column rlnOpticsGroup; write the file again.")
    unknown = sorted(set(particles["rlnOpticsGroup"]) - set(optics.index))
    if unknown:
        raise DataError(f"{path}: optics group {unknown[0]} is used but not in data_optics; correct the file.")
    return particles.join(optics[[name for name in optics if name not in particles]], on="rlnOpticsGroup")
