"""Children that are started again when they end: the zygote and the control process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Never

from faasmoe_operator.cli import child
from faasmoe_operator.cli.logs import say
from faasmoe_operator.errors import CommandError


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a child is started again.

    Attributes:
        delays_s: before each restart in a row; the last one repeats.
        most: ends in a row after which it is given up.
        settled_s: how long it must live for its end not to count as one of a row.
    """

    delays_s: tuple[float, ...] = (0.0, 0.5, 2.0, 5.0)
    most: int = 6
    settled_s: float = 10.0


class Kept:
    """A child that is kept running; `kept` makes one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid: int | None = None
        self.n_restarts = 0


@asynccontextmanager
async def kept(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    grace_s: float,
    restarts: Restarts | None = None,
) -> AsyncIterator[tuple[Kept, asyncio.Task[Never]]]:
    """Keep a child running as long as the context lasts.

    Args:
        name: what it is called.
        command: what to run.
        environment: all of its environment.
        log: gets each line that it writes.
        grace_s: how long it may take to end when asked to.
        restarts: how it is started again.

    Yields:
        The child, and a task that raises CommandError when it is given up.
    """
    known = Kept(name)

    async def run() -> str:
        async with child.running(
            command, environment=environment, log=log, grace_s=grace_s
        ) as process:
            known.pid = process.pid
            return await process.wait()

    keeper = asyncio.create_task(_keep(known, run, restarts or Restarts()))
    try:
        yield known, keeper
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def _keep(known: Kept, run: Callable[[], Awaitable[str]], restarts: Restarts) -> Never:
    failures = 0
    while True:
        begun_s = time.monotonic()
        how = await run()
        known.pid = None
        failures = 1 if time.monotonic() - begun_s >= restarts.settled_s else failures + 1
        if failures >= restarts.most:
            raise CommandError(f"the {known.name} {how}")
        say(f"the {known.name} {how.splitlines()[0]}; it is started again")
        known.n_restarts += 1
        await asyncio.sleep(restarts.delays_s[min(failures - 1, len(restarts.delays_s) - 1)])
