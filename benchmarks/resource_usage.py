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


class CpuClock:
    """The processor time of some processes together, all their threads included.

    Reads the kernel's clock of each process: /proc/PID/stat counts the same time in ticks of 10 ms,
    too coarse for a sandbox that works for a millisecond in each step.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._clocks = tuple(_cpu_clock_id(pid) for pid in pids)

    def read_s(self) -> float:
        """Return the seconds used since the processes began."""
        return sum(time.clock_gettime_ns(clock) for clock in self._clocks) / 1e9


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """A process's memory in bytes; a page that N processes share counts 1/N in each."""

    total: int
    anonymous: int
    of_files: int

    @classmethod
    def of_pid(cls, pid: int) -> MemoryUsage:
        """Read a process's memory; raises OSError if it is gone."""
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        found = {name: int(size) * 1024 for name, size in _FIELD.findall(text)}
        return cls(found["Pss"], found["Pss_Anon"], found["Pss_File"])

    @classmethod
    def sum_of(cls, memories: Iterable[MemoryUsage]) -> MemoryUsage:
        """Return the memory of several processes together."""
        usages = tuple(memories)
        return cls(
            sum(m.total for m in usages),
            sum(m.anonymous for m in usages),
            sum(m.of_files for m in usages),
        )


def mapped_bytes(pid: int, folder: Path) -> int:
    """Return how much of the files in a folder a process has in memory, by proportional share."""
    inside, total_bytes = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        if _MAPPING.match(line):
            inside = f"{folder}/" in line
        elif inside and line.startswith("Pss:"):
            total_bytes += int(line.split()[1]) * 1024
    return total_bytes


def _cpu_clock_id(pid: int) -> int:
    clock = ctypes.c_int()
    error: int = _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, f"process {pid}: {os.strerror(error)}")
    return clock.value
