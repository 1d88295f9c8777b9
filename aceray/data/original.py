"""Poses in the terms of the input that a dataset was made of: its stacks, names, pixel sizes and further columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.cryosparc import particles_from_cs, read_record_array, write_cs_poses
from aceray.data.particle_table import Findings, ParticleTable
from aceray.data.particles import CTF_UNITS, IDENTITY_UNITS, ParticleSet
from aceray.data.pose_files import read_poses_pkl, write_poses_star
from aceray.data.star import (
    ANGLES,
    DEFOCUS,
    MICROSCOPE,
    StarFile,
    particles_from_star,
    read_star_file,
    write_star_poses,
)
from aceray.data.storage import written_atomically
from aceray.em.rotation import relion_from_rotation, rotation_from_relion
from aceray.errors import DataError

_CS_CTF = {
    "ctf/df1_A": ("defocus_u_angstrom", 1.0),
    "ctf/df2_A": ("defocus_v_angstrom", 1.0),
    "ctf/df_angle_rad": ("astigmatism_deg", np.pi / 180),
    "ctf/phase_shift_rad": ("phase_shift_deg", np.pi / 180),
    "ctf/accel_kv": ("voltage_kv", 1.0),
    "ctf/cs_mm": ("spherical_aberration_mm", 1.0),
    "ctf/amp_contrast": ("amplitude_contrast", 1.0),
}


@dataclass(frozen=True)
class Original:
    """Particles as their own program knows them. `file` is its file, whose rows `table.source_row` are; None: stacks.

    `table.pixel_size_angstrom` is that of the original images, `box` their side where all have one.
    """

    table: ParticleTable
    file: StarFile | np.ndarray | None
    box: int | None


def original_of(particles: ParticleSet) -> Original:
    """What the particles of a dataset (or half set) were before `aceray prepare`, in the order of the dataset.

    Those of another dataset are the images of a stack with its folder's name. Raises DataError when the copy of the
    input is missing.
    """
    manifest = particles.manifest
    origin, prepared = manifest.source, manifest.source.get("kind") == "prepared"
    names = (*IDENTITY_UNITS,) if prepared else ("particle_id",)
    rows = particles.read(particles.row_groups(), [*names, "half_set", *(CTF_UNITS if manifest.ctf else ())])
    ctf = {name: rows[name].to_numpy().astype(np.float64) for name in CTF_UNITS} if manifest.ctf else None
    half = rows["half_set"].to_numpy().astype(np.int64)
    if not prepared:
        number, size = rows["particle_id"].to_numpy(), np.full(len(rows), manifest.pixel_size_angstrom)
        stack = np.zeros(len(rows), dtype=np.int64)
        name = f"{particles.path.name}.mrcs"
        return Original(ParticleTable((name,), stack, number, number, size, ctf, half_set=half), None, manifest.box)
    codes, stacks = pd.factorize(rows["stack_name"].to_pandas())
    source_row = rows["source_row"].to_numpy()
    file, sizes = _file_and_sizes(particles, origin.get("original"))
    stated = np.full(len(rows), np.nan) if sizes is None else sizes[source_row]
    stated = np.where(np.isfinite(stated), stated, float(origin["pixel_sizes_angstrom"][0]))
    given = origin.get("original_pixel_size_angstrom")
    table = ParticleTable(
        stack_names=tuple(str(name) for name in stacks),
        stack=codes.astype(np.int64),
        stack_index=rows["stack_index"].to_numpy(),
        source_row=source_row,
        pixel_size_angstrom=stated if given is None else np.full(len(rows), float(given)),
        ctf=ctf,
        half_set=half,
    )
    boxes = origin.get("boxes", [])
    return Original(table, file, boxes[0] if len(boxes) == 1 else None)


def _file_and_sizes(particles: ParticleSet, name: str | None) -> tuple[StarFile | np.ndarray | None, np.ndarray | None]:
    ignored = Findings()  # `prepare` has told it all
    if name == "source.star":
        star = read_star_file(particles.path / name)
        return star, particles_from_star(star, ignored).pixel_size_angstrom
    if name == "source.cs":
        rows = read_record_array(particles.path / name)
        return rows, particles_from_cs(particles.path / name, rows, ignored).pixel_size_angstrom
    return None, None


def write_poses(
    path: Path, particles: ParticleSet, rotation: Float[Tensor, "n 3 3"], shift_px: Float[Tensor, "n 2"]
) -> None:
    """Write a STAR file with the poses of all particles of a dataset or half set, in their order.

    `shift_px` are pixels of the stored box. Prepared particles have the names, the pixel size and all columns of their
    input; others are named after the dataset's folder. Raises DataError when it cannot be written.
    """
    if particles.manifest.source.get("kind") != "prepared":
        write_poses_star(path, rotation, shift_px, particles)
        return
    original = original_of(particles)
    origin = -shift_px.detach().cpu().double() * particles.manifest.pixel_size_angstrom
    _write_star(path, original, _pose_columns(original, rotation.detach().cpu(), origin))


def write_original_poses(
    folder: Path,
    original: Original,
    rotation: Float[Tensor, "n 3 3"],
    origin_angstrom: Float[Tensor, "n 2"],
    residual: Float[Tensor, " n"],
    spread_deg: Float[Tensor, " n"] | None = None,
) -> list[Path]:
    """Write poses.star, poses.cs and poses.parquet: the pose of row i is that of row i of `original.table`.

    A STAR or .cs input comes back with all its columns, values and optics groups, only the poses set (and without the
    rows that have none); the other is made of what is known. `spread_deg`, how uncertain each pose is, becomes a column
    of its own, which RELION maintains as text and cryoSPARC ignores. Raises DataError when one cannot be written.
    """
    poses = _pose_columns(original, rotation, origin_angstrom)
    if spread_deg is not None:
        poses["pose_spread_deg"] = spread_deg.double().numpy()
    _write_star(folder / "poses.star", original, poses)
    if isinstance(original.file, np.ndarray):
        write_cs_poses(folder / "poses.cs", original.file, original.table.source_row, poses)
    else:
        write_cs_poses(folder / "poses.cs", _rows_of(original), np.arange(len(original.table)), poses)
    _write_parquet(folder / "poses.parquet", original.table, poses, residual)
    return [folder / "poses.star", folder / "poses.cs", folder / "poses.parquet"]


def _pose_columns(
    original: Original, rotation: Float[Tensor, "n 3 3"], origin_angstrom: Float[Tensor, "n 2"]
) -> dict[str, np.ndarray]:
    if len(rotation) != len(original.table):
        raise ValueError(f"{len(rotation)} poses for {len(original.table)} particles")
    size = original.table.pixel_size_angstrom
    poses = {
        name: angle.numpy()
        for name, angle in zip(ANGLES.values(), relion_from_rotation(rotation.double()), strict=True)
    }
    for axis, values in zip("xy", origin_angstrom.double().numpy().T, strict=True):
        poses |= {f"origin_{axis}_angstrom": values, f"origin_{axis}_px": values / size}
    return poses | {"pixel_size_angstrom": size}


def _write_star(path: Path, original: Original, poses: Mapping[str, np.ndarray]) -> None:
    if isinstance(original.file, StarFile):
        write_star_poses(path, original.file, original.table.source_row, poses)
    else:
        write_star_poses(path, _star_of(original), np.arange(len(original.table)), poses)


def read_original_poses(
    path: Path | str, particles: ParticleSet
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Int[Tensor, "n"]]:
    """As `pose_files.read_poses`, of a file that names the images of a prepared dataset's input.

    Rows are particles by stack name and number. cryoDRGN's .pkl has no names: its rows are those of the input. Raises
    DataError when the file has no poses, or names images that are not in the dataset.
    """
    path, manifest = Path(path), particles.manifest
    table = particles.read(particles.row_groups(), ["particle_id", *IDENTITY_UNITS]).to_pandas()
    if path.suffix.lower() == ".pkl":
        rotation, shift_px, _ = read_poses_pkl(path, manifest)
        if sorted(table["source_row"]) != list(range(len(rotation))):
            raise DataError(f"{path}: has no names, and the dataset holds but a part of its input; give a STAR file.")
        rows = torch.from_numpy(table["source_row"].to_numpy(copy=True))
        return rotation[rows], shift_px[rows], torch.from_numpy(table["particle_id"].to_numpy(copy=True))
    findings = Findings()
    if path.suffix.lower() == ".cs":
        found = particles_from_cs(path, read_record_array(path), findings)
    else:
        found = particles_from_star(read_star_file(path), findings)
    if found.pose is None:
        raise DataError(f"{path}: lacks poses (rlnAngleRot, alignments3D/pose); give a file with refined poses.")
    stacks = table["stack_name"].str.removeprefix(">")
    known = dict(zip(zip(stacks, table["stack_index"], strict=True), table["particle_id"], strict=True))
    names = [found.stack_names[stack].removeprefix(">") for stack in found.stack]
    number = np.array([known.get(image, -1) for image in zip(names, found.stack_index.tolist(), strict=True)])
    if (number < 0).any() or len(np.unique(number)) < len(number):
        row = int((number < 0).argmax())
        raise DataError(f"{path}: names {found.label(row)}, which the dataset does not hold, or an image twice.")
    order = np.argsort(number)
    pose = {name: torch.from_numpy(values[order]) for name, values in found.pose.items()}
    rotation = rotation_from_relion(*(pose[name] for name in ANGLES.values()))
    origin = torch.stack([pose["origin_x_angstrom"], pose["origin_y_angstrom"]], dim=1)
    shift_px = -origin / manifest.pixel_size_angstrom
    return rotation.float(), shift_px.float(), torch.from_numpy(number[order])


def _star_of(original: Original) -> StarFile:
    """A STAR file of RELION 3.1 of what is known: names, half sets, CTFs, one optics group for each microscope."""
    table = original.table
    # cryoSPARC's mark is no part of the name
    names = [table.label(row).replace("@>", "@") for row in range(len(table))]
    rows = pd.DataFrame({"rlnImageName": names})
    groups = {"rlnImagePixelSize": table.pixel_size_angstrom}
    if table.ctf is not None:
        for name, ours in DEFOCUS.items():
            rows[name] = [f"{value:.6f}" for value in table.ctf[ours]]
        groups |= {name: table.ctf[ours] for name, ours in MICROSCOPE.items()}
    if table.half_set is not None:
        rows["rlnRandomSubset"] = table.half_set.astype(str)
    # what float32 stored as 2.7000000477 is written as 2.7
    kinds, member = np.unique(np.stack(list(groups.values()), axis=1).round(5), axis=0, return_inverse=True)
    rows["rlnOpticsGroup"] = (member.ravel() + 1).astype(str)
    optics = pd.DataFrame({"rlnOpticsGroup": [str(number + 1) for number in range(len(kinds))]})
    optics["rlnOpticsGroupName"] = [f"opticsGroup{number + 1}" for number in range(len(kinds))]
    for name, values in zip(groups, kinds.T, strict=True):
        optics[name] = [f"{value:g}" if name != "rlnImagePixelSize" else f"{value:.6f}" for value in values]
    if original.box is not None:
        optics["rlnImageSize"] = str(original.box)
    optics["rlnImageDimensionality"] = "2"
    return StarFile(Path("poses.star"), {"optics": optics, "particles": rows}, "particles", "optics")


def _rows_of(original: Original) -> np.ndarray:
    """A cryoSPARC record array of what is known."""
    table = original.table
    names = [name.encode() for name in table.stack_names]
    columns: dict[str, np.ndarray] = {
        "uid": table.source_row.astype(np.uint64),
        "blob/path": np.array(names)[table.stack],
        "blob/idx": table.stack_index.astype(np.uint32),
        "blob/psize_A": table.pixel_size_angstrom.astype(np.float32),
    }
    if original.box is not None:
        columns["blob/shape"] = np.full((len(table), 2), original.box, dtype=np.uint32)
    if table.ctf is not None:
        columns |= {name: (table.ctf[ours] * factor).astype(np.float32) for name, (ours, factor) in _CS_CTF.items()}
    if table.half_set is not None:
        columns["alignments3D/split"] = (table.half_set - 1).astype(np.uint32)
    rows = np.zeros(len(table), dtype=[(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        rows[name] = values
    return rows


def _write_parquet(
    path: Path, table: ParticleTable, poses: Mapping[str, np.ndarray], residual: Float[Tensor, " n"]
) -> None:
    columns = {
        "stack_name": pa.array(np.array(table.stack_names, dtype=object)[table.stack], pa.string()),
        "stack_index": pa.array(table.stack_index),
        "source_row": pa.array(table.source_row),
    }
    names = ("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom")
    columns |= {name: pa.array(poses[name]) for name in names}
    columns["residual"] = pa.array(residual.numpy())
    if "pose_spread_deg" in poses:
        columns["pose_spread_deg"] = pa.array(poses["pose_spread_deg"])
    with written_atomically(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
