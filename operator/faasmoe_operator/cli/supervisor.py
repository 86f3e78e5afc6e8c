"""Restarts child processes that exit: the zygote, the control process and the router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Never

from faasmoe_contracts.backoff import Backoff
from faasmoe_operator.cli.child_process import (
    ChildNotStarted,
    ChildProcess,
    RunChild,
    running_child,
)
from faasmoe_operator.cli.logs import print_progress
from faasmoe_operator.errors import CommandError


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When and how often a child is restarted.

    Attributes:
        backoff_s: delays before consecutive restarts; the last one repeats.
        max_failures: number of consecutive failures after which the child is not restarted.
        reset_after_s: run time after which an exit no longer counts as consecutive.
        must_start: whether the child is not restarted until it `has_started` once, since what it
            fails at then is the user's to mend.
    """

    backoff_s: tuple[float, ...] = (0.0, 0.5, 2.0, 5.0)
    max_failures: int = 6
    reset_after_s: float = 10.0
    must_start: bool = False


class SupervisedChild:
    """A child process that is restarted; created by `supervised`.

    Attributes:
        name: name for messages.
        pid: process id; None between an exit and the restart.
        n_restarts: restarts so far.
        has_started: whether it has worked once; set by whoever checks that.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid: int | None = None
        self.n_restarts = 0
        self.has_started = False


@asynccontextmanager
async def supervised(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    grace_s: float,
    restarts: RestartPolicy | None = None,
    pass_fds: Sequence[int] = (),
    run: RunChild = running_child,
) -> AsyncIterator[tuple[SupervisedChild, asyncio.Task[Never]]]:
    """Keep a child process running for the lifetime of the context.

    Args:
        name: name for messages.
        command: the command line.
        environment: the complete environment of the child.
        log: called with each output line.
        grace_s: seconds between SIGTERM and SIGKILL.
        restarts: restart policy; None for the default one.
        pass_fds: descriptors that the child inherits, under the same numbers.
        run: runs the child.

    Yields:
        The child, and a task that raises CommandError once the child is not restarted.
    """

    def start() -> AbstractAsyncContextManager[ChildProcess]:
        return run(command, environment=environment, log=log, grace_s=grace_s, pass_fds=pass_fds)

    async with supervised_start(name, start, restarts=restarts) as supervised_child:
        yield supervised_child


@asynccontextmanager
async def supervised_start(
    name: str,
    start: Callable[[], AbstractAsyncContextManager[ChildProcess]],
    *,
    restarts: RestartPolicy | None = None,
) -> AsyncIterator[tuple[SupervisedChild, asyncio.Task[Never]]]:
    """As `supervised`, for children that are started otherwise.

    Args:
        name: name for messages.
        start: runs a child for the lifetime of its context; may raise ChildNotStarted.
        restarts: restart policy; None for the default one.
    """
    supervised_child = SupervisedChild(name)

    async def run() -> str:
        try:
            async with start() as process:
                supervised_child.pid = process.pid
                return await process.describe_exit()
        except ChildNotStarted as error:
            return str(error)

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
    backoff = Backoff(restart_policy.backoff_s)
    while True:
        started_s = time.monotonic()
        exit_description = await run()
        supervised_child.pid = None
        if time.monotonic() - started_s >= restart_policy.reset_after_s:
            backoff.reset()
        delay_s = backoff.next_delay_s()
        is_unusable = restart_policy.must_start and not supervised_child.has_started
        if is_unusable or backoff.n_failures >= restart_policy.max_failures:
            raise CommandError(f"the {supervised_child.name} {exit_description}")
        print_progress(
            f"the {supervised_child.name} {exit_description.splitlines()[0]}; restarting it"
        )
        supervised_child.n_restarts += 1
        await asyncio.sleep(delay_s)
