"""The zygote as a real process, with sandboxes that need no torch (zygote_stand_in.py)."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from faasmoe_expert.lifeline import PARENT_VARIABLE
from faasmoe_expert.zygote import SOCKET_VARIABLE
from faasmoe_expert.zygote_channel import MAX_LINE_BYTES

STAND_IN = str(Path(__file__).with_name("zygote_stand_in.py"))
ENDS_AT_ONCE, NEVER_ANSWERS = 99, 98
DEADLINE_S = 20.0


class Client:
    """A connection to a zygote."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("r")
        self.greeting = self.event()

    def send(self, **command: Any) -> None:
        self.send_line(json.dumps(command))

    def send_line(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.lines.readline())
        return event

    def spawn(self, name: str, **config: Any) -> dict[str, Any]:
        self.send(verb="spawn", id=name, config=config)
        event = self.event()
        assert (event["event"], event["id"]) == ("spawned", name)
        return event

    def sandboxes(self) -> list[dict[str, Any]]:
        self.send(verb="list")
        event = self.event()
        assert event["event"] == "sandboxes"
        found: list[dict[str, Any]] = event["sandboxes"]
        return found

    def is_cut(self) -> bool:
        return self.lines.readline() == ""

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


class Running:
    """A zygote process and the path of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.path = path

    @contextmanager
    def client(self) -> Iterator[Client]:
        eventually(self.path.exists)
        client = Client(self.path)
        try:
            assert client.greeting == {"event": "ready", "pid": self.process.pid}
            yield client
        finally:
            client.close()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def running() -> Iterator[Running]:
    with running_zygote(STAND_IN) as running:
        yield running


@pytest.fixture
def zygote(running: Running) -> Iterator[Client]:
    with running.client() as client:
        yield client


@contextmanager
def running_zygote(*arguments: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zygote.sock"
        environment = {
            **os.environ,
            "FAASMOE_TOKEN": "secret",
            SOCKET_VARIABLE: str(path),
            "OMP_NUM_THREADS": "1",  # as the platform sets it; else OpenBLAS starts threads
            PARENT_VARIABLE: str(os.getpid()),
        }
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        with process:
            try:
                yield Running(process, path)
            finally:
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


def test_forks_sandboxes_that_answer_at_the_address_it_told(zygote: Client) -> None:
    first, second = zygote.spawn("s1", threads=1), zygote.spawn("s2", threads=1)
    assert first["pid"] != second["pid"]
    assert is_ready(first["address"])
    assert is_ready(second["address"])


def test_reports_what_ended_and_how(zygote: Client) -> None:
    killed = zygote.spawn("killed")
    os.kill(killed["pid"], signal.SIGKILL)
    expected = {"event": "exited", "id": "killed", "pid": killed["pid"], "status": -9}
    assert zygote.event() == expected
    failed = zygote.spawn("failed", threads=ENDS_AT_ONCE)
    assert zygote.event() == {**expected, "id": "failed", "pid": failed["pid"], "status": 3}


def test_ends_a_sandbox_gently(zygote: Client) -> None:
    sandbox = zygote.spawn("s1")
    assert is_ready(sandbox["address"])
    zygote.send(verb="kill", id="s1", grace_s=DEADLINE_S)
    assert zygote.event()["status"] == 0


def test_kills_a_sandbox_that_does_not_end_in_its_grace(zygote: Client) -> None:
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
def test_refuses_a_bad_command_and_goes_on(zygote: Client, line: str, message: str) -> None:
    sandbox = zygote.spawn("s0")
    zygote.send_line(line)
    event = zygote.event()
    assert event["event"] == "refused"
    assert message in event["message"]
    assert is_ready(sandbox["address"])


def test_outlives_its_clients_and_tells_the_next_one_what_runs(running: Running) -> None:
    with running.client() as first:
        spawned = first.spawn("s1", capacity=3, threads=1)
    with running.client() as second:
        assert second.sandboxes() == [
            {
                "id": "s1",
                "pid": spawned["pid"],
                "address": spawned["address"],
                "config": {"capacity": 3, "threads": 1},
            }
        ]
        second.send(verb="kill", id="s1", grace_s=DEADLINE_S)
        assert second.event()["event"] == "exited"
        assert second.sandboxes() == []


def test_listens_to_the_client_that_came_last(running: Running) -> None:
    with running.client() as first:
        first.spawn("s1")
        with running.client() as second:
            assert first.is_cut()
            assert [s["id"] for s in second.sandboxes()] == ["s1"]


def test_cuts_a_client_that_sends_a_line_without_end(running: Running) -> None:
    with running.client() as flood:
        sandbox = flood.spawn("s1")
        flood.socket.sendall(b"x" * (MAX_LINE_BYTES + 1))
        assert flood.is_cut()
    assert is_ready(sandbox["address"])
    with running.client() as next_one:
        assert [s["id"] for s in next_one.sandboxes()] == ["s1"]


def test_can_be_reached_by_its_own_user_only(running: Running, zygote: Client) -> None:
    assert running.path.stat().st_mode & 0o777 == 0o600


def test_says_that_it_was_given_no_socket() -> None:
    environment = {k: v for k, v in os.environ.items() if k != SOCKET_VARIABLE}
    ended = subprocess.run(
        [sys.executable, STAND_IN], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == f"{SOCKET_VARIABLE}: not set, expected the path of a socket\n"


def test_takes_its_sandboxes_along_when_it_is_terminated(running: Running, zygote: Client) -> None:
    pids = [zygote.spawn(f"s{number}")["pid"] for number in range(3)]
    assert running.end() == 0
    assert not any(is_running(pid) for pid in pids)


def test_takes_its_sandboxes_along_when_it_is_killed(running: Running, zygote: Client) -> None:
    pids = [zygote.spawn(f"s{number}", threads=NEVER_ANSWERS)["pid"] for number in range(3)]
    running.process.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids))


def test_ends_with_its_parent_even_if_that_is_killed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zygote.sock"
        script = (
            "import os, subprocess, sys\n"
            f"env = {{**os.environ, {PARENT_VARIABLE!r}: str(os.getpid()),"
            f" {SOCKET_VARIABLE!r}: {str(path)!r}}}\n"
            f"zygote = subprocess.Popen([sys.executable, {STAND_IN!r}],"
            " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)\n"
            "zygote.wait()\n"
        )
        with subprocess.Popen([sys.executable, "-c", script]) as parent:
            eventually(path.exists)
            client = Client(path)
            pids = [client.greeting["pid"], client.spawn("s", threads=NEVER_ANSWERS)["pid"]]
            parent.kill()
        eventually(lambda: not any(is_running(pid) for pid in pids))
        client.close()


def test_forks_the_real_runtime_from_a_process_that_has_computed_nothing() -> None:
    with running_zygote("-m", "faasmoe_expert.zygote") as real, real.client() as client:
        # A parallel region would have left its threads, and children that hang in their first.
        assert len(list(Path(f"/proc/{real.process.pid}/task").iterdir())) == 1
        sandbox = client.spawn("s1", device="cpu")
        assert is_ready(sandbox["address"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{sandbox['address']}/v1/functions", timeout=DEADLINE_S)
        assert real.end() == 0
        assert not is_running(sandbox["pid"])
