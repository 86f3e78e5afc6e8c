"""What processes have used: processor time to the nanosecond, memory by proportional share."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
_FIELD = re.compile(r"^(Pss|Pss_Anon|Pss_File):\s+(\d+) kB$", re.MULTILINE)


class ProcessorClock:
    """The processor time of some processes together, all their threads included.

    Reads the kernel's clock of each process: /proc/PID/stat counts the same time in ticks of 10 ms,
    too coarse for a sandbox that works for a millisecond in each step.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._clocks = tuple(_clock_of(pid) for pid in pids)

    def read_s(self) -> float:
        """Return the seconds used since the processes began."""
        return sum(time.clock_gettime_ns(clock) for clock in self._clocks) / 1e9


@dataclass(frozen=True, slots=True)
class Memory:
    """A process's memory in bytes; a page that N processes share counts 1/N in each."""

    total: int
    anonymous: int
    of_files: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Read a process's memory; raises OSError if it is gone."""
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        found = {name: int(size) * 1024 for name, size in _FIELD.findall(text)}
        return cls(found["Pss"], found["Pss_Anon"], found["Pss_File"])

    @classmethod
    def total_of(cls, memories: Iterable[Memory]) -> Memory:
        """Return the memory of several processes together."""
        held = tuple(memories)
        return cls(
            sum(m.total for m in held),
            sum(m.anonymous for m in held),
            sum(m.of_files for m in held),
        )


def mapped_bytes(pid: int, folder: Path) -> int:
    """Return how much of the files in a folder a process has in memory, by proportional share."""
    inside, found = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        if _MAPPING.match(line):
            inside = f"{folder}/" in line
        elif inside and line.startswith("Pss:"):
            found += int(line.split()[1]) * 1024
    return found


def _clock_of(pid: int) -> int:
    clock = ctypes.c_int()
    error: int = _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, f"process {pid}: {os.strerror(error)}")
    return clock.value
