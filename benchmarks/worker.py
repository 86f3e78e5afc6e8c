"""The inside of a worker process: commands as JSON lines on stdin, answers on what was stdout.

The outside of a worker process: starts it, asks it, ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.decoding import DecodeRun

from faasmoe_contracts.parent_death import PARENT_PID_ENV, die_with_parent

CommandHandler = Callable[[dict[str, Any]], dict[str, Any]]


def serve_commands(make_handler: Callable[[], CommandHandler]) -> None:
    """Make the handler, then answer commands until stdin ends.

    An error ends the process with its traceback: half a benchmark is none.

    Args:
        make: sets up what the worker measures and returns what answers a command.
    """
    die_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as responses:
        os.dup2(2, 1)  # whatever a library prints must not look like an answer
        handle = make_handler()
        _write_response(responses, {"pid": os.getpid()})
        for line in sys.stdin:
            _write_response(responses, handle(json.loads(line)))


def _write_response(responses: Any, value: dict[str, Any]) -> None:
    responses.write(json.dumps(value) + "\n")
    responses.flush()


ROOT = Path(__file__).resolve().parents[1]
MAX_RESPONSE_BYTES = 16 << 20
START_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 900.0
END_TIMEOUT_S = 40.0


class WorkerProcess:
    """One side of the comparison, in a process of its own; `running` makes one."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def run_batch(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, **options: Any
    ) -> DecodeRun:
        """Generate from the prompts as one batch; raises RuntimeError if the worker ended."""
        command = {"prompts": prompts, "max_tokens": max_tokens, **options}
        return DecodeRun.from_json(await self.request(command, timeout_s=RUN_TIMEOUT_S))

    async def request(self, command: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a command; return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.read_response(timeout_s)

    async def read_response(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next answer."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {await self._process.wait()}")
        return dict(json.loads(line))

    async def close(self) -> None:
        """End it; by SIGKILL if it takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def running_worker(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[WorkerProcess]:
    """Run a worker as long as the context lasts; it is ready when the context is entered.

    Args:
        module: the worker's module.
        arguments: its command line.
        environment: all of its environment; ours if left out.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        cwd=ROOT,
        env={**(environment or os.environ), PARENT_PID_ENV: str(os.getpid())},
        limit=MAX_RESPONSE_BYTES,
    )
    worker = WorkerProcess(process)
    try:
        await worker.read_response(START_TIMEOUT_S)
        yield worker
    finally:
        await worker.close()
