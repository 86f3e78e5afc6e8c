"""A control group (cgroup v1 or v2) that bounds the memory of this process's future children."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")


class NoMemoryGroupError(Exception):
    """No control group can be made; the message is the reason."""


def own_memory_group() -> Path:
    """Return the folder of this process's group that has the memory controller."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return CGROUPS / "memory" / path.removeprefix("/")
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        if line.startswith("0::"):
            return CGROUPS / line.removeprefix("0::").removeprefix("/")
    raise NoMemoryGroupError("/proc/self/cgroup: got no memory controller, expected one")


@contextmanager
def limited_children(limit_bytes: int) -> Iterator[Path]:
    """Move this process into a limited group below its own for the lifetime of the context.

    Children that are started meanwhile stay in the group, and so does the page cache that they
    fill. The caller's own memory does not move with it.

    Raises:
        NoMemoryGroupError: this process may not make one.
    """
    parent = own_memory_group()
    group = parent / f"faasmoe-limited-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NoMemoryGroupError(f"{group}: {error.strerror}") from error
    try:
        _limit(group, limit_bytes)
        _move(group)
        try:
            yield group
        finally:
            _move(parent)
    finally:
        group.rmdir()


def _limit(group: Path, limit_bytes: int) -> None:
    for name in LIMIT_FILES:
        if (group / name).exists():
            (group / name).write_text(str(limit_bytes), encoding="ascii")
            return
    raise NoMemoryGroupError(f"{group}: got none of {', '.join(LIMIT_FILES)}, expected one")


def _move(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


def drop_cached(*folders: Path) -> None:
    """Drop the files below folders from the page cache, as far as nobody maps them."""
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
