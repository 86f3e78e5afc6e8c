import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from faasmoe_operator.cli.supervisor import RestartPolicy, supervised
from faasmoe_operator.errors import CommandError

DEADLINE_S = 120.0
WAITS = (sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()")
FAILS = (sys.executable, "-c", "import sys; sys.exit('no luck')")
IMMEDIATE = RestartPolicy(backoff_s=(0.0,), max_failures=3, reset_after_s=30.0)


def test_restarts_killed_child() -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()

    async def scenario() -> int | None:
        async with (
            asyncio.timeout(DEADLINE_S),
            supervised(
                "child",
                WAITS,
                environment=os.environ,
                log=lines.put_nowait,
                grace_s=1.0,
                restarts=IMMEDIATE,
            ) as (child, _),
        ):
            await lines.get()
            first = child.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await lines.get()
            assert child.pid not in (None, first)
            assert child.n_restarts == 1
            return child.pid

    last = asyncio.run(scenario())
    assert not Path(f"/proc/{last}").exists()


def test_gives_up_after_consecutive_failures() -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(DEADLINE_S),
            supervised(
                "child",
                FAILS,
                environment=os.environ,
                log=lambda _: None,
                grace_s=1.0,
                restarts=IMMEDIATE,
            ) as (child, failure),
        ):
            with pytest.raises(CommandError, match="the child ended with status 1\n  no luck"):
                await failure
            assert child.n_restarts == 2

    asyncio.run(scenario())
