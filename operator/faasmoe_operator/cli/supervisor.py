"""Children that are started again when they end: the zygote and the control process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Never

from faasmoe_operator.cli import child_process
from faasmoe_operator.cli.logs import print_progress
from faasmoe_operator.errors import CommandError


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How a child is started again.

    Attributes:
        delays_s: before each restart in a row; the last one repeats.
        most: ends in a row after which it is given up.
        settled_s: how long it must live for its end not to count as one of a row.
    """

    backoff_s: tuple[float, ...] = (0.0, 0.5, 2.0, 5.0)
    max_failures: int = 6
    reset_after_s: float = 10.0


class SupervisedChild:
    """A child that is kept running; `kept` makes one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid: int | None = None
        self.n_restarts = 0


@asynccontextmanager
async def supervised(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    grace_s: float,
    restarts: RestartPolicy | None = None,
) -> AsyncIterator[tuple[SupervisedChild, asyncio.Task[Never]]]:
    """Keep a child running as long as the context lasts.

    Args:
        name: what it is called.
        command: what to run.
        environment: all of its environment.
        log: gets each line that it writes.
        grace_s: how long it may take to end when asked to.
        restarts: how restarting it.

    Yields:
        The child, and a task that raises CommandError when it is given up.
    """
    supervised_child = SupervisedChild(name)

    async def run() -> str:
        async with child_process.running_child(
            command, environment=environment, log=log, grace_s=grace_s
        ) as process:
            supervised_child.pid = process.pid
            return await process.describe_exit()

    supervisor = asyncio.create_task(_supervise(supervised_child, run, restarts or RestartPolicy()))
    try:
        yield supervised_child, supervisor
    finally:
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)


async def _supervise(
    supervised_child: SupervisedChild,
    run: Callable[[], Awaitable[str]],
    restart_policy: RestartPolicy,
) -> Never:
    failures = 0
    while True:
        started_s = time.monotonic()
        exit_description = await run()
        supervised_child.pid = None
        failures = (
            1 if time.monotonic() - started_s >= restart_policy.reset_after_s else failures + 1
        )
        if failures >= restart_policy.max_failures:
            raise CommandError(f"the {supervised_child.name} {exit_description}")
        print_progress(
            f"the {supervised_child.name} {exit_description.splitlines()[0]}; restarting it"
        )
        supervised_child.n_restarts += 1
        await asyncio.sleep(
            restart_policy.backoff_s[min(failures - 1, len(restart_policy.backoff_s) - 1)]
        )
