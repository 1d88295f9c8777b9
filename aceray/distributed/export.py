"""The results of a run for other programs: volume, half maps, FSC table and poses of the original particles."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from aceray.build import training_box
from aceray.config import Config
from aceray.data.mrc import read_volume, write_volume
from aceray.data.original import original_of, write_original_poses
from aceray.data.particles import ParticleSet, open_particles
from aceray.data.storage import exclusive, storage_error, written_atomically
from aceray.distributed.predictor import FromDataset, Method, Predictor
from aceray.distributed.run import device_of
from aceray.em.rotation import rotation_from_relion
from aceray.errors import DataError
from aceray.folder import RunFolder, open_run_folder
from aceray.presets import load_config

_MAPS_BESIDE = ("half_1.mrc", "half_2.mrc", "mask.mrc")
_TABLES = ("fsc.csv", "half_map_fsc.csv")
POSES = ("poses.star", "poses.cs", "poses.parquet")


@dataclass(frozen=True)
class Exported:
    """Files that were written, by name."""

    folder: Path
    paths: dict[str, Path]


def export_run(run: str | Path, out: str | Path, spread: bool = False) -> Exported:
    """Write the results of a finished run to `out`.

    volume.mrc has the voxel size of the training box and its origin at voxel 0, as RELION's and cryoSPARC's maps; the
    particle's centre is at d // 2. Poses refer to the input's own stacks, names and pixel size where the dataset was
    made by `aceray prepare`. With `spread` they have a column that says how far the encoder's poses of an image's eight
    turns and mirrors disagree, in degrees.

    Raises:
        DataError: this is no finished run, its dataset is missing or another one, or `out` holds something else.
    """
    folder = open_run_folder(run)
    if not folder.volume.exists() or not folder.poses.exists():
        raise DataError(f"{folder.path}: the run has no volume and poses yet; train it to its end first")
    config = load_config(str(folder.config))
    particles = open_particles(config.data.path, config.data.half_set)
    if folder.read_notes().get("dataset_sha256", particles.manifest.sha256) != particles.manifest.sha256:
        raise DataError(f"{particles.path}: not the particles that the run in {folder.path} was trained on")
    with own_folder(out, ("volume.mrc", *_MAPS_BESIDE, *_TABLES, *POSES)) as target:
        paths = {"volume": target / "volume.mrc"}
        write_volume(paths["volume"], *read_volume(folder.volume))
        for name in (*_MAPS_BESIDE, *_TABLES):
            if (folder.path / name).exists():
                paths[Path(name).stem] = target / name
                with written_atomically(target / name) as temporary:
                    shutil.copyfile(folder.path / name, temporary)
        spread_deg = _spread(folder, particles, config) if spread else None
        for path in _write_poses(target, folder, particles, spread_deg):
            paths[path.name] = path
    return Exported(target, paths)


@contextlib.contextmanager
def own_folder(out: str | Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The folder `out`, made where it is missing, for this process alone.

    Raises:
        DataError: it holds anything but files of those names, and what a kill left of them, or another process writes.
    """
    target = Path(out).expanduser().absolute()
    left = tuple(f".{name}." for name in names)
    try:
        target.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in target.iterdir() if path.name not in names)
    except OSError as error:
        raise storage_error(target, error) from error
    foreign = [name for name in foreign if not name.startswith(left)]
    if foreign:
        raise DataError(f"{target}: holds {foreign[0]}, which is none of our files; choose another --out")
    with exclusive(target / POSES[0]):
        for unfinished in target.glob(".*.partial"):
            unfinished.unlink(missing_ok=True)
        yield target


def _spread(folder: RunFolder, particles: ParticleSet, config: Config) -> Tensor:
    """How far the encoder's poses disagree over D4, degrees, of the run's particles in their order."""
    source = FromDataset(particles, training_box(config, particles.manifest.box))
    predictor = Predictor(folder.path, source, Method(refine=False, eightfold=True), device_of(config))
    found = [predictor(portion) for portion in source.portions()]
    number = torch.cat([each.poses.particle_id for each in found])
    return torch.cat([each.spread_deg for each in found if each.spread_deg is not None])[number.argsort()]


def _write_poses(target: Path, folder: RunFolder, particles: ParticleSet, spread_deg: Tensor | None) -> list[Path]:
    poses = pd.read_parquet(folder.poses)
    columns = {name: torch.from_numpy(poses[name].to_numpy(copy=True)) for name in poses}
    rotation = rotation_from_relion(*(columns[name].double() for name in ("rot_deg", "tilt_deg", "psi_deg")))
    origin = torch.stack([columns["origin_x_angstrom"], columns["origin_y_angstrom"]], dim=1).double()
    return write_original_poses(target, original_of(particles), rotation, origin, columns["residual"], spread_deg)
