"""Client of the zygote: starts `python -m faasmoe_expert.zygote`, speaks its JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from faasmoe_expert.lifeline import PARENT_VARIABLE
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.lines import read_lines

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "faasmoe_expert.zygote")
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
KEPT_LOG_LINES = 20

ENVIRONMENT: Mapping[str, str] = {
    # What the parent would inherit to children before one of them sets its own number.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Threads that wait by spinning steal the cores that the router computes on.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}


class Zygote:
    """A running zygote. Must be started from the thread that lives as long as the process."""

    def __init__(self, process: Process, log: Callable[[str], None]) -> None:
        assert process.stdout is not None
        self._process = process
        self._lines = read_lines(process.stdout)
        self._log = log
        self.last_lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
        self._logs = asyncio.create_task(self._forward_logs())

    @classmethod
    async def start(
        cls,
        command: Sequence[str] = COMMAND,
        *,
        token: str,
        log: Callable[[str], None],
        timeout_s: float = START_TIMEOUT_S,
    ) -> Zygote:
        """Start a zygote and wait until it can fork; raises PlatformError.

        Args:
            command: what to run.
            token: the token that the sandboxes will ask for.
            log: gets each line that the zygote or a sandbox writes to stderr.
            timeout_s: how long it may take to import the runtime.
        """
        own = {"FAASMOE_TOKEN": token, PARENT_VARIABLE: str(os.getpid())}
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env={**os.environ, **ENVIRONMENT, **own},
            start_new_session=True,  # a Ctrl-C in the terminal is for the launcher to handle
        )
        zygote = cls(process, log)
        try:
            async with asyncio.timeout(timeout_s):
                event = await zygote.next_event()
        except TimeoutError:
            await zygote.close(timeout_s=0)
            raise PlatformError(f"the zygote was not ready after {timeout_s:g} s") from None
        except BaseException:
            await zygote.close(timeout_s=0)
            raise
        if event is None:
            await zygote.close()
            raise PlatformError("\n  ".join([await zygote.ended(), *zygote.last_lines]))
        if event.get("event") != "ready":
            await zygote.close(timeout_s=0)
            raise PlatformError(f"the zygote reported {event!r}, expected ready")
        return zygote

    @property
    def pid(self) -> int:
        """The zygote's process id."""
        return self._process.pid

    async def next_event(self) -> dict[str, Any] | None:
        """Return the next event, or None when the zygote has ended."""
        async for line in self._lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                return event
            logger.error("the zygote wrote %r, expected a JSON object", line)
        return None

    def send(self, command: Mapping[str, Any]) -> None:
        """Send a command; one that comes after the zygote's end is lost, as the sandboxes are."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def ended(self) -> str:
        """Wait for the end and say how it ended."""
        return f"the zygote ended with status {await self._process.wait()}"

    async def close(self, *, timeout_s: float = END_TIMEOUT_S) -> None:
        """End the zygote and with it every sandbox; by SIGKILL if it takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._logs

    async def _forward_logs(self) -> None:
        assert self._process.stderr is not None
        async for line in read_lines(self._process.stderr):
            self.last_lines.append(line)
            self._log(line)
