"""Writing files so that a final name never holds half a file, and saying plainly why one could not be written."""

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aceray.errors import DataError

_ADVICE = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "free some of the quota or choose a folder on another disk",
    errno.EACCES: "choose a folder you may write to, or change its permissions",
    errno.EPERM: "choose a folder you may write to, or change its permissions",
    errno.EROFS: "choose a folder on a disk that is not read-only",
    errno.ENOENT: "there is no such folder or file; check the path, which every machine that takes part must see",
    errno.ENOTDIR: "a file is in the way: choose another folder",
    errno.EEXIST: "a file is in the way: choose another folder",
    errno.ENOTEMPTY: "something else was put there meanwhile: choose another folder",
}


def storage_error(path: Path | str, error: OSError, doing: str = "write") -> DataError:
    """The DataError of a failed reading or writing: where, what the system said, what to do."""
    advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
    return DataError(f"{path}: cannot {doing} it ({error.strerror or error}); {advice}.")


def hidden_sibling(path: Path) -> Path:
    """A name beside `path`, hidden and not taken, for what is not finished yet."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it is flushed to disk and takes the name `path`.

    The folder must exist. Raises DataError when the system refuses; whatever goes wrong, the sibling is removed and
    `path` is as it was.
    """
    temporary = hidden_sibling(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(path, error, "read") from error
