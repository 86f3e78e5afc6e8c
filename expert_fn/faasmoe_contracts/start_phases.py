"""Where the time of a process's start goes: one line in its log, read by `benchmarks.start`.

Imports nothing slow, so that the phases can begin before a process's other imports.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PREFIX = "start took"
_PHASE = re.compile(r"([a-z][a-z ]*) (\d+\.\d+) s")


class StartPhases:
    """Durations of the phases of a start; the first one ends when this object is created.

    Args:
        first: name of the first phase.
        age_s: age of the process in seconds; measured if None.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        first: str = "exec",
        *,
        age_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._last_s = clock()
        self._phases = {first: process_age_s() if age_s is None else age_s}

    def end(self, phase: str) -> None:
        """End a phase, named in lower-case letters and spaces, which began when the last ended."""
        now_s = self._clock()
        self._phases[phase] = now_s - self._last_s
        self._last_s = now_s

    def describe(self) -> str:
        """Return all phases as one line, in seconds."""
        phases = ", ".join(f"{name} {duration:.2f} s" for name, duration in self._phases.items())
        return f"{PREFIX} {sum(self._phases.values()):.2f} s: {phases}"


def parse_start_phases(line: str) -> Mapping[str, float] | None:
    """Return the phases in a log line in seconds, in their order; None if it has none."""
    _, is_found, text = line.partition(PREFIX)
    if not is_found:
        return None
    return {name: float(duration) for name, duration in _PHASE.findall(text.partition(": ")[2])}


def process_age_s(*, proc: Path = Path("/proc/self/stat")) -> float:
    """Return the seconds since this process was created, to 10 ms."""
    fields = proc.read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, starttime
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
