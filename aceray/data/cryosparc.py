"""Particle files of cryoSPARC, NumPy record arrays: read without pickles, joined with passthrough files, written."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import roma
import torch
from jaxtyping import Float, Int

from aceray.data.location import Location
from aceray.data.particle_table import Findings, ParticleTable
from aceray.data.storage import local_copy, storage_error, written_atomically
from aceray.em.rotation import relion_from_rotation, rotation_from_relion, rotation_from_vector
from aceray.errors import DataError

_CTF = {
    "ctf/df1_A": "defocus_u_angstrom",
    "ctf/df2_A": "defocus_v_angstrom",
    "ctf/df_angle_rad": "astigmatism_deg",
    "ctf/phase_shift_rad": "phase_shift_deg",
    "ctf/accel_kv": "voltage_kv",
    "ctf/cs_mm": "spherical_aberration_mm",
    "ctf/amp_contrast": "amplitude_contrast",
}
SPREAD = "aceray/pose_spread_deg"
POSE_GROUPS = ("alignments3D", "alignments_class_0")


def load_array(path: Location) -> np.ndarray:
    """The array of a .npy file. Its claimed sizes are compared with the file's before anything is allocated.

    Raises DataError when the file cannot be read, ValueError when it is anything else or shorter than it claims.
    """
    try:
        with local_copy(path) as copy, open(copy, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            version = np.lib.format.read_magic(stream)
            if int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little") > size:
                raise ValueError("its header is longer than the file")
            stream.seek(np.lib.format.MAGIC_LEN)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(stream)
            if math.prod(shape) * kind.itemsize > size - stream.tell() or min(shape, default=0) < 0:
                raise ValueError("its array is longer than the file")
            stream.seek(0)
            return np.load(stream, allow_pickle=False)
    except DataError:
        raise
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except Exception as error:  # a hostile header, which NumPy parses as Python, may raise anything
        raise ValueError(" ".join(str(error).split())[:100] or type(error).__name__) from error


def read_record_array(path: Location) -> np.ndarray:
    """The rows of a .cs file. Raises DataError when it is missing or anything else than a record array with rows."""
    try:
        table = load_array(path)
    except ValueError:
        table = None
    if not isinstance(table, np.ndarray) or table.dtype.names is None or table.ndim != 1 or len(table) == 0:
        raise DataError(f"{path}: is no cryoSPARC particle file, a NumPy record array; export it again.")
    return table


def with_passthrough(path: Location, table: np.ndarray, passthrough: Sequence[Location]) -> np.ndarray:
    """The rows of a .cs file with the columns that other files have for the same uid; the file's own columns win.

    Raises DataError when a file has no uids, or lacks a particle.
    """
    for other_path in passthrough:
        other = read_record_array(other_path)
        for name, array in ((path, table), (other_path, other)):
            if "uid" not in (array.dtype.names or ()):
                raise DataError(f"{name}: has no uid, by which files are joined; export it from cryoSPARC again.")
        order = np.argsort(other["uid"])
        place = np.searchsorted(other["uid"], table["uid"], sorter=order).clip(max=len(other) - 1)
        rows = order[place]
        missing = other["uid"][rows] != table["uid"]
        if missing.any():
            raise DataError(
                f"{other_path}: lacks {int(missing.sum())} of the particles of {path}; give the passthrough file of "
                "the same job."
            )
        fields = [field for field in other.dtype.descr if field[0] and field[0] not in (table.dtype.names or ())]
        joined = np.zeros(len(table), dtype=[*table.dtype.descr, *fields])
        for name in joined.dtype.names or ():
            joined[name] = table[name] if name in (table.dtype.names or ()) else other[name][rows]
        table = joined
    return table


def particles_from_cs(path: Location, table: np.ndarray, findings: Findings) -> ParticleTable:
    """The typed table of cryoSPARC rows; what is wrong goes to `findings`. Raises DataError when no images are named.

    Angles are stored in radians there. Rotation: the transpose of the exponential map of the pose. The shift has the
    sign of RELION's origin, in pixels of psize_A.
    """
    names = table.dtype.names or ()
    if "blob/path" not in names or "blob/idx" not in names:
        raise DataError(
            f"{path}: names no images (blob/path, blob/idx); give the passthrough file that does with --passthrough."
        )
    stacks, stack = np.unique(table["blob/path"], return_inverse=True)
    pixel_size = _float(table, "blob/psize_A")
    half = table["alignments3D/split"].astype(np.int64) + 1 if "alignments3D/split" in names else None
    return ParticleTable(
        stack_names=tuple(_text(name) for name in stacks),
        stack=stack.astype(np.int64),
        stack_index=table["blob/idx"].astype(np.int64),
        source_row=np.arange(len(table)),
        pixel_size_angstrom=np.full(len(table), np.nan) if pixel_size is None else pixel_size,
        ctf=_ctf(path, table, findings),
        pose=_pose(table, pixel_size),
        half_set=half,
    )


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _float(table: np.ndarray, name: str) -> Float[np.ndarray, "n"] | None:
    return table[name].astype(np.float64) if name in (table.dtype.names or ()) else None


def _ctf(path: Location, table: np.ndarray, findings: Findings) -> dict[str, np.ndarray] | None:
    if "ctf/df1_A" not in (table.dtype.names or ()):
        return None
    found = {}
    for name, ours in _CTF.items():
        values = _float(table, name)
        if values is not None:
            found[ours] = np.rad2deg(values) if name.endswith("_rad") else values
        elif name == "ctf/phase_shift_rad":
            found[ours] = np.zeros(len(table))
        else:
            findings.errors.append(f"{path}: has defoci but no {name}; export it from cryoSPARC again.")
    return found if len(found) == len(_CTF) else None


def _pose(table: np.ndarray, pixel_size: np.ndarray | None) -> dict[str, np.ndarray] | None:
    names = table.dtype.names or ()
    group = next((name for name in POSE_GROUPS if f"{name}/pose" in names and f"{name}/shift" in names), None)
    if group is None or "alignments_class_1/pose" in names:
        return None
    rotation = rotation_from_vector(torch.from_numpy(table[f"{group}/pose"].astype(np.float64))).mT
    angles = [angle.numpy() for angle in relion_from_rotation(rotation)]
    size = _float(table, f"{group}/psize_A")
    size = pixel_size if size is None else size
    if size is None:
        return None
    origin = table[f"{group}/shift"].astype(np.float64) * size[:, None]
    values = (*angles, origin[:, 0], origin[:, 1])
    return dict(zip(("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom"), values, strict=True))


def write_cs_poses(
    path: Location, table: np.ndarray, rows: Int[np.ndarray, "m"], poses: Mapping[str, Float[np.ndarray, "m"]]
) -> None:
    """Write those rows of a .cs table with other poses, in alignments3D; every other column stays as it was.

    `poses` has rot_deg, tilt_deg, psi_deg, and origin_x_px, origin_y_px and pixel_size_angstrom of the original images;
    pose_spread_deg, where it is there, becomes a column of ours. Raises DataError when it cannot be written.
    """
    ours = [("alignments3D/pose", "<f4", (3,)), ("alignments3D/shift", "<f4", (2,)), ("alignments3D/psize_A", "<f4")]
    if "pose_spread_deg" in poses:
        ours.append((SPREAD, "<f4"))
    new = [field for field in ours if field[0] not in (table.dtype.names or ())]
    written = np.zeros(len(rows), dtype=[*table.dtype.descr, *new])
    for name in table.dtype.names or ():
        written[name] = table[name][rows]
    angles = [
        torch.from_numpy(np.asarray(poses[name], dtype=np.float64)) for name in ("rot_deg", "tilt_deg", "psi_deg")
    ]
    written["alignments3D/pose"] = roma.rotmat_to_rotvec(rotation_from_relion(*angles).mT).numpy()
    written["alignments3D/shift"] = np.stack([poses["origin_x_px"], poses["origin_y_px"]], axis=1)
    written["alignments3D/psize_A"] = poses["pixel_size_angstrom"]
    if "pose_spread_deg" in poses:
        written[SPREAD] = poses["pose_spread_deg"]
    with written_atomically(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, written, allow_pickle=False)
