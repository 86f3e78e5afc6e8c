"""A child process of the launcher: its log lines kept and passed on, its end asked for or forced.

The child ties its own lifeline (`faasmoe_expert.lifeline`) from FAASMOE_PARENT_PID, so it ends even
if the launcher is killed.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from faasmoe_expert.lifeline import PARENT_VARIABLE
from faasmoe_operator.platforms.lines import read_lines

KEPT_LOG_LINES = 20


class Child:
    """A running child; `running` makes one."""

    def __init__(self, process: Process, log: Callable[[str], None] | None) -> None:
        self._process = process
        self._lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
        self._logs = asyncio.create_task(self._forward(log))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait(self) -> str:
        """Wait for its end and say how it ended, with its last log lines."""
        status = await self._process.wait()
        await self._logs
        return "\n  ".join([f"ended with status {status}", *self._lines])

    async def status(self) -> int:
        """Wait for its end and return its exit status, negative for a signal."""
        return await self._process.wait()

    async def stop(self, *, grace_s: float) -> None:
        """End it: SIGTERM, after the grace SIGKILL."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._logs

    async def _forward(self, log: Callable[[str], None] | None) -> None:
        if self._process.stdout is None or log is None:
            return
        async for line in read_lines(self._process.stdout):
            self._lines.append(line)
            log(line)


@asynccontextmanager
async def running(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Callable[[str], None] | None,
    grace_s: float,
) -> AsyncIterator[Child]:
    """Run a child as long as the context lasts.

    Args:
        command: what to run.
        environment: all of its environment.
        log: gets each line that it writes; None leaves it our own terminal to write to.
        grace_s: how long it may take to end when asked to.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=DEVNULL,
        stdout=None if log is None else PIPE,
        stderr=None if log is None else STDOUT,
        env={**environment, PARENT_VARIABLE: str(os.getpid())},
        start_new_session=True,  # a Ctrl-C in the terminal is for the launcher to handle
    )
    child = Child(process, log)
    try:
        yield child
    finally:
        await child.stop(grace_s=grace_s)
