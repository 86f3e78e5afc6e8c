"""Files that survive crashes: replaced as a whole, flushed to disk, quarantined when corrupted."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

DAMAGED_SUFFIX = ".damaged"


def write_atomically(
    path: Path, content: str | bytes, mode: int = 0o666, *, temp_path: Path | None = None
) -> None:
    """Replace a file as a whole; after a crash it has either its old or its new content.

    Writes a temporary file in the same folder, flushes it, renames it and flushes the folder.
    Concurrent writers do not mix their contents, and the last rename wins, unless they share a
    `temp_path`.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text that is encoded as UTF-8.
        mode: permissions of the file before the umask.
        temp_path: the temporary file, in the same folder; by default a hidden file whose name is
            unique to this thread.

    Raises:
        OSError: the file cannot be written; its old content is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    if temp_path is None:
        temp_path = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        fd = os.open(temp_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp_path.replace(path)
    except BaseException:
        temp_path.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the renames in a folder durable, where its file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some FUSE and network mounts
            raise
    finally:
        os.close(fd)


def quarantine(path: Path) -> Path:
    """Move a corrupted file aside for inspection, replacing the last one; return its new path.

    Raises:
        OSError: the file cannot be renamed.
    """
    target = path.with_suffix(DAMAGED_SUFFIX)
    path.replace(target)
    return target
