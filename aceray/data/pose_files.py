"""Poses in files of other programs: RELION's STAR (with CTFs; read and written), cryoSPARC's .cs, cryoDRGN's .pkl."""

import io
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import starfile
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.cryosparc import read_record_array
from aceray.data.manifest import Manifest
from aceray.data.particles import CTF_UNITS, ParticleSet
from aceray.data.star import ANGLES, DEFOCUS, MICROSCOPE, OLD_ORIGINS, ORIGINS, joined, read_star_file
from aceray.data.storage import storage_error, written_atomically
from aceray.em.rotation import relion_from_rotation, rotation_from_relion, rotation_from_vector
from aceray.errors import DataError

_PARTICLE_COLUMNS = ANGLES | ORIGINS | DEFOCUS
_OPTICS_COLUMNS = MICROSCOPE

_ROTATION_TOLERANCE = 1e-2


def write_poses_star(
    path: Path | str, rotation: Float[Tensor, "n 3 3"], shift_px: Float[Tensor, "n 2"], particles: ParticleSet
) -> None:
    """Write poses of all particles of a set or half set, in their order, with the set's CTFs and half sets.

    `shift_px` are pixels of the stored box; rlnOrigin is minus the shift, in angstrom. rlnImageName counts the images
    of a stack named after the set's folder, which RELION needs beside the file. Raises DataError when it cannot be
    written.
    """
    manifest = particles.manifest
    names = ["particle_id", "half_set", *(CTF_UNITS if manifest.ctf else ())]
    known = particles.read(particles.row_groups(), names).to_pandas()
    if len(rotation) != len(known):
        raise ValueError(f"{len(rotation)} poses for {len(known)} particles")
    rot, tilt, psi = relion_from_rotation(rotation.detach().cpu().double())
    origin = -shift_px.detach().cpu().double() * manifest.pixel_size_angstrom
    stack = f"{particles.path.name}.mrcs"
    table = pd.DataFrame({"rlnImageName": [f"{index + 1:06d}@{stack}" for index in known["particle_id"]]})
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


def read_star(path: Path | str, names: Collection[str]) -> dict[str, Float[Tensor, "n"]]:
    """Those of the named columns (rot_deg, defocus_u_angstrom, …) that a particle STAR file has, float64.

    Per-group values are looked up by rlnOpticsGroup; files without groups (RELION 3.0) have them in every row. Origins
    in pixels, of such files too, are turned into angstrom where rlnImagePixelSize is stated. Raises DataError when the
    file is missing, is no STAR file, refers to an optics group that it does not describe, or lacks the pixel size.
    """
    return _known_columns(path, joined(read_star_file(Path(path))), names)


def read_poses(
    path: Path | str, manifest: Manifest
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Int[Tensor, "n"]]:
    """Rotations, shifts in pixels of the stored box and particle numbers, ascending, by the ending of the file's name.

    RELION's .star, cryoSPARC's .cs and cryoDRGN's .pkl. Raises DataError for another ending, or as the three readers.
    """
    readers = {".star": read_poses_star, ".cs": read_poses_cs, ".pkl": read_poses_pkl}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise DataError(f"{path}: has no known ending; give .star (RELION), .cs (cryoSPARC) or .pkl (cryoDRGN).")
    return reader(path, manifest)


def read_poses_star(
    path: Path | str, manifest: Manifest
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Int[Tensor, "n"]]:
    """Rotations, shifts in pixels of the stored box and particle numbers, ascending, of any program's STAR file.

    Rows are particles by the number before the @ of rlnImageName, or by their order where the file has no such names or
    several stacks. Raises DataError when the file is missing or no STAR file, has no angles, or its rows cannot be
    assigned to particles.
    """
    table = joined(read_star_file(Path(path)))
    columns = _known_columns(path, table, [*_PARTICLE_COLUMNS.values()][:5])
    missing = [name for name, ours in list(_PARTICLE_COLUMNS.items())[:3] if ours not in columns]
    if missing:
        raise DataError(f"{path}: lacks the column {missing[0]}; give a file with refined poses.")
    rotation = rotation_from_relion(columns["rot_deg"], columns["tilt_deg"], columns["psi_deg"]).float()
    zero = torch.zeros(len(table), dtype=torch.float64)
    origin = torch.stack([columns.get(f"origin_{axis}_angstrom", zero) for axis in "xy"], dim=1)
    shift_px = (-origin / manifest.pixel_size_angstrom).float()
    number, order = _particle_numbers(path, table, manifest.particles).sort()
    return rotation[order], shift_px[order], number


def read_poses_cs(
    path: Path | str, manifest: Manifest
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Int[Tensor, "n"]]:
    """As `read_poses_star`, of a cryoSPARC particle file: a NumPy record array.

    Rotation: the transpose of the exponential map of alignments3D/pose (ab initio: alignments_class_0/pose). The shift
    has the sign of RELION's origin, so the content's is minus that; it is in pixels of psize_A, or the data set's where
    the file states none. Rows are particles by blob/idx (from 0), or by their order where the file has none or several
    stacks. Raises DataError when the file is missing or of another kind, or its rows cannot be assigned.
    """
    table = read_record_array(Path(path))
    names = table.dtype.names or ()
    if "alignments_class_1/pose" in names:
        raise DataError(f"{path}: holds poses in several classes; give the particles of one class.")
    group = "alignments3D" if "alignments3D/pose" in names else "alignments_class_0"
    missing = [name for name in (f"{group}/pose", f"{group}/shift") if name not in names]
    if missing:
        raise DataError(f"{path}: lacks {missing[0].replace('_class_0', '3D')}; give a file with refined poses.")
    vector = _finite(path, f"{group}/pose", table[f"{group}/pose"], (len(table), 3))
    shift = _finite(path, f"{group}/shift", table[f"{group}/shift"], (len(table), 2))
    sizes = [name for name in (f"{group}/psize_A", "blob/psize_A") if name in names]
    if sizes:
        shift = shift * _finite(path, sizes[0], table[sizes[0]], (len(table),))[:, None] / manifest.pixel_size_angstrom
    stacks = len(np.unique(table["blob/path"])) if "blob/path" in names else 1
    index = table["blob/idx"] if "blob/idx" in names and stacks == 1 else None
    if index is None:
        number = _numbers_by_order(path, len(table), "blob/idx", manifest.particles)
    else:
        index = _finite(path, "blob/idx", index, (len(table),)).long()
        number = _checked_numbers(path, index, "blob/idx", manifest.particles)
    number, order = number.sort()
    rotation = rotation_from_vector(vector).mT
    return rotation[order].float(), -shift[order].float(), number


def read_poses_pkl(
    path: Path | str, manifest: Manifest
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Int[Tensor, "n"]]:
    """As `read_poses_star`, of cryoDRGN's poses: rotations n 3 3, or those and translations n 2, pickled.

    Rotations are RELION's. cryoDRGN moves the image by +t, a fraction of the box, to centre it, so the content's shift
    is minus that. Rows are the particles in their order. Nothing but arrays and tuples is unpickled. Raises DataError
    when the file is missing, holds anything else, or not one pose for each particle.
    """
    parts = unpickle_arrays(Path(path))
    count = len(parts[0]) if parts[0].ndim == 3 else manifest.particles
    number = _numbers_by_order(path, count, "particle numbers", manifest.particles)
    rotation = _finite(path, "the rotations", parts[0], (count, 3, 3))
    error = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax()
    if error > _ROTATION_TOLERANCE or rotation.det().amin() < 0:
        raise DataError(f"{path}: holds matrices that are no rotations; give cryoDRGN's pose file.")
    fraction = torch.zeros(count, 2, dtype=torch.float64)
    if len(parts) == 2:
        fraction = _finite(path, "the translations", parts[1], (count, 2))
    if fraction.abs().amax() > 1:
        raise DataError(
            f"{path}: moves an image by {float(fraction.abs().amax()):g} boxes; translations must be fractions of it."
        )
    return rotation.float(), (-fraction * manifest.box).float(), number


class _NumberType:
    """Stands in for a NumPy dtype in a pickle: a number and its byte order."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch("[iuf][1248]", name):
            raise pickle.UnpicklingError(f"holds an array of type {name}")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


class _StoredArray:
    """Stands in for a NumPy array in a pickle, as NumPy's own restoring of a hostile one may touch foreign memory."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, content = state
        self.values = self.from_buffer(content, kind, shape, "F" if fortran else "C").values

    @classmethod
    def from_buffer(
        cls, content: object, kind: object, shape: tuple[int, ...], order: Literal["C", "F"], *_: object
    ) -> "_StoredArray":
        if not isinstance(content, bytes | bytearray) or not isinstance(kind, _NumberType):
            raise pickle.UnpicklingError("holds an array of something else than numbers")
        stored = cls()
        stored.values = np.frombuffer(bytes(content), kind.order + kind.name).reshape(shape, order=order)
        return stored


# All that a pickled array asks for, under the names of NumPy 1 and 2.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _StoredArray,
    ("numpy", "dtype"): _NumberType,
    ("numpy.core.multiarray", "_reconstruct"): _StoredArray,
    ("numpy._core.multiarray", "_reconstruct"): _StoredArray,
    ("numpy.core.numeric", "_frombuffer"): _StoredArray.from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _StoredArray.from_buffer,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


class _ArrayUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Reads arrays of numbers, tuples and lists; refuses every class or function it has no stand-in for.

    The one in C allocates room for as many remembered objects as a number in the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return _STAND_INS[module, name]


def unpickle_arrays(path: Path) -> list[np.ndarray]:
    """The array of a pickle, or those of its tuple. Raises DataError for anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise storage_error(path, error, "read") from error
    try:
        found = _ArrayUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a broken or hostile pickle may raise anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(f"{path}: is no pickle of NumPy arrays alone ({reason}); give cryoDRGN's pose file.") from error
    parts = found if isinstance(found, tuple | list) else [found]
    if len(parts) not in (1, 2) or not all(isinstance(part, _StoredArray) for part in parts):
        raise DataError(f"{path}: holds no rotations and translations; give cryoDRGN's pose file.")
    return [part.values for part in parts]


def _finite(path: Path | str, name: str, values: Any, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """An array of a file as float64. Raises DataError for another shape or a value that is not a finite number."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full(shape, np.nan)
    if array.shape != shape:
        raise DataError(f"{path}: {name} has the shape {array.shape} instead of {shape}; give refined poses.")
    if not np.isfinite(array).all():
        raise DataError(f"{path}: {name} holds a value that is not a finite number; correct the file.")
    return torch.from_numpy(array)


def _particle_numbers(path: Path | str, table: pd.DataFrame, particles: int) -> Int[Tensor, "n"]:
    names = table["rlnImageName"].astype(str) if "rlnImageName" in table else pd.Series(dtype=str)
    parts = names.str.extract(r"^(\d+)@(.+)$")
    if len(names) == 0 or parts[0].isna().any() or parts[1].nunique() > 1:
        return _numbers_by_order(path, len(table), "rlnImageName", particles)
    number = torch.from_numpy(parts[0].astype("int64").to_numpy(copy=True)) - 1
    return _checked_numbers(path, number, "rlnImageName", particles, first=1)


def _numbers_by_order(path: Path | str, rows: int, field: str, particles: int) -> Int[Tensor, "n"]:
    if rows != particles:
        raise DataError(
            f"{path}: has {rows} rows and no {field} of one stack, the data set {particles} particles; "
            "without them all particles are needed, in their order."
        )
    return torch.arange(particles)


def _checked_numbers(
    path: Path | str, number: Int[Tensor, "n"], field: str, particles: int, first: int = 0
) -> Int[Tensor, "n"]:
    if int(number.min()) < 0 or int(number.max()) >= particles or len(number.unique()) < len(number):
        raise DataError(
            f"{path}: {field} does not count particles {first} to {particles - 1 + first}, each once at most; give the "
            "poses of this data set."
        )
    return number


def _known_columns(path: Path | str, particles: pd.DataFrame, names: Collection[str]) -> dict[str, Float[Tensor, "n"]]:
    known = _PARTICLE_COLUMNS | _OPTICS_COLUMNS
    found = {ours: particles[name] for name, ours in known.items() if name in particles and ours in names}
    for name, ours in OLD_ORIGINS.items():
        if name in particles and ours in names and ours not in found:
            if "rlnImagePixelSize" not in particles:
                raise DataError(f"{path}: {name} is in pixels and no rlnImagePixelSize is given; convert the file.")
            found[ours] = particles[name] * particles["rlnImagePixelSize"]
    try:
        return {ours: torch.from_numpy(np.array(values, dtype=np.float64)) for ours, values in found.items()}
    except ValueError as error:
        raise DataError(f"{path}: a column holds something else than numbers ({error}); correct the file.") from error
