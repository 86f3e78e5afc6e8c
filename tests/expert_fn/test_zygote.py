"""The zygote as a real process, with sandboxes that need no torch (zygote_stand_in.py)."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from faasmoe_expert.lifeline import PARENT_VARIABLE

STAND_IN = str(Path(__file__).with_name("zygote_stand_in.py"))
ENDS_AT_ONCE, NEVER_ANSWERS = 99, 98
DEADLINE_S = 20.0


class Driver:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def send(self, **command: Any) -> None:
        self.send_line(json.dumps(command))

    def send_line(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    def spawn(self, name: str, **config: Any) -> dict[str, Any]:
        self.send(verb="spawn", id=name, config=config)
        event = self.event()
        assert (event["event"], event["id"]) == ("spawned", name)
        return event

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def zygote() -> Iterator[Driver]:
    with running(STAND_IN) as driver:
        yield driver


@contextmanager
def running(*arguments: str) -> Iterator[Driver]:
    environment = {
        **os.environ,
        "FAASMOE_TOKEN": "secret",
        "OMP_NUM_THREADS": "1",  # as the platform sets it; else OpenBLAS starts threads on import
        PARENT_VARIABLE: str(os.getpid()),
    }
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    with process:
        driver = Driver(process)
        assert driver.event() == {"event": "ready", "pid": process.pid}
        yield driver
        process.kill()


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "not in time"
        os.sched_yield()


def is_ready(address: str) -> bool:
    with urllib.request.urlopen(f"http://{address}/readyz", timeout=DEADLINE_S) as answer:
        return bool(answer.status == 200)


def test_forks_sandboxes_that_answer_at_the_address_it_told(zygote: Driver) -> None:
    first, second = zygote.spawn("s1", threads=1), zygote.spawn("s2", threads=1)
    assert first["pid"] != second["pid"]
    assert is_ready(first["address"])
    assert is_ready(second["address"])


def test_reports_what_ended_and_how(zygote: Driver) -> None:
    killed = zygote.spawn("killed")
    os.kill(killed["pid"], signal.SIGKILL)
    expected = {"event": "exited", "id": "killed", "pid": killed["pid"], "status": -9}
    assert zygote.event() == expected
    failed = zygote.spawn("failed", threads=ENDS_AT_ONCE)
    assert zygote.event() == {**expected, "id": "failed", "pid": failed["pid"], "status": 3}


def test_ends_a_sandbox_gently(zygote: Driver) -> None:
    sandbox = zygote.spawn("s1")
    assert is_ready(sandbox["address"])
    zygote.send(verb="kill", id="s1", grace_s=DEADLINE_S)
    assert zygote.event()["status"] == 0


def test_kills_a_sandbox_that_does_not_end_in_its_grace(zygote: Driver) -> None:
    zygote.spawn("s1", threads=NEVER_ANSWERS)
    zygote.send(verb="kill", id="s1", grace_s=0.2)
    assert zygote.event()["status"] in (-signal.SIGKILL, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "unknown verb"),
        ('{"verb": "dance"}', "unknown verb"),
        ('{"verb": "spawn", "id": "s1"}', "unknown verb or fields"),
        ('{"verb": "kill", "id": "s9"}', "id: got 's9', expected a sandbox that runs"),
        ('{"verb": "kill", "id": "s0", "grace_s": "long"}', "could not convert"),
        ('{"verb": "spawn", "id": "s0", "config": {}}', "id: got 's0', which runs already"),
    ],
)
def test_refuses_a_bad_command_and_goes_on(zygote: Driver, line: str, message: str) -> None:
    sandbox = zygote.spawn("s0")
    zygote.send_line(line)
    event = zygote.event()
    assert event["event"] == "refused"
    assert message in event["message"]
    assert is_ready(sandbox["address"])


def test_takes_its_sandboxes_along_when_its_input_ends(zygote: Driver) -> None:
    pids = [zygote.spawn(f"s{number}")["pid"] for number in range(3)]
    assert zygote.end() == 0
    assert not any(is_running(pid) for pid in pids)


def test_takes_its_sandboxes_along_when_it_is_terminated(zygote: Driver) -> None:
    pid = zygote.spawn("s1")["pid"]
    zygote.process.terminate()
    assert zygote.process.wait(DEADLINE_S) == 0
    assert not is_running(pid)


def test_takes_its_sandboxes_along_when_it_is_killed(zygote: Driver) -> None:
    pids = [zygote.spawn(f"s{number}", threads=NEVER_ANSWERS)["pid"] for number in range(3)]
    zygote.process.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids))


def test_ends_with_its_parent_even_if_that_is_killed() -> None:
    script = (
        "import os, subprocess, sys\n"
        f"env = {{**os.environ, {PARENT_VARIABLE!r}: str(os.getpid())}}\n"
        f"zygote = subprocess.Popen([sys.executable, {STAND_IN!r}], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)\n"
        "zygote.stdout.readline()\n"
        'zygote.stdin.write(\'{"verb": "spawn", "id": "s", "config": {"threads": 98}}\\n\')\n'
        "zygote.stdin.flush()\n"
        "print(zygote.pid, zygote.stdout.readline(), flush=True)\n"
        "zygote.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        zygote_pid, _, event = parent.stdout.readline().decode().partition(" ")
        pids = [int(zygote_pid), json.loads(event)["pid"]]
        parent.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids))


def test_forks_the_real_runtime_from_a_process_that_has_computed_nothing() -> None:
    with running("-m", "faasmoe_expert.zygote") as real:
        # A parallel region would have left its threads, and children that hang in their first.
        assert len(list(Path(f"/proc/{real.process.pid}/task").iterdir())) == 1
        sandbox = real.spawn("s1", device="cpu")
        assert is_ready(sandbox["address"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{sandbox['address']}/v1/functions", timeout=DEADLINE_S)
        assert real.end() == 0
        assert not is_running(sandbox["pid"])
