"""Atomic models, and the band-limited density that a microscope would see of them."""

import gzip
import http.client
import math
import re
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import gemmi
import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.data.storage import storage_error
from aceray.errors import DataError

BUILT_IN = "5NRL"
_ARCHIVE = "https://files.rcsb.org/download/{identifier}.cif.gz"
_PDB_IDENTIFIER = re.compile(r"pdb:([0-9][A-Za-z0-9]{3}|pdb_[0-9A-Za-z]{8})", re.IGNORECASE)

# Gridding of the structure factors: twice the box, Kaiser-Bessel kernel of 6 points, its shape as of Beatty et al.
# (IEEE Trans. Med. Imaging 24, 799, 2005)
_OVERSAMPLING = 2
_KERNEL_PX = 6
_KERNEL_BETA = np.pi * np.sqrt((_KERNEL_PX / _OVERSAMPLING * (_OVERSAMPLING - 0.5)) ** 2 - 0.8)
_ATOMS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Atoms:
    """Atoms of a molecule, the centre of mass (weighted by atomic number) at the origin; float64."""

    position_angstrom: Float[Tensor, "n 3"]  # x, y, z
    atomic_number: Int[Tensor, "n"]
    name: str

    @property
    def radius_angstrom(self) -> float:
        """Distance of the outermost atom from the centre of mass."""
        return float(self.position_angstrom.norm(dim=1).max())


def read_atoms(model: str) -> Atoms:
    """Atoms of the built-in molecule ("5NRL"), of a PDB or mmCIF file (also .gz), or of an archive entry ("pdb:6VYB").

    The first model of the file as deposited: its hydrogens if it has any, the first of alternative conformations, no
    water. Raises DataError when there is no such file or entry, it cannot be read, is empty or has an unknown element.
    """
    if model.upper() == BUILT_IN:
        return _built_in()
    if model.lower().startswith("pdb:"):
        return _from_archive(model)
    path = Path(model).expanduser()
    if not path.is_file():
        raise DataError(
            f"{model}: there is no such file; give {BUILT_IN}, a .pdb, .ent or .cif file (also .gz), or an entry as "
            "pdb:6VYB."
        )
    return _from_file(path, f"{path.name}")


def _built_in() -> Atoms:
    file = resources.files("aceray.data").joinpath("models", "5nrl.npz")
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        position = arrays["position_hundredth_angstrom"].astype(np.float64) * 0.01
        return _centred(position, arrays["atomic_number"].astype(np.int64), f"PDB {BUILT_IN}")


def _from_archive(model: str) -> Atoms:
    match = _PDB_IDENTIFIER.fullmatch(model)
    if not match:
        raise DataError(f"{model}: is no PDB identifier; write pdb: and four letters, such as pdb:6VYB.")
    identifier = match[1].upper()
    address = _ARCHIVE.format(identifier=identifier)
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise DataError(f"{model}: {address} answers {error.code} {error.reason}; check the identifier.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{model}: cannot reach {address} ({reason}); without a network use {BUILT_IN} or the path of a file."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{identifier}.cif.gz"
        path.write_bytes(content)
        return _from_file(path, f"PDB {identifier}")


def _from_file(path: Path, name: str) -> Atoms:
    try:
        structure = gemmi.read_structure(str(path))
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except (RuntimeError, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read as PDB or mmCIF ({error}); check the file and its ending.") from error
    if not len(structure):
        raise DataError(f"{path}: holds no atoms; check that it is a PDB or mmCIF file.")
    structure.remove_alternative_conformations()
    structure.remove_waters()
    positions, numbers = [], []
    for site in structure[0].all():
        if site.atom.element.atomic_number == 0:
            raise DataError(
                f"{path}: atom {site.atom.name!r} of residue {site.residue.name} {site.residue.seqid} in chain "
                f"{site.chain.name} has no known element; correct the element column."
            )
        positions.append(site.atom.pos.tolist())
        numbers.append(site.atom.element.atomic_number)
    if not positions:
        raise DataError(f"{path}: holds no atoms apart from water; check that it is a PDB or mmCIF file.")
    position = np.array(positions, dtype=np.float64)
    if not np.isfinite(position).all():
        raise DataError(f"{path}: holds an atom whose position is not a number; correct the file.")
    return _centred(position, np.array(numbers, dtype=np.int64), name)


def _centred(position: np.ndarray, atomic_number: np.ndarray, name: str) -> Atoms:
    position = position - np.average(position, axis=0, weights=atomic_number)
    return Atoms(torch.from_numpy(position), torch.from_numpy(atomic_number), name)


def density(atoms: Atoms, box: int, pixel_size_angstrom: float, width_angstrom: float) -> Float[Tensor, "d d d"]:
    """Density of a molecule: a Gaussian of standard deviation `width_angstrom` and weight Z at each atom; float64.

    Band-limited to the sphere |k| < box/2, so that neither sampling it nor turning it aliases: the structure factors
    inside the sphere, times the Gaussian's transform, and nothing outside. Axes z, y, x; the centre of mass at box//2;
    the voxels sum to the sum of Z. Raises DataError when the molecule, turned in any way, does not fit the box.
    """
    _check_fit(atoms, box, pixel_size_angstrom, width_angstrom)
    spectrum = structure_factors(atoms, atoms.atomic_number.double(), box, pixel_size_angstrom)
    middle = box // 2
    axis = torch.arange(-middle, middle + 1)
    squared = axis.square()[:, None, None] + axis.square()[:, None] + axis[middle:].square()
    envelope = gaussian_envelope(squared.double(), box, width_angstrom / pixel_size_angstrom)
    spectrum = spectrum * (envelope * (4 * squared < box * box))
    order = torch.fft.fftfreq(box, 1 / box).round().long() + middle
    return torch.fft.fftshift(torch.fft.irfftn(spectrum[order][:, order], s=(box, box, box)))


def gaussian_envelope(frequency_squared: Float[Tensor, "..."], box: int, width_px: float) -> Float[Tensor, "..."]:
    """Transform of an atom's Gaussian at squared frequencies in (cycles per box)^2."""
    return torch.exp(-2 * (torch.pi * width_px / box) ** 2 * frequency_squared)


def structure_factors(
    atoms: Atoms, weight: Float[Tensor, "n"], box: int, pixel_size_angstrom: float, pad: int = 1
) -> Complex[Tensor, "m m h"]:
    """Sum of weight exp(-2 pi i k.r) over the atoms at frequencies k in steps of 1/pad cycles per box, to Nyquist.

    Axes kz, ky from -pad box/2 to +pad box/2 and kx from 0 to pad box/2. Transformed in the precision of the weights;
    Kaiser-Bessel gridding, its errors in float64 about 1e-8 of the factor at the origin for a large molecule.
    """
    fine = _OVERSAMPLING * box
    index = atoms.position_angstrom * (_OVERSAMPLING / pixel_size_angstrom) + fine // 2
    grid = _spread(index, weight.double(), fine).to(weight.dtype)
    half = torch.arange(pad * box // 2 + 1)
    full = torch.arange(-(pad * box // 2), pad * box // 2 + 1)
    # one axis after the other, each cut to what is kept, so that the padded grid never exists as a whole
    spectrum = torch.fft.rfft(grid, n=pad * fine, dim=2)[..., half]
    spectrum *= _axis_factor(half, box, pad)
    for dim in (1, 0):
        spectrum = torch.fft.fft(spectrum, n=pad * fine, dim=dim).index_select(dim, full % (pad * fine))
        spectrum *= _axis_factor(full, box, pad).reshape((-1, 1) if dim == 1 else (-1, 1, 1))
    return spectrum


def _axis_factor(k: Int[Tensor, "m"], box: int, pad: int) -> Complex[Tensor, "m"]:
    """Along one axis of the gridded transform: undoes the kernel and moves the origin to the grid's centre."""
    frequency = k.double() / (pad * _OVERSAMPLING * box)  # cycles per fine pixel
    argument = (_KERNEL_BETA**2 - (torch.pi * _KERNEL_PX * frequency).square()).sqrt()
    angle = 2 * torch.pi * frequency * (_OVERSAMPLING * box // 2)
    return torch.polar(argument / (_KERNEL_PX * argument.sinh()), angle)


def _spread(index: Float[Tensor, "n 3"], weight: Float[Tensor, "n"], size: int) -> Float[Tensor, "m m m"]:
    """Sum of Kaiser-Bessel kernels at fractional grid indices (x, y, z), periodic; axes z, y, x."""
    grid = torch.zeros(size**3, dtype=torch.float64)
    steps = torch.arange(_KERNEL_PX)
    for part, mass in zip(index.split(_ATOMS_PER_CHUNK), weight.split(_ATOMS_PER_CHUNK), strict=True):
        first = (part - _KERNEL_PX / 2).ceil().long()
        points = first[..., None] + steps
        distance = (points - part[..., None]) * (2 / _KERNEL_PX)
        kernel = torch.special.i0(_KERNEL_BETA * (1 - distance.square()).clamp_min(0).sqrt())
        x, y, z = (points % size).unbind(1)
        kernel_x, kernel_y, kernel_z = kernel.unbind(1)
        target = (z[:, :, None, None] * size + y[:, None, :, None]) * size + x[:, None, None, :]
        values = (mass[:, None] * kernel_z)[:, :, None, None] * kernel_y[:, None, :, None] * kernel_x[:, None, None, :]
        grid.index_add_(0, target.flatten(), values.flatten())
    return grid.reshape(size, size, size)


def _check_fit(atoms: Atoms, box: int, pixel_size_angstrom: float, width_angstrom: float) -> None:
    needed = 2 * (atoms.radius_angstrom + 3 * width_angstrom)
    if needed > box * pixel_size_angstrom:
        enough = 2 * math.ceil(needed / pixel_size_angstrom / 2)
        raise DataError(
            f"{atoms.name}: needs {needed:.0f} A in every direction, a box of {box} px of {pixel_size_angstrom:g} A "
            f"holds {box * pixel_size_angstrom:.0f} A; choose a box of {enough} px or larger pixels."
        )
