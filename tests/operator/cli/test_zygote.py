"""Children that a zygote of the launcher forks, with real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from faasmoe_operator.cli.child_process import ChildNotStarted
from faasmoe_operator.cli.supervisor import RestartPolicy, supervised_start
from faasmoe_operator.cli.zygote import Zygote

COMMAND = (sys.executable, str(Path(__file__).with_name("forking_child.py")))
DEADLINE_S = 120.0
GRACE_S = 20.0


@asynccontextmanager
async def new_zygote(**variables: str) -> AsyncIterator[Zygote]:
    async with asyncio.timeout(DEADLINE_S):
        async with Zygote(
            "zygote",
            COMMAND,
            environment={**os.environ, **variables},
            log=lambda _: None,
            grace_s=GRACE_S,
            gives_away="GIVES_AWAY" in variables,
        ) as zygote:
            yield zygote


def run(scenario: Callable[[Zygote], Awaitable[None]], **variables: str) -> None:
    async def main() -> None:
        async with new_zygote(**variables) as zygote:
            await scenario(zygote)

    asyncio.run(main())


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while is_running(pid):
        assert time.monotonic() < deadline_s, f"process {pid} has not ended"
        time.sleep(0.01)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_child_has_its_own_environment_name_and_output() -> None:
    async def scenario(zygote: Zygote) -> None:
        lines: asyncio.Queue[str] = asyncio.Queue()
        async with zygote.running_child(
            {"WORD": "hello"}, log=lines.put_nowait, grace_s=GRACE_S
        ) as child:
            assert await lines.get() == "hello ['FAASMOE_PARENT_PID', 'WORD']"
            assert name_of(child.pid) == "forked"
            assert child.pid != zygote.pid
        assert not is_running(child.pid)
        assert await child.exit_status() == -signal.SIGTERM

    run(scenario, SECRET="of the zygote")


def test_children_inherit_what_was_made_before_they_were_forked() -> None:
    async def scenario(zygote: Zygote) -> None:
        lines: asyncio.Queue[str] = asyncio.Queue()
        for word, expected in (("one", "one ["), ("two", "one two [")):
            environment = {"WORD": word, "STATUS": "0"}
            async with zygote.running_child(
                environment, log=lines.put_nowait, grace_s=GRACE_S
            ) as child:
                assert await child.exit_status() == 0
            assert (await lines.get()).startswith(expected)

    run(scenario)


def test_status_and_last_lines_of_a_child_that_exits() -> None:
    async def scenario(zygote: Zygote) -> None:
        environment = {"WORD": "bye", "STATUS": "3"}
        async with zygote.running_child(environment, log=lambda _: None, grace_s=GRACE_S) as child:
            assert (await child.describe_exit()).startswith("ended with status 3\n  bye")

    run(scenario)


def test_a_descriptor_arrives_under_its_number() -> None:
    async def scenario(zygote: Zygote) -> None:
        ends = [os.pipe() for _ in range(2)]
        for _, write_end in ends:
            environment = {"WORD": "w", "DESCRIPTOR": str(write_end), "STATUS": "0"}
            async with zygote.running_child(
                environment,
                log=lambda _: None,
                grace_s=GRACE_S,
                pass_fds=[end for _, end in reversed(ends)],
            ) as child:
                assert await child.exit_status() == 0
        for read_end, write_end in ends:
            os.close(write_end)
            with os.fdopen(read_end, "rb") as file:
                assert file.read() == b"written"

    run(scenario)


def test_killed_child_is_forked_again_by_the_same_zygote() -> None:
    async def scenario(zygote: Zygote) -> None:
        lines: asyncio.Queue[str] = asyncio.Queue()
        async with supervised_start(
            "child",
            lambda: zygote.running_child({"WORD": "again"}, log=lines.put_nowait, grace_s=GRACE_S),
            restarts=RestartPolicy(backoff_s=(0.0,)),
        ) as (child, _):
            await lines.get()
            first, zygote_pid = child.pid, zygote.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await lines.get()
            assert child.pid not in (None, first)
            assert zygote.pid == zygote_pid

    run(scenario)


def test_killed_zygote_takes_its_child_along_and_both_start_again() -> None:
    async def scenario(zygote: Zygote) -> None:
        lines: asyncio.Queue[str] = asyncio.Queue()
        async with supervised_start(
            "child",
            lambda: zygote.running_child({"WORD": "again"}, log=lines.put_nowait, grace_s=GRACE_S),
            restarts=RestartPolicy(backoff_s=(0.0,)),
        ) as (child, _):
            await lines.get()
            first, zygote_pid = child.pid, zygote.pid
            assert first is not None
            assert zygote_pid is not None
            os.kill(zygote_pid, signal.SIGKILL)
            await lines.get()
            assert child.pid not in (None, first)
            assert zygote.pid not in (None, zygote_pid)
            await asyncio.to_thread(wait_for_end, first)  # the kernel ends it after the zygote

    run(scenario)


def test_zygote_that_does_not_start_says_why() -> None:
    async def scenario(zygote: Zygote) -> None:
        with pytest.raises(ChildNotStarted, match="the zygote ended with status 1\n  no luck"):
            async with zygote.running_child({}, log=lambda _: None, grace_s=GRACE_S):
                raise AssertionError("it has not started")

    run(scenario, FAILS="yes")


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    async def scenario(zygote: Zygote) -> None:
        lines: asyncio.Queue[str] = asyncio.Queue()
        async with zygote.running_child(
            {"WORD": "stays", "IGNORES_SIGTERM": "yes"}, log=lines.put_nowait, grace_s=0.05
        ) as child:
            await lines.get()
        assert await child.exit_status() == -signal.SIGKILL

    run(scenario)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_child_given_away_is_the_launchers_and_survives_the_zygote() -> None:
    async def scenario(zygote: Zygote) -> None:
        lines: asyncio.Queue[str] = asyncio.Queue()
        async with zygote.running_child(
            {"WORD": "hello"}, log=lines.put_nowait, grace_s=GRACE_S
        ) as child:
            assert await lines.get() == "hello ['FAASMOE_PARENT_PID', 'WORD']"
            assert parent_of(child.pid) == os.getpid()
            assert os.getsid(child.pid) == child.pid
            assert zygote.pid is not None
            os.kill(first := zygote.pid, signal.SIGKILL)
            while zygote.pid is not None:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)
            async with zygote.running_child(
                {"WORD": "again", "STATUS": "3"}, log=lambda _: None, grace_s=GRACE_S
            ) as other:
                assert await other.exit_status() == 3
            assert zygote.pid not in (None, first)
            assert is_running(child.pid)
        assert await child.exit_status() == -signal.SIGTERM
        assert not is_running(child.pid)

    run(scenario, GIVES_AWAY="1")


def test_children_given_away_at_once_are_each_adopted() -> None:
    async def scenario(zygote: Zygote) -> None:
        async def run_one(word: str) -> int:
            environment = {"WORD": word, "STATUS": word}
            async with zygote.running_child(
                environment, log=lambda _: None, grace_s=GRACE_S
            ) as child:
                return await child.exit_status()

        assert await asyncio.gather(*map(run_one, "1234")) == [1, 2, 3, 4]

    run(scenario, GIVES_AWAY="1")


def test_a_child_given_away_dies_with_the_launcher() -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1]); import test_zygote\n"
        "async def main():\n"
        "    async with test_zygote.new_zygote(GIVES_AWAY='1') as zygote:\n"
        "        async with zygote.running_child({'WORD': 'w'}, log=print, grace_s=1) as child:\n"
        "            print(child.pid, flush=True)\n"
        "            await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    command = (sys.executable, "-c", script, str(Path(__file__).parent))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert parent_of(pid) == launcher.pid
        launcher.kill()
    wait_for_end(pid)
