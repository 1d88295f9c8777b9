"""Stacks of particle images as MRC files: finding them, their headers (mrcfile), and reading single images."""

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from aceray.data.location import Location
from aceray.data.mrc_header import Compression, opened, read_header
from aceray.data.storage import storage_error, written_atomically
from aceray.errors import DataError

_READ_AT_ONCE = 16 * 2**20  # bytes of neighbouring images


@dataclass(frozen=True)
class StackFile:
    """An MRC stack: `images` as its header says, of which `complete` are whole in the file.

    `dtype` is NumPy's name with the byte order; `offset` the bytes before the first image. A compressed stack must be
    unpacked before it is read.
    """

    path: Location
    images: int
    complete: int
    box: int
    dtype: str
    offset: int
    pixel_size_angstrom: float | None
    compression: Compression | None

    @property
    def image_bytes(self) -> int:
        return self.box * self.box * np.dtype(self.dtype).itemsize


def open_stack(path: Location) -> StackFile:
    """Read the header of a stack (.mrcs, or .mrc that is a stack), of any byte order, modes 0, 1, 2, 6 and 12.

    Raises DataError when the file cannot be read, is no MRC file, holds complex numbers or images that are not square.
    """
    header = read_header(path)
    record, dtype, offset, compression = header.record, header.dtype, header.offset, header.compression
    sides = (int(record.nx), int(record.ny), int(record.nz))
    width, sampling = float(record.cella.x), int(record.mx)
    if dtype.kind == "c":
        raise DataError(f"{path}: holds complex numbers (mode 4); aceray needs images in real space.")
    if sides[0] != sides[1] or min(sides) < 1:
        raise DataError(f"{path}: holds {sides[2]} images of {sides[0]} x {sides[1]} px; aceray needs square ones.")
    pixel_size = width / sampling if sampling > 0 else 0.0
    stated = pixel_size if np.isfinite(pixel_size) and pixel_size > 0 else None
    stack = StackFile(path, sides[2], sides[2], sides[0], dtype.str, offset, stated, compression)
    if compression is not None:
        return stack
    whole = (path.stat().st_size - offset) // stack.image_bytes
    return StackFile(path, sides[2], max(0, min(sides[2], whole)), sides[0], dtype.str, offset, stated, None)


def unpack(stack: StackFile, target: Path) -> StackFile:
    """Write a compressed stack's content to `target`; a stream that breaks off leaves what came before it.

    Raises DataError when a disk refuses.
    """
    with written_atomically(target) as temporary, open(temporary, "wb") as out:
        try:
            with opened(stack.path, stack.compression) as stream:
                # read1: what was unpacked before the break is returned, not thrown away with the error
                while part := stream.read1(2**18):
                    out.write(part)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            pass  # images that are missing are found when the header is compared with the length
    return open_stack(target)


def read_images(stack: StackFile, index: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n d d"]:
    """Images of an unpacked stack as float32, in the order of `index`, which counts from 0.

    Each is read from its own place in the file; neighbours together. All must be whole in the file. Raises DataError
    when the file cannot be read or has become shorter.
    """
    images = np.empty((len(index), stack.box, stack.box), dtype=np.float32)
    try:
        with open(stack.path, "rb", buffering=0) if isinstance(stack.path, Path) else stack.path.open_input() as stream:
            for rows, first, count in _runs(stack, index):
                stream.seek(stack.offset + first * stack.image_bytes)
                raw = stream.read(count * stack.image_bytes)
                pixels = np.frombuffer(raw, dtype=stack.dtype)
                if len(pixels) != count * stack.box**2:
                    raise DataError(f"{stack.path}: has become shorter while it was read; copy it again.")
                images[rows] = pixels.reshape(count, stack.box, stack.box)
    except OSError as error:
        raise storage_error(stack.path, error, "read") from error
    return images


def _runs(stack: StackFile, index: Int[np.ndarray, "n"]) -> Iterator[tuple[np.ndarray, int, int]]:
    """Groups of neighbours in the file: where they go, the first one's number, and how many."""
    order = np.argsort(index, kind="stable")
    most = max(1, _READ_AT_ONCE // stack.image_bytes)
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and index[order[end]] == index[order[end - 1]] + 1 and end - start < most:
            continue
        yield order[start:end], int(index[order[start]]), end - start
        start = end


def _normal(path: Location) -> Location:
    return Path(os.path.normpath(path)) if isinstance(path, Path) else path


def _within(path: Location, folder: Location) -> bool:
    return isinstance(path, Path) == isinstance(folder, Path) and path.is_relative_to(folder)  # pyright: ignore


class StackFinder:
    """Where the stacks are that a metadata file names.

    A name is tried as given, relative to the metadata file's folder, then below `datadir`, then by its base name alone
    in `datadir`. A leading `>` (cryoSPARC) is no part of it. A file outside the working directory, the metadata file's
    folder and `datadir` is never opened, whatever the name says.
    """

    def __init__(self, metadata: Location, datadir: Location | None = None) -> None:
        self.metadata = _normal(metadata.absolute())
        self.datadir = None if datadir is None else _normal(datadir.expanduser().absolute())
        self.here = Path.cwd()

    @property
    def allowed(self) -> list[Location]:
        """Folders that a name may lead into."""
        return [self.here, self.metadata.parent, *([self.datadir] if self.datadir else [])]

    def find(self, name: str) -> Location:
        """The file of a name. Raises DataError, with the option that helps, when it is missing or not allowed."""
        plain = name.removeprefix(">").strip()
        outside = None
        for candidate in self._candidates(plain):
            # by its name alone: links that somebody put into an allowed folder are followed
            path = _normal(candidate)
            if not any(_within(path, folder) for folder in self.allowed):
                outside = outside or (path if isinstance(path, Path) and _is_file(path) else None)
            elif _is_file(path):
                return path
        if outside is not None:
            raise DataError(
                f"{self.metadata}: names {plain}, which is outside its folder; if that is right, give --datadir "
                f"{outside.parent}."
            )
        raise DataError(f"{self.metadata}: names the stack {plain}, which is not there; {self._advice(plain)}.")

    def _candidates(self, plain: str) -> Iterator[Location]:
        yield self.here / plain
        yield self.metadata.parent / plain
        if self.datadir is not None:
            yield self.datadir / plain.lstrip("/")
            yield self.datadir / Path(plain).name

    def _advice(self, plain: str) -> str:
        """The folder above the metadata file from which a project's relative names are right, if there is one."""
        for folder in self.metadata.parent.parents:
            if not Path(plain).is_absolute() and _is_file(folder / plain):
                return f"give --datadir {folder}"
        return "give its folder with --datadir"


def _is_file(path: Location) -> bool:
    """Whether there is such a file; a name too long for the system is that of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
