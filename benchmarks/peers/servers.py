"""What the benchmark knows about a running server, and how servers are started.

Each module with a server has a class that implements `PeerServer`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import psutil
from benchmarks.resource_usage import CpuClock, MemoryUsage
from benchmarks.worker import ROOT

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


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running_process(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run a command for the lifetime of the context, with standard error in a log file.

    Standard output is a pipe. Any exception gets the end of the log as a note.
    """
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=output, cwd=ROOT, env=environment
        )
    try:
        yield process
    except Exception as error:
        error.add_note((await asyncio.to_thread(log.read_text))[-LOG_CHARACTERS:])
        raise
    finally:
        await terminate(process)


async def terminate(process: Process) -> None:
    """Send SIGTERM, and SIGKILL after END_TIMEOUT_S seconds."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def wait_healthy(url: str, is_running: Callable[[], bool], *, timeout_s: float) -> None:
    """Wait until GET /health answers 200; raises RuntimeError if the process ends or is late."""
    deadline_s = time.monotonic() + timeout_s
    async with aiohttp.ClientSession() as http:
        while is_running() and time.monotonic() < deadline_s:
            try:
                async with http.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(POLL_S)
    raise RuntimeError(f"{url}: not healthy within {timeout_s:g} s or its process ended")
