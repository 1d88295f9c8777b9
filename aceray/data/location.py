"""Files and folders on any file system that pyarrow knows: s3://, gs://, file:// and plain paths.

A remote place has the few methods of `pathlib.Path` that aceray uses. What is local is a Path.
"""

import functools
import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from pyarrow import ArrowException, fs

from aceray.errors import DataError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# no folders there: what has a common beginning is one
_OBJECT_STORES = ("s3", "gcs", "abfs")
_AT_ONCE = 2**22  # bytes of an upload
_ANONYMOUS = "anonymous"
_SECONDS_OF_TRYING = "60"  # Google's library tries for a quarter of an hour


@dataclass(frozen=True)
class RemotePath:
    """A file or folder `key` (bucket/name/…) of a pyarrow file system; scheme and query say of which."""

    scheme: str
    key: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}{'?' + self.query if self.query else ''}"

    def __truediv__(self, name: str) -> "RemotePath":
        return self._at(posixpath.normpath(posixpath.join(self.key, name)))

    def _at(self, key: str) -> "RemotePath":
        return RemotePath(self.scheme, key, self.query)

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.key)[1]

    @property
    def parent(self) -> "RemotePath":
        return self._at(posixpath.dirname(self.key))

    @property
    def parents(self) -> "list[RemotePath]":
        """The folders above, the bucket last."""
        parts = self.key.split("/")
        return [self._at("/".join(parts[:count])) for count in range(len(parts) - 1, 0, -1)]

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def is_relative_to(self, folder: "Location") -> bool:
        same = isinstance(folder, RemotePath) and (folder.scheme, folder.query) == (self.scheme, self.query)
        return same and f"{self.key}/".startswith(f"{str(folder.key).rstrip('/')}/")  # pyright: ignore

    def absolute(self) -> "RemotePath":
        return self

    resolve = expanduser = absolute

    @property
    def files(self) -> fs.FileSystem:
        """The file system. Raises DataError when there is none of that scheme, or a setting of the query is unknown."""
        return _file_system(self.scheme, self.key.split("/")[0], self.query)

    def _info(self) -> fs.FileInfo:
        with self._told():
            return self.files.get_file_info(self.key)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what an object store refuses into a DataError; other errors of the system stay what they are."""
        try:
            yield
        except OSError as error:
            if (trouble := remote_trouble(self, error)) is None:
                raise
            raise DataError(trouble) from error

    def missing(self) -> str:
        """What is not there, in words: the bucket or the folder."""
        bucket = self._at(self.key.split("/")[0])
        return f"{self}: there is no such {'folder' if bucket.exists() else 'bucket'}"

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().is_file

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def stat(self) -> SimpleNamespace:
        """`st_size` alone. Raises FileNotFoundError."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(2, "there is no such file", str(self))
        return SimpleNamespace(st_size=info.size)

    def iterdir(self) -> "Iterator[RemotePath]":
        """What is in the folder. Raises FileNotFoundError when there is none."""
        return iter([self / name for name in self.sizes()])

    def sizes(self) -> dict[str, int]:
        """Names and bytes of what is in the folder, by one question. Raises FileNotFoundError when there is none."""
        with self._told():  # without allow_not_found Google's raise another error than the rest
            found = self.files.get_file_info(fs.FileSelector(self.key, allow_not_found=True))
        if not found and not self.exists():
            raise FileNotFoundError(2, "there is no such folder", str(self))
        return {info.base_name: info.size or 0 for info in found if info.base_name}

    def open_input(self) -> Any:
        """A file object at which any part can be read."""
        with self._told():
            return self.files.open_input_file(self.key)

    def read_bytes(self) -> bytes:
        with self.open_input() as stream:
            return stream.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def upload(self, file: Path) -> None:
        """Put a local file there. It appears when it is complete; after a failure there is none of that name."""
        files = self.files
        if files.type_name not in _OBJECT_STORES:
            files.create_dir(posixpath.dirname(self.key), recursive=True)
        try:
            with self._told(), open(file, "rb") as source, files.open_output_stream(self.key) as target:
                shutil.copyfileobj(source, target, _AT_ONCE)
            if self.stat().st_size != file.stat().st_size:
                raise OSError("the upload is not complete")
        except BaseException:
            # closing, which no error prevents, gives an object store what there was so far
            with suppress(OSError, ArrowException):
                files.delete_file(self.key)
            raise

    def unlink(self, missing_ok: bool = False) -> None:
        with self._told(), suppress(*([FileNotFoundError] if missing_ok else [])):
            self.files.delete_file(self.key)

    def remove_folder(self) -> None:
        """Delete the folder and what is in it; nothing where there is none."""
        with suppress(FileNotFoundError):
            self.files.delete_dir(self.key)


Location = Path | RemotePath


def location(place: "str | Location") -> Location:
    """The place of a path or URI. The query of an s3:// URI may name endpoint_override, scheme and region, that of a
    gs:// URI endpoint_override, scheme, retry_limit_seconds and anonymous=true, which gs://anonymous@bucket stands for.

    Raises DataError for a URI that holds credentials, which would end up in logs and manifests.
    """
    if isinstance(place, RemotePath) or not _URI.match(str(place)):
        return place if isinstance(place, RemotePath) else Path(place)
    split = urlsplit(str(place))
    if split.scheme == "gs" and split.netloc.startswith(f"{_ANONYMOUS}@"):
        query = "&".join(part for part in (split.query, f"{_ANONYMOUS}=true") if part)
        split = split._replace(netloc=split.netloc.partition("@")[2], query=query)
    if "@" in split.netloc:
        raise DataError(
            f"{split.scheme}://…@{split.netloc.rpartition('@')[2]}: credentials do not belong into a path, which is "
            f"logged; {_CREDENTIALS}."
        )
    if split.scheme == "file":
        return Path(unquote(split.path))
    key = f"{split.netloc}/{split.path.lstrip('/')}".rstrip("/").lstrip("/")
    return RemotePath(split.scheme, posixpath.normpath(key), split.query)


@functools.lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    uri = str(RemotePath(scheme, bucket, query))
    try:
        return fs.FileSystem.from_uri(_uri_for_google(bucket, query) if scheme == "gs" else uri)[0]
    except (ValueError, ArrowException) as error:
        raise DataError(f"{uri}: is no place that pyarrow can open ({_first_line(error)}); correct it.") from error
    except OSError as error:
        raise DataError(remote_trouble(uri, error) or f"{uri}: cannot be opened ({_first_line(error)}).") from error


def _uri_for_google(bucket: str, query: str) -> str:
    """As pyarrow wants it: who is anonymous before the bucket, and an end to trying."""
    settings = {"retry_limit_seconds": _SECONDS_OF_TRYING} | dict(parse_qsl(query))
    user = f"{_ANONYMOUS}@" if settings.pop(_ANONYMOUS, "") == "true" else ""
    return str(RemotePath("gs", user + bucket, urlencode(settings)))


_CREDENTIALS = (
    "give credentials by the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile (s3), "
    "GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login` (gs)"
)
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "Forbidden", "status 403", "status 401", "EXPIRED")
_TROUBLE = (
    (("NO_SUCH_BUCKET", "NoSuchBucket", "Bucket '"), "there is no such bucket; create it or correct the name"),
    (("OAuth2 access token",), f"there are no credentials; {_CREDENTIALS}, or gs://anonymous@… for a public bucket"),
    (
        (*_REFUSED, "PERMISSION_DENIED", "UNAUTHENTICATED"),
        f"the credentials are refused, or have no right; {_CREDENTIALS}",
    ),
    (
        ("NETWORK_CONNECTION", "curlCode", "onnect", "timed out", "Timeout", "resolve host"),
        "the endpoint cannot be reached; check its address (endpoint_override=, scheme=) and the network",
    ),
)


def remote_trouble(place: object, error: BaseException) -> str | None:
    """What the user should read of an error of an object store, where and what to do; None where it is another."""
    text = str(error)
    for signs, advice in _TROUBLE:
        if any(sign in text for sign in signs):
            return f"{place}: {advice}."
    return None


def _first_line(error: BaseException) -> str:
    """The beginning of a message, without anything that is secret in this environment."""
    text = " ".join(str(error).split())[:200]
    for name, value in os.environ.items():
        if len(value) > 3 and any(word in name for word in ("SECRET", "TOKEN", "PASSWORD")):
            text = text.replace(value, "…")
    return text
