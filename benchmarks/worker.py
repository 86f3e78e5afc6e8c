"""Worker processes: one benchmarked system each, driven by JSON lines over stdin and stdout.

`serve_commands` runs in the worker, `running_worker` and `WorkerProcess` in the benchmark.
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
    """Create the handler, then respond to commands until stdin is closed.

    An exception ends the process with its traceback, since a partial benchmark is useless.

    Args:
        make_handler: sets up the system and returns a function that handles a command.
    """
    die_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as responses:
        os.dup2(2, 1)  # keeps output of libraries out of the responses
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
    """A running worker; created by `running_worker`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def run_batch(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, **options: Any
    ) -> DecodeRun:
        """Generate from all prompts in one batch; raises RuntimeError if the worker exited."""
        command = {"prompts": prompts, "max_tokens": max_tokens, **options}
        return DecodeRun.from_json(await self.request(command, timeout_s=RUN_TIMEOUT_S))

    async def request(self, command: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a command and return its response."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.read_response(timeout_s)

    async def read_response(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next response.

        Raises:
            RuntimeError: the worker exited.
            TimeoutError: no response within timeout_s seconds.
        """
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {await self._process.wait()}")
        return dict(json.loads(line))

    async def close(self) -> None:
        """Close stdin, which ends the worker; send SIGKILL after END_TIMEOUT_S seconds."""
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
    """Run a worker for the lifetime of the context; it is ready when the context is entered.

    Args:
        module: module of the worker.
        arguments: its command-line arguments.
        environment: its complete environment; None for that of this process.
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
