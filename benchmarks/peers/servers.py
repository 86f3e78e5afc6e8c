"""What the benchmark knows about a running server, and how servers are started.

Each module with a server has a class that implements `PeerServer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
from benchmarks.resource_usage import CpuClock, MemoryUsage

LOG_CHARACTERS = 2000
END_TIMEOUT_S = 60.0
POLL_S = 0.05


class NotServedError(Exception):
    """A server that cannot serve a model in a precision; the message is the reason."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers requests.

    Attributes:
        url: base URL of its OpenAI API.
        model: name of the model in requests.
        root: process whose descendants, itself included, are the server.
        details: version and settings for the report.
    """

    url: str
    model: str
    root: psutil.Process
    details: Mapping[str, Any]

    def pids(self) -> list[int]:
        """Return the process ids of the server."""
        return [p.pid for p in (self.root, *self.root.children(recursive=True))]

    def read_cpu_s(self) -> dict[int, float]:
        """Return the CPU time of each process since its start, in s."""
        times: dict[int, float] = {}
        for pid in self.pids():
            try:
                times[pid] = CpuClock([pid]).read_s()
            except OSError:  # it has ended since it was listed
                continue
        return times

    def pss_bytes(self) -> int:
        """Return the memory of all processes (PSS)."""
        usages: list[MemoryUsage] = []
        for pid in self.pids():
            try:
                usages.append(MemoryUsage.of_pid(pid))
            except OSError:  # it has ended since it was listed, or is about to
                continue
        return MemoryUsage.sum_of(usages).total


def cpu_used_s(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return the CPU time between two readings; that of processes that ended is not in it."""
    return sum(time_s - before.get(pid, 0.0) for pid, time_s in after.items())


class PeerServer(Protocol):
    """A kind of server."""

    @property
    def name(self) -> str:
        """Name in the report."""

    def prepare(self, model: str, precision: str) -> None:
        """Make everything that a start needs; not measured.

        Raises:
            NotServedError: the server cannot serve the model in this precision.
        """

    def run(self, model: str, precision: str) -> AbstractAsyncContextManager[RunningServer]:
        """Run the server for the lifetime of the context; ready for requests when entered."""
