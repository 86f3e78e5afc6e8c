"""The parent of this launcher's zygotes: a process that holds torch once for all of them.

The zygotes it forks become this launcher's children, which it supervises as any other; they go on
if their parent dies, which then starts again when a zygote has to. A zygote whose libraries would
read other variables when they are loaded is started as a process of its own, as is one of another
interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import asynccontextmanager

from faasmoe_contracts.fork_server import FORK_MODULE_ENV
from faasmoe_operator.cli.child_process import ChildProcess, running_child
from faasmoe_operator.cli.zygote import Zygote

COMMAND = (sys.executable, "-m", "faasmoe_router.common_zygote")
GRACE_S = 5.0
SETTINGS = "FAASMOE_"
KERNEL_SETTINGS = ("FAASMOE_KERNELS", "FAASMOE_KERNELS_ISA")
"""Settings of ours that count as a library's: the kernel library is loaded before the fork."""
SET_AGAIN = (
    # By `faasmoe_expert.malloc`, in the fork.
    *("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"),
    # Read with the first product.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
)
SET_LATER = {
    # A sandbox tells torch its number of threads; a router takes OpenMP's.
    "faasmoe_expert.zygote": {*SET_AGAIN, "OMP_NUM_THREADS", "MKL_NUM_THREADS"},
    "faasmoe_router.zygote": {*SET_AGAIN},
}
"""Variables that may differ, by module: what reads them does so after the fork, or is told."""
TRACING = "OTEL_"  # read by no library when it is loaded
WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


class CommonZygote:
    """Runs zygotes, as forks of one process where it can; use it as an async context manager.

    Args:
        environment: a complete environment of routers' zygotes, but for settings.
        log: called with each line that it writes.
    """

    def __init__(self, environment: Mapping[str, str], *, log: Callable[[str], None]) -> None:
        self._environment = library_variables(environment)
        self._zygote = Zygote(
            "common zygote",
            COMMAND,
            environment=self._environment,
            log=log,
            grace_s=GRACE_S,
            gives_away=True,
        )

    @property
    def pid(self) -> int | None:
        """Process id; None unless it runs."""
        return self._zygote.pid

    async def __aenter__(self) -> CommonZygote:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._zygote.__aexit__()

    @asynccontextmanager
    async def running_child(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Callable[[str], None],
        grace_s: float,
        pass_fds: Sequence[int] = (),
    ) -> AsyncIterator[ChildProcess]:
        """Run a zygote for the lifetime of the context, as `child_process.running_child` does.

        Raises:
            ChildNotStarted: the common zygote has ended before it forked the zygote.
        """
        if can_fork(self._environment, command, environment):
            context = self._zygote.running_child(
                {**environment, FORK_MODULE_ENV: command[-1]},
                log=log,
                grace_s=grace_s,
                pass_fds=pass_fds,
            )
        else:
            context = running_child(
                command, environment=environment, log=log, grace_s=grace_s, pass_fds=pass_fds
            )
        async with context as child:
            yield child


def can_fork(
    parent: Mapping[str, str], command: Sequence[str], environment: Mapping[str, str]
) -> bool:
    """Return whether a fork is as if it were started as a process of its own.

    Args:
        parent: environment of the process that loads the libraries.
        command: the command line of the process of its own.
        environment: its complete environment.
    """
    *interpreter, module = command
    set_later = SET_LATER.get(module)
    if set_later is None or tuple(interpreter) != COMMAND[:2]:
        return False
    ours, its = (_read_when_loaded(e, but=set_later) for e in (parent, environment))
    return ours == its


def library_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without settings of ours, but with those of the kernel library."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(SETTINGS) or name in KERNEL_SETTINGS
    }


def _read_when_loaded(environment: Mapping[str, str], *, but: Container[str]) -> dict[str, str]:
    variables = {
        name: value
        for name, value in library_variables(environment).items()
        if name not in but and not name.startswith(TRACING)
    }
    if variables.get(WAIT_POLICY, "").upper() == "PASSIVE":  # which does not spin
        variables.setdefault(SPIN_COUNT, "0")
    return variables
