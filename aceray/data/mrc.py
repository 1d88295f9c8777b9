"""Volumes as MRC files: axes z, y, x; float32; one pixel size."""

from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from aceray.data.location import Location, location
from aceray.data.mrc_header import check_length, read_header
from aceray.data.storage import local_copy, storage_error, written_atomically
from aceray.errors import DataError


def write_volume(path: Location | str, volume: Float[Tensor, "d d d"], pixel_size_angstrom: float) -> None:
    """Write a volume as a float32 MRC file, under its final name only when complete.

    Raises DataError when the file cannot be written.
    """
    values = np.ascontiguousarray(volume.detach().cpu().numpy(), dtype=np.float32)
    with written_atomically(location(path)) as temporary, mrcfile.new(temporary) as file:
        file.set_data(values)
        file.set_volume()
        file.voxel_size = pixel_size_angstrom
        # in place of mrcfile's time of writing, so that equal volumes are equal files
        header: Any = file.header
        header.nlabl = 1
        header.label[:] = b""
        header.label[0] = b"aceray"


def read_volume(path: Location | str) -> tuple[Float[Tensor, "d d d"], float]:
    """A cubic volume (z, y, x) and its pixel size in angstrom.

    Raises DataError for a file that is missing, no MRC volume, not cubic, without a pixel size or not finite.
    """
    values, voxel, axes = _read(location(path))
    if values.ndim != 3 or len(set(values.shape)) != 1:
        raise DataError(f"{path}: holds an array of shape {values.shape}; aceray needs a cubic volume.")
    pixel_size = float(voxel[0])
    if not pixel_size > 0 or not np.allclose(voxel, pixel_size, rtol=1e-4):
        raise DataError(f"{path}: its voxel size is {voxel} A; aceray needs one positive pixel size in the header.")
    if sorted(axes) != [1, 2, 3]:
        raise DataError(
            f"{path}: MAPC, MAPR, MAPS are {axes}, which is no order of the axes 1, 2, 3: repair the header."
        )
    column, row, section = axes
    # the array's own axes are section, row, column; find where z (3), y (2) and x (1) are among them
    order = [section, row, column]
    values = np.transpose(values, [order.index(axis) for axis in (3, 2, 1)])
    volume = torch.from_numpy(np.array(values, dtype=np.float32))
    if not torch.isfinite(volume).all():
        raise DataError(f"{path}: holds values that are not finite numbers; write the volume again.")
    return volume, pixel_size


def _read(path: Location) -> tuple[np.ndarray, tuple[float, float, float], list[int]]:
    try:
        with local_copy(path) as copy:
            check_length(copy, read_header(copy))
            return _content(copy)
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except ValueError as error:
        raise DataError(f"{path}: is not a readable MRC file ({error}).") from error


def _content(path: Path) -> tuple[np.ndarray, tuple[float, float, float], list[int]]:
    with mrcfile.open(path) as file:
        header: Any = file.header
        axes = [int(header.mapc), int(header.mapr), int(header.maps)]
        voxel = (float(file.voxel_size.x), float(file.voxel_size.y), float(file.voxel_size.z))
        return np.array(file.data), voxel, axes
