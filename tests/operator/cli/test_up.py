"""`faasmoe up` as a real process, with a router and sandboxes that need no torch."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

WriteModel = Callable[..., Path]

COMMAND = (sys.executable, str(Path(__file__).with_name("faasmoe_stand_in.py")))
DEADLINE_S = 30.0


class Launched:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output = ""

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{self.output}")

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=DEADLINE_S)
        self.output += rest
        return self.process.returncode

    def children(self) -> list[int]:
        """Processes that this one started, and theirs."""
        found, parents = [], [self.process.pid]
        while parents:
            path = Path(f"/proc/{parents[0]}/task/{parents.pop(0)}/children")
            pids = [int(pid) for pid in path.read_text().split()]
            found += pids
            parents += pids
        return found


@contextmanager
def up(file: Path, *arguments: str, **environment: str) -> Iterator[Launched]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [*COMMAND, "up", "-f", str(file), "--port", port, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(file.parent), **environment},
    )
    with process:
        try:
            yield Launched(process)
        finally:
            process.kill()


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def await_end(pids: list[int]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline_s, "a child was left behind"
        os.sched_yield()


@pytest.fixture
def model(write_model: WriteModel, store: Path) -> Path:
    return write_model("granularity: {expertsPerFunction: 3}", "experts: {functionsPerSandbox: 3}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal_and_leaves_nothing_behind(
    model: Path, number: signal.Signals
) -> None:
    with up(model) as launched:
        launched.read_until("memory of all processes")
        assert "tiny is served by 6 functions in 2 sandboxes" in launched.output
        assert re.search(r"OpenAI base URL +http://127.0.0.1:\d+/v1", launched.output)
        children = launched.children()
        assert len(children) == 4  # zygote, two sandboxes, router
        launched.process.send_signal(number)
        assert launched.end() == 0
        assert not any(is_running(pid) for pid in children)
        table = re.search(r"\[router\] table (\S+) 0o700", launched.output)
        assert table is not None
        assert not Path(table[1]).parent.exists()


def test_leaves_nothing_behind_when_it_is_killed(model: Path) -> None:
    with up(model) as launched:
        launched.read_until("memory of all processes")
        children = launched.children()
        launched.process.kill()
        await_end(children)


def test_ends_cleanly_when_it_is_interrupted_while_it_starts(
    write_model: WriteModel, store: Path
) -> None:
    with up(write_model("experts: {threads: 98}")) as launched:  # sandboxes that never answer
        launched.read_until("begins")
        children = launched.children()
        launched.process.send_signal(signal.SIGINT)
        assert launched.end() == 130
        assert not any(is_running(pid) for pid in children)
    assert "Traceback" not in launched.output


def test_says_why_the_router_does_not_start(model: Path) -> None:
    with up(model, STAND_IN_FAILS="1") as launched:
        assert launched.end() == 1
    assert "faasmoe: error: the router ended with status 1\n  the router has no model" in (
        launched.output
    )
    assert "Traceback" not in launched.output


def test_says_why_a_sandbox_does_not_start(write_model: WriteModel, store: Path) -> None:
    with up(write_model("experts: {threads: 99}")) as launched:
        assert launched.end() == 1
    assert "was lost before it was ready: ended with status 3" in launched.output
    assert "Traceback" not in launched.output


def test_ends_when_a_sandbox_is_lost(model: Path) -> None:
    with up(model) as launched:
        launched.read_until("memory of all processes")
        sandbox = re.search(r"^s\w+ +(\d+) ", launched.output, re.MULTILINE)
        assert sandbox is not None
        os.kill(int(sandbox[1]), signal.SIGKILL)
        assert launched.end() == 1
    assert "was lost: ended with status -9" in launched.output


def test_writes_logs_to_files_if_asked_to(model: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with up(model, "--log-dir", str(logs)) as launched:
        launched.read_until("memory of all processes")
        launched.process.terminate()
        assert launched.end() == 0
    assert "[router]" not in launched.output
    assert (logs / "router.log").read_text().startswith("table ")
    assert "begins" in (logs / "sandboxes.log").read_text()


def test_says_that_the_preparation_failed(write_model: WriteModel) -> None:
    with up(write_model(source="file://missing")) as launched:
        assert launched.end() == 1
    assert re.search(r"the preparation of file:///\S+missing ended with status 1", launched.output)
    assert "Traceback" not in launched.output
