"""CPU time (in nanoseconds) and memory (PSS) of processes."""

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
    """Total CPU time of several processes, including all their threads.

    Reads the CPU clock of each process. /proc/PID/stat has a resolution of 10 ms, too coarse for a
    sandbox that computes for a millisecond per step.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._clocks = tuple(_cpu_clock_id(pid) for pid in pids)

    def read_s(self) -> float:
        """Return the CPU seconds used since the processes started."""
        return sum(time.clock_gettime_ns(clock) for clock in self._clocks) / 1e9


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Memory of a process in bytes (PSS): a page shared by N processes counts 1/N in each."""

    total: int
    anonymous: int
    of_files: int

    @classmethod
    def of_pid(cls, pid: int) -> MemoryUsage:
        """Read the memory of a process; raises OSError if it does not exist."""
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        sizes = {name: int(size) * 1024 for name, size in _FIELD.findall(text)}
        return cls(sizes["Pss"], sizes["Pss_Anon"], sizes["Pss_File"])

    @classmethod
    def sum_of(cls, memories: Iterable[MemoryUsage]) -> MemoryUsage:
        """Return the sum over several processes."""
        usages = tuple(memories)
        return cls(
            sum(m.total for m in usages),
            sum(m.anonymous for m in usages),
            sum(m.of_files for m in usages),
        )


def mapped_bytes(pid: int, folder: Path) -> int:
    """Return a process's PSS in bytes of mapped files below a folder."""
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
