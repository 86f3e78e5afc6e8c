"""Memory of a process, as the operating system counts it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FIELD = re.compile(r"^(Pss(?:_\w+)?):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """The proportional set size of a process, divided.

    Attributes:
        own_bytes: pages that are no file's, anonymous and shared memory.
        file_bytes: pages of files.
    """

    own_bytes: int
    file_bytes: int


def pss_bytes(pid: int, *, proc: Path = Path("/proc")) -> int | None:
    """Return the proportional set size of a process in bytes.

    A page that N processes share counts 1/N in each, so the sum over processes is the memory that
    they really use. None if the process has exited or belongs to another user.
    """
    return _fields(pid, proc).get("Pss")


def memory_parts(pid: int, *, proc: Path = Path("/proc")) -> MemoryParts | None:
    """Return what of a process's proportional set size are pages of files, and what is not.

    All counts as its own where the kernel does not tell (before Linux 5.9). None as `pss_bytes`.
    """
    fields = _fields(pid, proc)
    if "Pss" not in fields:
        return None
    file_bytes = fields.get("Pss_File", 0)
    return MemoryParts(fields["Pss"] - file_bytes, file_bytes)


def _fields(pid: int, proc: Path) -> dict[str, int]:
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return {}
    return {name: int(size_kb) * 1024 for name, size_kb in _FIELD.findall(text)}
