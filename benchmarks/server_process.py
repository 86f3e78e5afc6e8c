"""Processes of servers that benchmarks start: ports, logs, health and their end."""

from __future__ import annotations

import asyncio
import socket
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from benchmarks.worker import ROOT

END_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_CHARACTERS = 4000


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
