"""Simulated particle images of an atomic model: slice, CTF, shift, noise, from random streams of their own."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.atoms import Atoms, density, gaussian_envelope, read_atoms, structure_factors
from aceray.data.manifest import IMAGE_BYTES, ImageLayout
from aceray.data.particles import CTF_UNITS
from aceray.data.pose_files import read_star
from aceray.data.storage import sha256_of_file, storage_error
from aceray.data.writer import max_rows_per_shard
from aceray.em.ctf import CtfParameters, b_factor_envelope, ctf_on_disc
from aceray.em.formation import noise_std_for_snr, shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, relion_from_rotation, rotation_from_relion
from aceray.errors import ConfigError, DataError

POSES, SHIFTS, CTFS, NOISE = "simulate/poses", "simulate/shifts", "simulate/ctfs", "simulate/noise"
ANGLES = ("rot_deg", "tilt_deg", "psi_deg")
ORIGINS = ("origin_x_angstrom", "origin_y_angstrom")

# Changes of the images that a recipe gives make older sets of the same recipe different ones.
_METHOD = 1
_SHIFT_CLIP_SIGMA = 5.0
_SCALE_SAMPLE = 512  # particles whose mean variance sets the scale
_SCALE_STREAM = -1
_IMAGES_PER_CHUNK = 256
_PADDED_BOX = 384  # side of the padded transform: 0.23 GB; padding is between 2 and 8


@dataclass(frozen=True)
class CtfRanges:
    """Defocus N(mean, std) clipped to [min, max]; difference of both defoci and its angle uniform; the rest fixed."""

    defocus_mean_angstrom: float = 20222.0
    defocus_std_angstrom: float = 4429.0
    defocus_min_angstrom: float = 8112.0
    defocus_max_angstrom: float = 38474.0
    astigmatism_max_angstrom: float = 500.0
    voltage_kv: float = 300.0
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.1
    b_factor_angstrom_sq: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything a simulated dataset depends on. Raises ConfigError for a value that makes no sense.

    `pose_table` and `ctf_table` name STAR or Parquet files whose row i holds the pose (angles, and origins where it has
    them) or the CTF of particle i; without them poses are uniform and CTFs drawn from `ctf` (None: no CTF).
    """

    model: str = "5NRL"
    box: int = 32
    pixel_size_angstrom: float = 17.0
    particles: int = 5000
    snr_db: float = 0.0
    shift_sigma_fraction: float = 0.03
    density_width_px: float = 0.67
    ctf: CtfRanges | None = None
    seed: int = 1
    image_dtype: str = "float16"
    rows_per_shard: int = 1024
    pose_table: str | None = None
    ctf_table: str | None = None

    def __post_init__(self) -> None:
        wrong = {
            "snr_db": "is not a finite number of decibels; 200 is noise-free" if not _finite(self.snr_db) else "",
            "box": "is not an even number of pixels of at least 8" if self.box < 8 or self.box % 2 else "",
            "pixel_size_angstrom": _unless_positive(self.pixel_size_angstrom),
            "density_width_px": _unless_positive(self.density_width_px),
            "shift_sigma_fraction": _unless_positive(self.shift_sigma_fraction, zero=True),
            "particles": "is less than one" if self.particles < 1 else "",
            "rows_per_shard": "is less than one" if self.rows_per_shard < 1 else "",
            "image_dtype": "is neither float16 nor float32" if self.image_dtype not in IMAGE_BYTES else "",
        }
        for name, problem in wrong.items():
            if problem:
                raise ConfigError(f"simulation.{name}: {getattr(self, name)} {problem}.")

    @property
    def layout(self) -> ImageLayout:
        """What the images have in common."""
        has_ctf = self.ctf is not None or self.ctf_table is not None
        return ImageLayout(self.box, self.pixel_size_angstrom, has_ctf, self.image_dtype)

    @property
    def shards(self) -> list[range]:
        """Particles of each shard, a shard being at most 256 MiB."""
        rows = min(self.rows_per_shard, max_rows_per_shard(self.layout))
        return [range(start, min(start + rows, self.particles)) for start in range(0, self.particles, rows)]

    def sha256(self) -> str:
        """Digest of the recipe and of the files it names: equal digests give equal images."""
        files = {name: self._file_digest(name) for name in ("model", "pose_table", "ctf_table")}
        text = json.dumps([_METHOD, dataclasses.asdict(self), files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _file_digest(self, name: str) -> str | None:
        path = Path(getattr(self, name) or "").expanduser()
        return sha256_of_file(path) if path.is_file() else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _unless_positive(value: float, zero: bool = False) -> str:
    good = _finite(value) and (value > 0 or (zero and value == 0))
    return "" if good else "is not a " + ("number from zero on" if zero else "positive number")


@dataclass(frozen=True)
class Plan:
    """What all shards share: computed once, then sent to wherever shards are made."""

    recipe: Recipe
    molecule: str
    transform: Float[Tensor, "2 m m h"]  # padded transform of the scaled atoms
    volume: Float[Tensor, "d d d"]  # scaled density, the truth
    table: dict[str, Tensor]  # given columns, one row a particle
    noise_std: float


@dataclass(frozen=True)
class Draw:
    """What is random about particles apart from their noise."""

    angles_deg: Float[Tensor, "n 3"]  # float64, as stored
    shift_px: Float[Tensor, "n 2"]  # float64
    ctf: CtfParameters | None


def plan(recipe: Recipe) -> Plan:
    """Read the model and the tables, and find the scale that gives the clean images unit variance.

    Clean means modulated by CTF and shift, over the full box; the variance is the mean over 512 particles drawn for
    this purpose from the same distribution. Raises DataError when the model or a table cannot be used.
    """
    atoms = read_atoms(recipe.model)
    table = _read_tables(recipe)
    volume = density(
        atoms, recipe.box, recipe.pixel_size_angstrom, recipe.density_width_px * recipe.pixel_size_angstrom
    )
    pad = max(2, min(8, _PADDED_BOX // recipe.box))
    transform = slice_transform(atoms, recipe.box, recipe.pixel_size_angstrom, pad)
    unscaled = Plan(recipe, atoms.name, transform, volume.float(), table, 0.0)
    rows = torch.linspace(0, recipe.particles - 1, _SCALE_SAMPLE).long()
    with _one_thread():
        clean = torch.cat([images for images, _ in _clean_images(unscaled, rows, _SCALE_STREAM)])
        scale = float(clean.flatten(1).var(dim=1, correction=0).mean().rsqrt())
    return dataclasses.replace(
        unscaled,
        transform=transform * scale,
        volume=unscaled.volume * scale,
        noise_std=noise_std_for_snr(1.0, recipe.snr_db),
    )


def slice_transform(atoms: Atoms, box: int, pixel_size_angstrom: float, pad: int) -> Float[Tensor, "2 m m h"]:
    """Transform of the point atoms, laid out for `em.projection.central_slice`.

    The weights are corrected for trilinear interpolation at each atom's own position, and the atoms' Gaussian is left
    to the slice, so neither a band limit nor the edge of a box comes before the interpolation. What is left is the
    interpolation's own error: for PDB 5NRL 0.13% padded eightfold, 0.7% threefold, 1.8% twofold.
    """
    correction = torch.sinc(atoms.position_angstrom / (pad * box * pixel_size_angstrom)).square().prod(dim=1)
    weight = (atoms.atomic_number / (correction * box)).float()
    return (
        torch.view_as_real(structure_factors(atoms, weight, box, pixel_size_angstrom, pad)).movedim(-1, 0).contiguous()
    )


def simulate_shard(plan: Plan, shard: int) -> tuple[Float[Tensor, "n d d"], dict[str, np.ndarray]]:
    """Images of one shard and the columns to store with them; nothing but the plan and the shard's number matters."""
    recipe = plan.recipe
    rows = torch.tensor(recipe.shards[shard])
    generator = named_generator(NOISE, recipe.seed, shard)
    images, draws = torch.empty(len(rows), recipe.box, recipe.box), []
    done = 0
    with _one_thread():
        for clean, draw in _clean_images(plan, rows, shard):
            noise = torch.randn(clean.shape, generator=generator)
            images[done : done + len(clean)] = clean + plan.noise_std * noise
            draws.append(draw)
            done += len(clean)
    return images, _columns(recipe, rows, draws)


def _columns(recipe: Recipe, rows: Tensor, draws: list[Draw]) -> dict[str, np.ndarray]:
    columns = {"particle_id": rows.numpy(), "half_set": (1 + rows % 2).to(torch.int8).numpy()}
    angles = torch.cat([draw.angles_deg for draw in draws])
    origins = -torch.cat([draw.shift_px for draw in draws]) * recipe.pixel_size_angstrom
    columns |= {f"true_{name}": values.numpy() for name, values in zip(ANGLES, angles.T, strict=True)}
    columns |= {f"true_{name}": values.numpy() for name, values in zip(ORIGINS, origins.T, strict=True)}
    ctf = [draw.ctf for draw in draws if draw.ctf is not None]
    if ctf:
        joined = CtfParameters.concatenate(ctf)
        columns |= {name: getattr(joined, name).numpy() for name in CTF_UNITS}
    return columns


def _clean_images(plan: Plan, rows: Int[Tensor, "n"], stream: int) -> Iterator[tuple[Tensor, Draw]]:
    """Noise-free images of particles, some at a time: slice, CTF, shift."""
    recipe = plan.recipe
    disc = HalfDisc(recipe.box)
    envelope = gaussian_envelope(disc.radius.square(), recipe.box, recipe.density_width_px)
    if recipe.ctf is not None:
        frequency = disc.frequency / (recipe.box * recipe.pixel_size_angstrom)
        envelope = envelope * b_factor_envelope(frequency, recipe.ctf.b_factor_angstrom_sq)
    drawn = _draw(plan, rows, stream)
    for part in torch.arange(len(rows)).split(_IMAGES_PER_CHUNK):
        ctf = None if drawn.ctf is None else drawn.ctf.take(part)
        draw = Draw(drawn.angles_deg[part], drawn.shift_px[part], ctf)
        rotation = rotation_from_relion(*draw.angles_deg.unbind(1)).float()
        coefficients = central_slice(plan.transform, rotation, disc) * envelope
        if ctf is not None:
            coefficients = coefficients * ctf_on_disc(ctf, disc, recipe.pixel_size_angstrom)
        yield disc.scatter(coefficients * shift_phase(disc, draw.shift_px.float())), draw


def _draw(plan: Plan, rows: Int[Tensor, "n"], stream: int) -> Draw:
    """Poses, shifts and CTFs of particles: drawn from the streams of this number, or rows of the given tables."""
    recipe, table = plan.recipe, plan.table
    if ANGLES[0] in table:
        angles = torch.stack([table[name][rows] for name in ANGLES], dim=1)
    else:
        rotation = random_rotations(len(rows), named_generator(POSES, recipe.seed, stream))
        angles = torch.stack(relion_from_rotation(rotation.double()), dim=1)
    if ORIGINS[0] in table:
        shift_px = -torch.stack([table[name][rows] for name in ORIGINS], dim=1) / recipe.pixel_size_angstrom
    else:
        generator = named_generator(SHIFTS, recipe.seed, stream)
        normal = torch.randn(len(rows), 2, generator=generator).double().clamp(-_SHIFT_CLIP_SIGMA, _SHIFT_CLIP_SIGMA)
        shift_px = normal * (recipe.shift_sigma_fraction * recipe.box)
    return Draw(angles, shift_px, _draw_ctf(plan, rows, stream))


def _draw_ctf(plan: Plan, rows: Int[Tensor, "n"], stream: int) -> CtfParameters | None:
    if "defocus_u_angstrom" in plan.table:
        return CtfParameters(**{name: plan.table[name][rows].float() for name in CTF_UNITS})
    ranges = plan.recipe.ctf
    if ranges is None:
        return None
    generator = named_generator(CTFS, plan.recipe.seed, stream)
    defocus = ranges.defocus_mean_angstrom + ranges.defocus_std_angstrom * torch.randn(len(rows), generator=generator)
    defocus = defocus.clamp(ranges.defocus_min_angstrom, ranges.defocus_max_angstrom)
    difference, turn = torch.rand(2, len(rows), generator=generator)
    difference = ranges.astigmatism_max_angstrom * difference
    return CtfParameters(
        defocus_u_angstrom=defocus + difference / 2,
        defocus_v_angstrom=defocus - difference / 2,
        astigmatism_deg=180 * turn,
        phase_shift_deg=torch.zeros(len(rows)),
        voltage_kv=torch.full((len(rows),), ranges.voltage_kv),
        spherical_aberration_mm=torch.full((len(rows),), ranges.spherical_aberration_mm),
        amplitude_contrast=torch.full((len(rows),), ranges.amplitude_contrast),
    )


def _read_tables(recipe: Recipe) -> dict[str, Tensor]:
    table: dict[str, Tensor] = {}
    if recipe.pose_table is not None:
        table |= _read_table(recipe.pose_table, (*ANGLES, *ORIGINS), ANGLES, recipe.particles)
    if recipe.ctf_table is not None:
        if not Path(recipe.ctf_table).expanduser().exists():
            raise DataError(
                f"simulation.ctf_table: {recipe.ctf_table} is not there; give a particle STAR file, such as "
                "shiny_2sets.star of EMPIAR-10028, or a Parquet table (conf/README.md makes one of cryoDRGN's ctf.pkl)."
            )
        needed = tuple(name for name in CTF_UNITS if name != "phase_shift_deg")
        found = _read_table(recipe.ctf_table, CTF_UNITS, needed, recipe.particles)
        table |= {"phase_shift_deg": torch.zeros_like(found[needed[0]])} | found
    return table


def _read_table(path: str, names: Collection[str], needed: Sequence[str], particles: int) -> dict[str, Tensor]:
    """Those of the named columns that a STAR or Parquet file has. Raises DataError when it cannot serve."""
    file = Path(path).expanduser()
    columns = read_star(file, names) if file.suffix == ".star" else _read_parquet(file, names)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(f"{path}: lacks the column {missing[0]} (or its RELION name); {', '.join(needed)} are needed.")
    rows = len(columns[needed[0]])
    if rows < particles:
        raise DataError(f"{path}: has {rows} rows for {particles} particles; set simulation.particles={rows} or less.")
    for name, values in columns.items():
        if not torch.isfinite(values[:particles]).all():
            raise DataError(f"{path}: column {name} holds a value that is not a finite number; correct the file.")
    return columns


def _read_parquet(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    known = {prefix + name: name for prefix in ("true_", "") for name in names}
    try:
        stored = [name for name in pq.read_schema(path).names if name in known]
        table = pq.read_table(path, columns=stored)
        return {known[name]: torch.from_numpy(np.array(table[name].to_numpy(), dtype=np.float64)) for name in stored}
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet or STAR ({error}); check the file and its ending."
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """With one thread the order of sums, and so the last bit of an image, is the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
