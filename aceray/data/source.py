"""An input of real particles, of whatever program: its typed table, its stacks, and all that is wrong with it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from aceray.data.cryosparc import load_array, particles_from_cs, read_record_array, with_passthrough
from aceray.data.location import Location
from aceray.data.particle_table import POSE_COLUMNS, Findings, ParticleTable, check_values
from aceray.data.pose_files import unpickle_arrays
from aceray.data.stacks import StackFile, StackFinder, open_stack
from aceray.data.star import StarFile, particles_from_star, read_star_file
from aceray.data.storage import storage_error
from aceray.em.random import named_generator
from aceray.em.rotation import relion_from_rotation
from aceray.errors import DataError

STACK_ENDINGS = (".mrcs", ".mrc", ".gz", ".bz2")
_NAMED_ERRORS = 5  # stacks that are named one by one
_THREADS = 16


@dataclass(frozen=True)
class SourceFiles:
    """What the user points at: a .star, .cs, .txt or stack, and what belongs to it.

    `ctf` and `poses` are cryoDRGN's pickles for inputs that have none; `passthrough` .cs files with further columns;
    `pixel_size_angstrom` overrules the input's.
    """

    path: Location
    datadir: Location | None = None
    passthrough: tuple[Location, ...] = ()
    ctf: Path | None = None
    poses: Path | None = None
    pixel_size_angstrom: float | None = None


@dataclass(frozen=True)
class Source:
    """Particles and their stacks: `stacks` are those of `table.stack_names`, None where one is missing or no stack.

    `original` is the file as its program wrote it, where it is more than a list of stacks.
    """

    files: SourceFiles
    table: ParticleTable
    stacks: tuple[StackFile | None, ...]
    original: StarFile | np.ndarray | None


def open_source(files: SourceFiles, findings: Findings) -> Source:
    """Read an input and the headers of all its stacks; what is wrong is collected in `findings`.

    Raises DataError only for what leaves no particles to look at: the file is missing or of no known kind.
    """
    suffix = files.path.suffix.lower()
    original: StarFile | np.ndarray | None = None
    if suffix not in (".star", ".cs", ".txt", *STACK_ENDINGS):
        raise DataError(f"{files.path}: has no known ending; give a .star, .cs, .txt (list of stacks), .mrcs or .mrc.")
    if suffix == ".star":
        original = read_star_file(files.path)
        table = particles_from_star(original, findings)
    elif suffix == ".cs":
        original = with_passthrough(files.path, read_record_array(files.path), files.passthrough)
        table = particles_from_cs(files.path, original, findings)
    else:
        names = _listed(files.path) if suffix == ".txt" else [str(files.path.absolute())]
        stacks = _open_stacks(files, names, findings)
        return _completed(files, _whole_stacks(names, stacks), stacks, None, findings)
    return _completed(files, table, _open_stacks(files, table.stack_names, findings), original, findings)


def _listed(path: Location) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except ValueError as error:
        raise DataError(f"{path}: is no list of stacks in UTF-8 ({error}); write one name a line.") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path}: lists no stacks; write one name a line.")
    return names


def _open_stacks(files: SourceFiles, names: Sequence[str], findings: Findings) -> tuple[StackFile | None, ...]:
    """Headers of the stacks, many at a time; the first few errors are noted in full, then their number."""
    finder = StackFinder(files.path, files.datadir)

    def opened(name: str) -> StackFile | DataError:
        try:
            return open_stack(finder.find(name))
        except DataError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(opened, names))
    errors = [each for each in found if isinstance(each, DataError)]
    findings.errors.extend(error.line for error in errors[:_NAMED_ERRORS])
    if len(errors) > _NAMED_ERRORS:
        findings.errors.append(
            f"{files.path}: {len(errors) - _NAMED_ERRORS} more of {len(names)} stacks cannot be read."
        )
    return tuple(None if isinstance(each, DataError) else each for each in found)


def _whole_stacks(names: Sequence[str], stacks: Sequence[StackFile | None]) -> ParticleTable:
    """All images of stacks that nothing is known of."""
    counts = [0 if stack is None else stack.images for stack in stacks]
    total = sum(counts)
    return ParticleTable(
        stack_names=tuple(names),
        stack=np.repeat(np.arange(len(names)), counts),
        stack_index=np.concatenate([np.arange(count) for count in counts]),
        source_row=np.arange(total),
        pixel_size_angstrom=np.full(total, np.nan),
    )


def _completed(
    files: SourceFiles,
    table: ParticleTable,
    stacks: tuple[StackFile | None, ...],
    original: StarFile | np.ndarray | None,
    findings: Findings,
) -> Source:
    """The table with what else is known: the given CTFs, poses and pixel size, and the stacks' headers."""
    if files.ctf is not None:
        table = _with_ctf(table, files.ctf)
    table = _with_pixel_size(table, files, stacks, findings)
    if files.poses is not None:
        table = _with_poses(table, files.poses, stacks)
    check_values(table, files.path, findings)
    place = table.stack * (int(table.stack_index.max(initial=0)) + 1) + table.stack_index
    if repeated := len(place) - len(np.unique(place)):
        findings.warnings.append(f"{files.path}: {repeated} rows repeat the image of another row; they are kept.")
    return Source(files, table, stacks, original)


def _with_pixel_size(
    table: ParticleTable, files: SourceFiles, stacks: tuple[StackFile | None, ...], findings: Findings
) -> ParticleTable:
    """The stated pixel size; where there is none that of the stack's header, which is a warning."""
    size = table.pixel_size_angstrom
    if files.pixel_size_angstrom is not None:
        return table.replace(pixel_size_angstrom=np.full(len(table), files.pixel_size_angstrom))
    wrong = np.isfinite(size) & (size <= 0)
    unknown = ~np.isfinite(size) | wrong
    if not unknown.any():
        return table
    headers = np.array([np.nan if stack is None else stack.pixel_size_angstrom or np.nan for stack in stacks])
    size = np.where(unknown, headers[table.stack], size)
    left = ~np.isfinite(size) & np.array([stack is not None for stack in stacks])[table.stack]
    if left.any():
        findings.errors.append(
            f"{files.path}: no pixel size for {int(left.sum())} particles, nor in their stacks' headers; give "
            "--pixel-size ANGSTROM."
        )
    elif np.isfinite(size).any():
        found = sorted({round(float(each), 4) for each in size[unknown & np.isfinite(size)]})
        findings.warnings.append(
            f"{files.path}: the pixel size ({', '.join(f'{each:g}' for each in found[:3])} A) is from the stacks' "
            "headers, which are often wrong; give --pixel-size ANGSTROM if it is."
        )
    return table.replace(pixel_size_angstrom=size)


def _with_ctf(table: ParticleTable, path: Path) -> ParticleTable:
    """CTFs of cryoDRGN's ctf.pkl: rows of box, pixel size, defocus U, V, angle, kV, Cs, amplitude contrast, phase."""
    values = unpickle_arrays(path)[0].astype(np.float64)
    if values.shape != (len(table), 9):
        raise DataError(
            f"{path}: has the shape {values.shape} instead of ({len(table)}, 9); give cryoDRGN's ctf.pkl of this input."
        )
    names = (
        "defocus_u_angstrom", "defocus_v_angstrom", "astigmatism_deg", "voltage_kv", "spherical_aberration_mm",
        "amplitude_contrast", "phase_shift_deg",
    )  # fmt: skip
    return table.replace(ctf=dict(zip(names, values.T[2:], strict=True)), pixel_size_angstrom=values[:, 1])


def _with_poses(table: ParticleTable, path: Path, stacks: tuple[StackFile | None, ...]) -> ParticleTable:
    """Poses of cryoDRGN's pose.pkl: rotations n 3 3 and, where it has them, translations as fractions of the box."""
    parts = unpickle_arrays(path)
    rotation = torch.from_numpy(parts[0].astype(np.float64))
    fraction = parts[1].astype(np.float64) if len(parts) == 2 else np.zeros((len(table), 2))
    if rotation.shape != (len(table), 3, 3) or fraction.shape != (len(table), 2):
        raise DataError(f"{path}: does not hold one pose for each of {len(table)} particles; give that of this input.")
    width = np.array([0 if stack is None else stack.box for stack in stacks])[table.stack] * table.pixel_size_angstrom
    # cryoDRGN moves the image by +t to centre it, as RELION's origin does
    values = (*(angle.numpy() for angle in relion_from_rotation(rotation)), *(fraction * width[:, None]).T)
    return table.replace(pose=dict(zip(POSE_COLUMNS, values, strict=True)))


def refused_by_header(source: Source) -> dict[int, str]:
    """Rows of the table whose images cannot be there, with the reason: beyond the end of a stack or of its file."""
    table = source.table
    images = np.array([-1 if stack is None else stack.images for stack in source.stacks])[table.stack]
    complete = np.array([-1 if stack is None else stack.complete for stack in source.stacks])[table.stack]
    reasons = {}
    for row in np.flatnonzero(table.stack_index >= complete):
        if images[row] >= 0:
            beyond = table.stack_index[row] >= images[row]
            reasons[int(row)] = f"the stack has only {images[row]} images" if beyond else "the file is truncated"
    return reasons


def subset_rows(text: str | None, particles: int, seed: int) -> Int[np.ndarray, "m"]:
    """Rows, ascending, that `--subset` means: a number to draw, FIRST:LAST (from 1), or a file of rows from 0.

    The file is text, a NumPy array or a pickled one (cryoDRGN's ind.pkl). Raises DataError when it means no rows.
    """
    if text is None:
        return np.arange(particles)
    if text.isdigit():
        count = min(int(text), particles)
        drawn = torch.randperm(particles, generator=named_generator("prepare/subset", seed))[:count]
        rows = np.sort(drawn.numpy())
    elif (parts := text.split(":"))[1:] and len(parts) == 2 and all(part.isdigit() or not part for part in parts):
        rows = np.arange(particles)[int(parts[0] or 1) - 1 : int(parts[1] or particles)]
    else:
        rows = np.unique(_rows_of_file(Path(text).expanduser()))
    if len(rows) == 0 or rows[0] < 0 or rows[-1] >= particles:
        raise DataError(f"--subset {text}: names no rows, or rows beyond the {particles} particles; correct it.")
    return rows


def _rows_of_file(path: Path) -> Int[np.ndarray, "m"]:
    try:
        if path.suffix == ".pkl":
            values = unpickle_arrays(path)[0]
        elif path.suffix == ".npy":
            values = load_array(path)
        else:
            values = np.array(path.read_text(encoding="utf-8").split(), dtype=np.int64)
    except OSError as error:
        raise storage_error(path, error, "read") from error
    except ValueError as error:
        raise DataError(f"{path}: holds no row numbers ({error}); give text, .npy or .pkl of whole numbers.") from error
    if values.dtype.kind not in "iu":
        raise DataError(f"{path}: holds no whole numbers; give text, .npy or .pkl of row numbers from 0.")
    return values.astype(np.int64).ravel()
