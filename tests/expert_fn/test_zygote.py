"""The zygote as a real process, with sandboxes that need no torch (fake_zygote.py)."""

import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from zygote_process import (
    DEADLINE_S,
    ZygoteClient,
    ZygoteProcess,
    eventually,
    is_ready,
    is_running,
    running_zygote,
)

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_expert.zygote import MAX_LINE_BYTES, SOCKET_ENV

STAND_IN = str(Path(__file__).with_name("fake_zygote.py"))
ENDS_AT_ONCE, NEVER_ANSWERS = 99, 98


@pytest.fixture
def running() -> Iterator[ZygoteProcess]:
    with running_zygote(STAND_IN) as running:
        yield running


@pytest.fixture
def zygote(running: ZygoteProcess) -> Iterator[ZygoteClient]:
    with running.client() as client:
        yield client


def test_forks_sandboxes_that_answer_at_the_address_it_told(zygote: ZygoteClient) -> None:
    first, second = zygote.spawn("s1", threads=1), zygote.spawn("s2", threads=1)
    assert first["pid"] != second["pid"]
    assert is_ready(first["address"])
    assert is_ready(second["address"])


def test_reports_what_ended_and_how(zygote: ZygoteClient) -> None:
    killed = zygote.spawn("killed")
    os.kill(killed["pid"], signal.SIGKILL)
    expected = {"event": "exited", "id": "killed", "pid": killed["pid"], "status": -9}
    assert zygote.read_event() == expected
    failed = zygote.spawn("failed", threads=ENDS_AT_ONCE)
    assert zygote.read_event() == {**expected, "id": "failed", "pid": failed["pid"], "status": 3}


def test_ends_a_sandbox_gently(zygote: ZygoteClient) -> None:
    sandbox = zygote.spawn("s1")
    assert is_ready(sandbox["address"])
    zygote.send(verb="kill", id="s1", grace_s=DEADLINE_S)
    assert zygote.read_event()["status"] == 0


def test_kills_a_sandbox_that_does_not_end_in_its_grace(zygote: ZygoteClient) -> None:
    zygote.spawn("s1", threads=NEVER_ANSWERS)
    zygote.send(verb="kill", id="s1", grace_s=0.2)
    assert zygote.read_event()["status"] in (-signal.SIGKILL, -signal.SIGTERM)


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
def test_refuses_a_bad_command_and_goes_on(zygote: ZygoteClient, line: str, message: str) -> None:
    sandbox = zygote.spawn("s0")
    zygote.send_line(line)
    event = zygote.read_event()
    assert event["event"] == "refused"
    assert message in event["message"]
    assert is_ready(sandbox["address"])


def test_outlives_its_clients_and_tells_the_next_one_what_runs(running: ZygoteProcess) -> None:
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
        assert second.read_event()["event"] == "exited"
        assert second.sandboxes() == []


def test_listens_to_the_client_that_came_last(running: ZygoteProcess) -> None:
    with running.client() as first:
        first.spawn("s1")
        with running.client() as second:
            assert first.is_closed()
            assert [s["id"] for s in second.sandboxes()] == ["s1"]


def test_cuts_a_client_that_sends_a_line_without_end(running: ZygoteProcess) -> None:
    with running.client() as flood:
        sandbox = flood.spawn("s1")
        flood.socket.sendall(b"x" * (MAX_LINE_BYTES + 1))
        assert flood.is_closed()
    assert is_ready(sandbox["address"])
    with running.client() as next_one:
        assert [s["id"] for s in next_one.sandboxes()] == ["s1"]


def test_can_be_reached_by_its_own_user_only(running: ZygoteProcess, zygote: ZygoteClient) -> None:
    assert running.path.stat().st_mode & 0o777 == 0o600


def test_says_that_it_was_given_no_socket() -> None:
    environment = {k: v for k, v in os.environ.items() if k != SOCKET_ENV}
    ended = subprocess.run(
        [sys.executable, STAND_IN], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == f"{SOCKET_ENV}: not set, expected the path of a socket\n"


def test_takes_its_sandboxes_along_when_it_is_terminated(
    running: ZygoteProcess, zygote: ZygoteClient
) -> None:
    pids = [zygote.spawn(f"s{number}")["pid"] for number in range(3)]
    assert running.terminate() == 0
    assert not any(is_running(pid) for pid in pids)


def test_takes_its_sandboxes_along_when_it_is_killed(
    running: ZygoteProcess, zygote: ZygoteClient
) -> None:
    pids = [zygote.spawn(f"s{number}", threads=NEVER_ANSWERS)["pid"] for number in range(3)]
    running.process.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids))


def test_ends_with_its_parent_even_if_that_is_killed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zygote.sock"
        script = (
            "import os, subprocess, sys\n"
            f"env = {{**os.environ, {PARENT_PID_ENV!r}: str(os.getpid()),"
            f" {SOCKET_ENV!r}: {str(path)!r}}}\n"
            f"zygote = subprocess.Popen([sys.executable, {STAND_IN!r}],"
            " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)\n"
            "zygote.wait()\n"
        )
        with subprocess.Popen([sys.executable, "-c", script]) as parent:
            eventually(path.exists)
            client = ZygoteClient(path)
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
        assert real.terminate() == 0
        assert not is_running(sandbox["pid"])
