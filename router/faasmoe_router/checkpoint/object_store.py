"""Checkpoints in object stores and on web servers: s3://, gs:// and https://, by fsspec.

Files are downloaded once, whole, into a folder of the URL's own; a repeated download keeps those
that are complete and have the size and tag that the server tells. What the content was is told by a
hash of the files' names, sizes and tags, which takes the place of a hub's commit.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

from faasmoe_router.errors import (
    HubUnauthorized,
    HubUnavailable,
    NoSpace,
    PrepareError,
    SourceNotFound,
    SourceUnsupported,
    failure_reason,
)

DOWNLOAD_DIR_ENV = "FAASMOE_DOWNLOAD_DIR"
WEB_SCHEMES = ("https", "http")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "fsspec", "http": "fsspec"}
"""The package that each scheme needs."""
TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime")
"""Names by which fsspec's file systems tell that an object has changed."""
WEB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "LICENSE",
    "model.safetensors.index.json",
)
"""What is looked for on a web server, which lists no files; weights are those of the index."""
UNFINISHED_SUFFIX = ".unfinished"
TAGS_FOLDER = ".tags"
"""Folder of a download for the tags of its files, by their names."""
LOCK_NAME = ".lock"
COPY_BYTES = 8 << 20


class FileSystem(Protocol):
    """What is used of an fsspec file system."""

    def find(self, path: str) -> list[str]:
        """Return the paths of all files below a path."""
        ...

    def info(self, path: str) -> Mapping[str, Any]:
        """Return what is known of a file; raises FileNotFoundError."""
        ...

    def open(self, path: str, mode: str) -> Any:
        """Open a file."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a remote checkpoint.

    Attributes:
        name: its name in the checkpoint.
        path: its path in the file system.
        size_bytes: its size; None if the server does not tell.
        tag: what changes with its content; empty if the server does not tell.
    """

    name: str
    path: str
    size_bytes: int | None
    tag: str


def is_object_url(source: str) -> bool:
    """Return whether a source is in an object store or on a web server."""
    return urlsplit(source).scheme in PACKAGES and "://" in source


def check_object_url(source: str) -> None:
    """Raise SourceUnsupported if a URL has what may be a secret: it is shown and stored."""
    parts = urlsplit(source)
    if "@" in parts.netloc or parts.query:
        raise SourceUnsupported(
            f"source: got a URL of {parts.hostname!r} with a user name or a query, expected "
            f"{parts.scheme}://NAME/PATH: credentials belong in the environment, see docs/store.md"
        )


class ObjectFolder:
    """A folder of an object store or a web server.

    Args:
        source: its URL.

    Raises:
        SourceUnsupported: the package for its scheme is not installed, or it has credentials.
    """

    def __init__(self, source: str) -> None:
        check_object_url(source)
        self._source = source.rstrip("/")
        self._scheme = urlsplit(source).scheme
        self._fs, self._root = _file_system(self._source, self._scheme)

    def metadata_files(self, patterns: Iterable[str]) -> list[RemoteFile]:
        """Return the files that match a pattern; raises PrepareError."""
        if self._scheme in WEB_SCHEMES:
            return self.files(WEB_FILES, is_required=False)
        names = [name for name in self._names() if _matches(name, patterns)]
        return self.files(names)

    def files(self, names: Iterable[str], *, is_required: bool = True) -> list[RemoteFile]:
        """Return files by their names; raises PrepareError, also if one is missing but required."""
        found: list[RemoteFile] = []
        for name in names:
            with self._errors():
                try:
                    found.append(self._file(name))
                except FileNotFoundError as error:
                    if is_required:
                        message = f"source: got {self._source!r}, no {name} in it"
                        raise SourceNotFound(message) from error
        return found

    def download(self, file: RemoteFile, folder: Path) -> None:
        """Download a file into a folder, unless it is there; raises PrepareError."""
        target, tag = folder / file.name, folder / TAGS_FOLDER / file.name
        if _is_downloaded(file, target, tag):
            return
        for path in (target, tag):
            path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + UNFINISHED_SUFFIX)
        with (
            unfinished.open("wb") as local,
            self._errors(),
            self._fs.open(file.path, "rb") as remote,
        ):
            shutil.copyfileobj(remote, local, COPY_BYTES)
        got = unfinished.stat().st_size
        if file.size_bytes not in (None, got):
            raise HubUnavailable(f"{file.path}: got {got} bytes, expected {file.size_bytes}")
        tag.unlink(missing_ok=True)  # of the file that is replaced
        unfinished.replace(target)
        tag.write_text(file.tag, encoding="utf-8")

    def _names(self) -> list[str]:
        with self._errors():
            paths = self._fs.find(self._root)
        names = [path.removeprefix(self._root).lstrip("/") for path in paths]
        if not names:
            raise SourceNotFound(f"source: got {self._source!r}, expected a folder with files")
        return [name for name in names if ".." not in PurePosixPath(name).parts]

    def _file(self, name: str) -> RemoteFile:
        path = f"{self._root}/{name}"
        info = self._fs.info(path)
        tags = [f"{key}={info[key]}" for key in TAGS if info.get(key)]
        return RemoteFile(name, path, info.get("size"), ",".join(tags))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise PrepareError for whatever a file system raises; each has errors of its own."""
        try:
            yield
        except PrepareError:
            raise
        except PermissionError as error:
            raise HubUnauthorized(
                f"source: got {self._source!r}: access is denied: {error}"
            ) from error
        except FileNotFoundError as error:
            raise SourceNotFound(f"source: got {self._source!r}: not found: {error}") from error
        except Exception as error:
            if failure_reason(error) == NoSpace.reason:
                raise
            text = f"{type(error).__name__}: {error}"
            raise HubUnavailable(f"source: got {self._source!r}: cannot be read: {text}") from error


def _file_system(source: str, scheme: str) -> tuple[FileSystem, str]:
    """Return the file system of a URL and the URL's path in it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        fs, path = url_to_fs(source)
    except ImportError as error:
        raise SourceUnsupported(
            f"source: got {source!r}, which needs the package {PACKAGES[scheme]}: "
            "pip install 'faasmoe[object-stores]'"
        ) from error
    return fs, str(path).rstrip("/")


def download_dir(source: str) -> Path:
    """Return the folder that a URL is downloaded to."""
    base = os.environ.get(DOWNLOAD_DIR_ENV)
    root = Path(base) if base else Path.home() / ".cache" / "faasmoe" / "downloads"
    return root / hashlib.sha256(source.rstrip("/").encode()).hexdigest()[:32]


@contextmanager
def locked_download_dir(source: str) -> Iterator[Path]:
    """Make the folder that a URL is downloaded to; wait until no other process downloads to it."""
    folder = download_dir(source)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _is_downloaded(file: RemoteFile, target: Path, tag: Path) -> bool:
    """Return whether a file is there as the server has it now."""
    try:
        has_size = target.stat().st_size == file.size_bytes
        return has_size and tag.read_text(encoding="utf-8") == file.tag
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def content_hash(files: Iterable[RemoteFile]) -> str:
    """Return a hash that changes with a file's name, size or tag, as 40 hexadecimal digits."""
    content = sorted((file.name, file.size_bytes, file.tag) for file in files)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
