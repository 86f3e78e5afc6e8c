"""Metering of a strategy's process tree: CPU time, including exited children, and memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.resource_usage import CpuClock, MemoryUsage

INTERVAL_S = 0.5
MIN_PAUSE_FACTOR = 50  # sampling walks page tables; limits it to a fiftieth of the time
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory of a process tree at one moment.

    Attributes:
        at_s: time since the start of metering.
        total: PSS in bytes.
        anonymous: the part of it that is not backed by a file.
    """

    at_s: float
    total: int
    anonymous: int


class ProcessTree:
    """Some processes with all their descendants."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = tuple(psutil.Process(pid) for pid in roots)

    def processes(self) -> list[psutil.Process]:
        """Return the running processes."""
        processes = [p for root in self._roots for p in (root, *root.children(recursive=True))]
        return list({process.pid: process for process in processes}.values())

    def cpu_s(self) -> float:
        """Return the CPU time used so far, including that of exited and reaped children."""
        return sum(_cpu_s(process.pid) for process in self.processes())

    def memory(self, at_s: float) -> MemorySample:
        """Return the total memory of all processes."""
        usages = [
            m for m in (_memory(process.pid) for process in self.processes()) if m is not None
        ]
        total = MemoryUsage.sum_of(usages)
        return MemorySample(at_s, total.total, total.anonymous)


@dataclass(slots=True)
class ResourceUsage:
    """Usage during `metering`; complete once the context has ended.

    Attributes:
        samples: memory over time.
        cpu_s: CPU time.
        time_s: wall time.
        sampling_s: what of it was spent on reading memory.
    """

    samples: list[MemorySample]
    cpu_s: float = 0.0
    time_s: float = 0.0
    sampling_s: float = 0.0

    @property
    def byte_s(self) -> float:
        """Memory integrated over time."""
        return sum(area for area in self._trapezoids())

    @property
    def peak_bytes(self) -> int:
        """Maximum of the memory samples."""
        return max(sample.total for sample in self.samples)

    def _trapezoids(self) -> Iterator[float]:
        for a, b in zip(self.samples, self.samples[1:], strict=False):
            yield (b.at_s - a.at_s) * (a.total + b.total) / 2


@asynccontextmanager
async def metering(
    tree: ProcessTree, *, interval_s: float = INTERVAL_S
) -> AsyncIterator[ResourceUsage]:
    """Meter the processes for the lifetime of the context.

    Memory is sampled at the start, at the end and every `interval_s` seconds in between, less often
    if sampling would take more than a fiftieth of the time.
    """
    started_s, cpu_s = time.perf_counter(), tree.cpu_s()
    usage = ResourceUsage([tree.memory(0.0)])

    async def sample() -> None:
        while True:
            reading_s = time.perf_counter()
            usage.samples.append(await asyncio.to_thread(tree.memory, reading_s - started_s))
            cost_s = time.perf_counter() - reading_s
            usage.sampling_s += cost_s
            await asyncio.sleep(max(interval_s, cost_s * MIN_PAUSE_FACTOR))

    sampling = asyncio.create_task(sample())
    try:
        yield usage
        usage.time_s, usage.cpu_s = time.perf_counter() - started_s, tree.cpu_s() - cpu_s
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    usage.samples.append(tree.memory(usage.time_s))


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its reaped children; 0 if it has just exited."""
    try:
        own_s = CpuClock([pid]).read_s()
        # cutime and cstime follow the name, which ends with the last closing parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return own_s + (int(fields[13]) + int(fields[14])) / _TICKS_PER_S


def _memory(pid: int) -> MemoryUsage | None:
    try:
        return MemoryUsage.of_pid(pid)
    except (OSError, KeyError):  # the process has just exited
        return None
