"""How long something took, but for the time in which a process waited for a core.

So a bound of the product's own waits holds on a busy machine, and means the same on a quiet one.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


class Stopwatch:
    """Measures time from its creation, less what the machine took from a process.

    Threads may wait for cores at the same time: that of the thread which waited longest counts.

    Args:
        pid: the process; this one by default.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._threads = Path(f"/proc/{pid or os.getpid()}/task")
        self._waits_ns = self._read_waits()
        self._started_s = time.monotonic()

    def elapsed_s(self) -> float:
        """Return the time, less what the process waited for a core, in seconds."""
        return time.monotonic() - self._started_s - self.waited_s()

    def waited_s(self) -> float:
        """Return how long the process waited for a core, in seconds."""
        waits_ns = (ns - self._waits_ns.get(t, 0) for t, ns in self._read_waits().items())
        return max(waits_ns, default=0) / 1e9

    def _read_waits(self) -> dict[str, int]:
        """Return how long each thread has waited for a core since it began, in nanoseconds."""
        waits_ns = {}
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread, or all, may end
            for thread in self._threads.iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):
                    waits_ns[thread.name] = int((thread / "schedstat").read_text().split()[1])
        return waits_ns
