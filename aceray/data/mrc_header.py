"""Headers of MRC files, read before anything they claim is believed."""

import bz2
import gzip
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mrcfile.utils
import numpy as np
from mrcfile.mrcinterpreter import MrcInterpreter

from aceray.data.location import Location
from aceray.data.storage import open_binary, storage_error
from aceray.errors import DataError

HEADER_BYTES = 1024
Compression = Literal["gzip", "bzip2"]
_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"BZ": "bzip2"}
_EXTENDED = slice(92, 96)  # the length of the extended header, NSYMBT
_READ_AT_ONCE = 2**20


@dataclass(frozen=True)
class MrcHeader:
    """What a header says: the record of mrcfile, the type of a value, and the bytes before the first one.

    `claimed_bytes` is the length the whole file must have for that.
    """

    record: Any
    dtype: np.dtype
    offset: int
    claimed_bytes: int
    compression: Compression | None


def read_header(path: Location) -> MrcHeader:
    """The header of an MRC file, packed or not, of either byte order. Only its 1024 bytes are read.

    Raises DataError when the file cannot be read, is no MRC file, or has lengths that no file can have.
    """
    try:
        with open_binary(path) as stream:
            compression = _MAGIC.get(stream.read(2))
        with opened(path, compression) as stream:
            head = bytearray(stream.read(HEADER_BYTES))
        stated = bytes(head[_EXTENDED])
        head[_EXTENDED] = bytes(4)  # mrcfile would allocate what it claims
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # old writers leave out the map name or machine stamp
            with MrcInterpreter(io.BytesIO(head), permissive=True, header_only=True) as file:
                record: Any = file.header
                dtype = mrcfile.utils.data_dtype_from_header(record)
    except (zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{path}: is not a readable MRC file ({error}); copy it again.") from error
    except OSError as error:
        raise storage_error(path, error, "read") from error
    extended = int(np.frombuffer(stated, record.nx.dtype)[0])
    values = int(record.nx) * int(record.ny) * int(record.nz)
    if extended < 0 or min(int(record.nx), int(record.ny), int(record.nz)) < 0:
        raise DataError(f"{path}: is not a readable MRC file (its header has negative lengths); copy it again.")
    offset = HEADER_BYTES + extended
    return MrcHeader(record, dtype, offset, offset + values * dtype.itemsize, compression)


def check_length(path: Location, header: MrcHeader) -> None:
    """Raise DataError unless the file is as long as its header claims, unpacked where it is packed."""
    found = 0
    try:
        if header.compression is None:
            found = path.stat().st_size
        else:
            with opened(path, header.compression) as stream:
                while found < header.claimed_bytes and (part := stream.read(_READ_AT_ONCE)):
                    found += len(part)
    except (zlib.error, EOFError, ValueError):
        pass  # it breaks off
    except OSError as error:
        raise storage_error(path, error, "read") from error
    if found < header.claimed_bytes:
        raise DataError(
            f"{path}: is not a readable MRC file (its header claims {header.claimed_bytes:,} bytes, it has {found:,}); "
            "copy it again."
        )


def opened(path: Location, compression: Compression | None) -> Any:
    """The unpacked content as a stream. Raises DataError for a packed file that is not local."""
    if compression is not None and not isinstance(path, Path):
        raise DataError(f"{path}: is compressed; unpack it, as aceray reads remote stacks in place.")
    match compression:
        case "gzip":
            return gzip.open(path, "rb")
        case "bzip2":
            return bz2.open(path, "rb")
        case None:
            return open_binary(path)
