"""Writing files so that a final name never holds half a file, and saying plainly why one could not be written."""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from aceray.data.location import Location, RemotePath, remote_trouble
from aceray.errors import DataError

_ADVICE = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EFBIG: "raise the limit of the file size (ulimit -f), or choose another folder",
    errno.EIO: "the disk fails: look at the system's log, and choose a folder on another disk",
    errno.EDQUOT: "free some of the quota or choose a folder on another disk",
    errno.EACCES: "choose a folder you may write to, or change its permissions",
    errno.EPERM: "choose a folder you may write to, or change its permissions",
    errno.EROFS: "choose a folder on a disk that is not read-only",
    errno.ENOENT: "there is no such folder or file; check the path, which every machine that takes part must see",
    errno.ENOTDIR: "a file is in the way: choose another folder",
    errno.EEXIST: "a file is in the way: choose another folder",
    errno.ENOTEMPTY: "something else was put there meanwhile: choose another folder",
}


def storage_error(path: Location | str, error: OSError, doing: str = "write") -> DataError:
    """The DataError of a failed reading or writing: where, what the system said, what to do."""
    if (known := remote_trouble(path, error)) is not None and not isinstance(path, Path):
        return DataError(known)
    if isinstance(path, RemotePath):
        return DataError(f"{path}: cannot {doing} it ({' '.join(str(error).split())[:200]}); check the path.")
    advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
    return DataError(f"{path}: cannot {doing} it ({error.strerror or error}); {advice}.")


def hidden_sibling(path: Location) -> Location:
    """A name beside `path`, hidden and not taken, for what is not finished yet."""
    return path.with_name(_hidden(path.name))


def _hidden(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex[:12]}.partial"


@contextmanager
def written_atomically(path: Location) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it is flushed to disk and takes the name `path`.

    The folder must exist. Raises DataError when the system refuses; whatever goes wrong, the sibling is removed and
    `path` is as it was. For a remote path the temporary file is a local one, uploaded at the end.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="aceray-") as folder:
            yield Path(folder) / path.name
            try:
                path.upload(Path(folder) / path.name)
            except OSError as error:
                raise storage_error(path, error) from error
        return
    temporary = path.with_name(_hidden(path.name))
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


def append_line(path: Path, file: FileIO, line: str) -> None:
    """Add a line to the unbuffered `file`, whole or not at all; another process sees it when this returns.

    Raises DataError when the system refuses.
    """
    data, before = line.encode() + b"\n", os.fstat(file.fileno()).st_size
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(file.fileno(), before)  # half a line would spoil the next
        raise storage_error(path, error) from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the folder `path`, which need not exist yet, for this process alone; a kill lets go of it.

    Every machine that shares the folder sees the lock, unless its file system has none.

    Raises DataError when another process holds it, or none can be made beside it.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock, path)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _locked(lock: Path, path: Path) -> int:
    """Descriptor of the lock file, locked, and still the one that has this name."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path)
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                with suppress(OSError):  # a full disk: who holds it is then not told
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        except FileNotFoundError:
            pass  # it was let go of, and deleted, in this moment
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 100).decode(errors="replace") or "another process"
        raise DataError(
            f"{path}: {holder} writes here at this moment; nothing was touched. Wait for it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Location) -> str:
    """Hexadecimal SHA-256 of a file's content. Raises DataError when it cannot be read."""
    try:
        with open_binary(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(path, error, "read") from error


def open_binary(path: Location) -> Any:
    """A file object to read bytes from, at any place of the file."""
    return open(path, "rb") if isinstance(path, Path) else path.open_input()


@contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """The file itself where it is local, else a copy for as long as it is needed. Raises OSError."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="aceray-") as folder:
        copy = Path(folder) / path.name
        with path.open_input() as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target)
        yield copy


def remove_folder(path: Location) -> None:
    """Delete a folder with all that is in it, as far as the system lets us."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.remove_folder()
