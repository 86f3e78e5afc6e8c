"""A child process of the launcher: its log lines kept and passed on, its end asked for or forced.

The child ties its own lifeline (`faasmoe_contracts.parent_death`) from FAASMOE_PARENT_PID, so it ends even
if the launcher is killed.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_operator.aio import read_lines

LOG_TAIL_LINES = 20


class ChildProcess:
    """A running child; `running` makes one."""

    def __init__(self, process: Process, log_line: Callable[[str], None] | None) -> None:
        self._process = process
        self._log_tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._log_forwarder = asyncio.create_task(self._forward_output(log_line))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def describe_exit(self) -> str:
        """Wait for its end and say how it ended, with its last log lines."""
        status = await self._process.wait()
        await self._log_forwarder
        return "\n  ".join([f"ended with status {status}", *self._log_tail])

    async def exit_status(self) -> int:
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
        await self._log_forwarder

    async def _forward_output(self, log_line: Callable[[str], None] | None) -> None:
        if self._process.stdout is None or log_line is None:
            return
        async for line in read_lines(self._process.stdout):
            self._log_tail.append(line)
            log_line(line)


@asynccontextmanager
async def running_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Callable[[str], None] | None,
    grace_s: float,
) -> AsyncIterator[ChildProcess]:
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
        env={**environment, PARENT_PID_ENV: str(os.getpid())},
        start_new_session=True,  # a Ctrl-C in the terminal is for the launcher to handle
    )
    child = ChildProcess(process, log)
    try:
        yield child
    finally:
        await child.stop(grace_s=grace_s)
