import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from faasmoe_operator.cli.supervisor import RestartPolicy, supervised
from faasmoe_operator.errors import CommandError

DEADLINE_S = 20.0
WAITS = (sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()")
FAILS = (sys.executable, "-c", "import sys; sys.exit('no luck')")
AT_ONCE = RestartPolicy(backoff_s=(0.0,), max_failures=3, reset_after_s=30.0)


def test_starts_a_child_again_that_ended() -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()

    async def story() -> int | None:
        async with (
            asyncio.timeout(DEADLINE_S),
            supervised(
                "thing",
                WAITS,
                environment=os.environ,
                log=lines.put_nowait,
                grace_s=1.0,
                restarts=AT_ONCE,
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

    last = asyncio.run(story())
    assert not Path(f"/proc/{last}").exists()


def test_gives_up_a_child_that_ends_again_and_again() -> None:
    async def story() -> None:
        async with (
            asyncio.timeout(DEADLINE_S),
            supervised(
                "thing",
                FAILS,
                environment=os.environ,
                log=lambda _: None,
                grace_s=1.0,
                restarts=AT_ONCE,
            ) as (child, failure),
        ):
            with pytest.raises(CommandError, match="the thing ended with status 1\n  no luck"):
                await failure
            assert child.n_restarts == 2

    asyncio.run(story())
