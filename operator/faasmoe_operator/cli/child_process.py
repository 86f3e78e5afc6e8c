"""A child process whose output is forwarded and whose last lines are kept for error messages.

FAASMOE_PARENT_PID tells the child which parent to watch (`faasmoe_contracts.parent_death`), so it
exits even if this process is killed.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_operator.aio import read_lines

LOG_TAIL_LINES = 20


class Process(Protocol):
    """What asyncio's processes and those that a zygote has forked have in common."""

    @property
    def pid(self) -> int:
        """Process id."""

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs, -N if signal N killed it."""

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """Its output, if it is read here."""

    async def wait(self) -> int:
        """Wait for its exit; return its status."""

    def terminate(self) -> None:
        """Send SIGTERM."""

    def kill(self) -> None:
        """Send SIGKILL."""


class ChildNotStarted(Exception):
    """A child that could not be started; the message says why."""


class ChildProcess:
    """A running child process; created by `running_child` or a `Zygote`."""

    def __init__(self, process: Process, log_line: Callable[[str], None] | None) -> None:
        self._process = process
        self._log_tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._log_forwarder = asyncio.create_task(self._forward_output(log_line))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def describe_exit(self) -> str:
        """Wait for the child to exit; return its status and last log lines as text."""
        status = await self._process.wait()
        await self._log_forwarder
        return "\n  ".join([f"ended with status {status}", *self._log_tail])

    async def exit_status(self) -> int:
        """Wait for the child to exit; return its status, or -N if signal N killed it."""
        return await self._process.wait()

    async def stop(self, *, grace_s: float) -> None:
        """Send SIGTERM, then SIGKILL if the child is still running after grace_s seconds."""
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


class RunChild(Protocol):
    """Runs a child process for the lifetime of a context, as `running_child` does."""

    def __call__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Callable[[str], None],
        grace_s: float,
        pass_fds: Sequence[int] = (),
    ) -> AbstractAsyncContextManager[ChildProcess]:
        """Return the context; entering it may raise ChildNotStarted."""


@asynccontextmanager
async def running_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Callable[[str], None] | None,
    grace_s: float,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[ChildProcess]:
    """Run a child process for the lifetime of the context.

    Args:
        command: the command line.
        environment: the complete environment of the child.
        log: called with each output line; None lets the child inherit stdout and stderr.
        grace_s: seconds between SIGTERM and SIGKILL.
        pass_fds: descriptors that the child inherits, under the same numbers.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=DEVNULL,
        stdout=None if log is None else PIPE,
        stderr=None if log is None else STDOUT,
        env={**environment, PARENT_PID_ENV: str(os.getpid())},
        pass_fds=pass_fds,
        start_new_session=True,  # only this process receives Ctrl-C
    )
    child = ChildProcess(process, log)
    try:
        yield child
    finally:
        await child.stop(grace_s=grace_s)
