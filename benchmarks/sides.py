"""The outside of a worker process: starts it, asks it, ends it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.decoding import Run

from faasmoe_expert.lifeline import PARENT_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
MAX_ANSWER_BYTES = 16 << 20
START_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 900.0
END_TIMEOUT_S = 40.0


class Side:
    """One side of the comparison, in a process of its own; `running` makes one."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def run(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, **more: Any) -> Run:
        """Generate from the prompts as one batch; raises RuntimeError if the worker ended."""
        command = {"prompts": prompts, "max_tokens": max_tokens, **more}
        return Run.from_json(await self.ask(command, timeout_s=RUN_TIMEOUT_S))

    async def ask(self, command: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a command; return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.answer(timeout_s)

    async def answer(self, timeout_s: float) -> dict[str, Any]:
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
async def running(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Side]:
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
        env={**(environment or os.environ), PARENT_VARIABLE: str(os.getpid())},
        limit=MAX_ANSWER_BYTES,
    )
    side = Side(process)
    try:
        await side.answer(START_TIMEOUT_S)
        yield side
    finally:
        await side.close()
