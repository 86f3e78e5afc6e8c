"""The zygote as a real process, mostly with fake sandboxes (fake_zygote.py)."""

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

FAKE_ZYGOTE = str(Path(__file__).with_name("fake_zygote.py"))
ENDS_AT_ONCE, NEVER_ANSWERS = 99, 98


@pytest.fixture
def zygote() -> Iterator[ZygoteProcess]:
    with running_zygote(FAKE_ZYGOTE) as zygote:
        yield zygote


@pytest.fixture
def client(zygote: ZygoteProcess) -> Iterator[ZygoteClient]:
    with zygote.client() as client:
        yield client


def test_forks_sandboxes_that_serve_at_the_reported_address(client: ZygoteClient) -> None:
    first, second = client.spawn("s1", threads=1), client.spawn("s2", threads=1)
    assert first["pid"] != second["pid"]
    assert is_ready(first["address"])
    assert is_ready(second["address"])


def test_reports_exit_statuses(client: ZygoteClient) -> None:
    killed = client.spawn("killed")
    os.kill(killed["pid"], signal.SIGKILL)
    expected = {"event": "exited", "id": "killed", "pid": killed["pid"], "status": -9}
    assert client.read_event() == expected
    failed = client.spawn("failed", threads=ENDS_AT_ONCE)
    assert client.read_event() == {**expected, "id": "failed", "pid": failed["pid"], "status": 3}


def test_terminates_a_sandbox(client: ZygoteClient) -> None:
    sandbox = client.spawn("s1")
    assert is_ready(sandbox["address"])
    client.send(verb="kill", id="s1", grace_s=DEADLINE_S)
    assert client.read_event()["status"] == 0


def test_kills_a_sandbox_after_the_grace_period(client: ZygoteClient) -> None:
    client.spawn("s1", threads=NEVER_ANSWERS)
    client.send(verb="kill", id="s1", grace_s=0.2)
    assert client.read_event()["status"] in (-signal.SIGKILL, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "unknown verb"),
        ('{"verb": "dance"}', "unknown verb"),
        ('{"verb": "spawn", "id": "s1"}', "unknown verb or fields"),
        ('{"verb": "kill", "id": "s9"}', "id: got 's9', expected a running sandbox"),
        ('{"verb": "kill", "id": "s0", "grace_s": "long"}', "could not convert"),
        ('{"verb": "spawn", "id": "s0", "config": {}}', "id: 's0' is already running"),
    ],
)
def test_rejects_invalid_commands_and_keeps_running(
    client: ZygoteClient, line: str, message: str
) -> None:
    sandbox = client.spawn("s0")
    client.send_line(line)
    event = client.read_event()
    assert event["event"] == "refused"
    assert message in event["message"]
    assert is_ready(sandbox["address"])


def test_outlives_its_clients_and_lists_sandboxes_to_the_next(zygote: ZygoteProcess) -> None:
    with zygote.client() as first:
        spawned = first.spawn("s1", capacity=3, threads=1)
    with zygote.client() as second:
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


def test_new_client_replaces_the_previous_one(zygote: ZygoteProcess) -> None:
    with zygote.client() as first:
        first.spawn("s1")
        with zygote.client() as second:
            assert first.is_closed()
            assert [s["id"] for s in second.sandboxes()] == ["s1"]


def test_disconnects_a_client_that_sends_an_endless_line(zygote: ZygoteProcess) -> None:
    with zygote.client() as flooding_client:
        sandbox = flooding_client.spawn("s1")
        flooding_client.socket.sendall(b"x" * (MAX_LINE_BYTES + 1))
        assert flooding_client.is_closed()
    assert is_ready(sandbox["address"])
    with zygote.client() as next_client:
        assert [s["id"] for s in next_client.sandboxes()] == ["s1"]


def test_socket_is_accessible_to_its_own_user_only(
    zygote: ZygoteProcess, client: ZygoteClient
) -> None:
    assert zygote.path.stat().st_mode & 0o777 == 0o600


def test_requires_a_socket_path() -> None:
    environment = {k: v for k, v in os.environ.items() if k != SOCKET_ENV}
    result = subprocess.run(
        [sys.executable, FAKE_ZYGOTE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == f"{SOCKET_ENV}: not set, expected the path of a socket\n"


def test_sandboxes_exit_when_the_zygote_is_terminated(
    zygote: ZygoteProcess, client: ZygoteClient
) -> None:
    pids = [client.spawn(f"s{number}")["pid"] for number in range(3)]
    assert zygote.terminate() == 0
    assert not any(is_running(pid) for pid in pids)


def test_sandboxes_die_when_the_zygote_is_killed(
    zygote: ZygoteProcess, client: ZygoteClient
) -> None:
    pids = [client.spawn(f"s{number}", threads=NEVER_ANSWERS)["pid"] for number in range(3)]
    zygote.process.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids))


def test_dies_with_its_parent() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "zygote.sock"
        script = (
            "import os, subprocess, sys\n"
            f"env = {{**os.environ, {PARENT_PID_ENV!r}: str(os.getpid()),"
            f" {SOCKET_ENV!r}: {str(path)!r}}}\n"
            f"zygote = subprocess.Popen([sys.executable, {FAKE_ZYGOTE!r}],"
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


def test_real_zygote_is_single_threaded_and_forks_working_sandboxes() -> None:
    with (
        running_zygote("-m", "faasmoe_expert.zygote") as real_zygote,
        real_zygote.client() as client,
    ):
        # A parallel region would leave threads behind, and children would hang.
        assert len(list(Path(f"/proc/{real_zygote.process.pid}/task").iterdir())) == 1
        sandbox = client.spawn("s1", device="cpu")
        assert is_ready(sandbox["address"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{sandbox['address']}/v1/functions", timeout=DEADLINE_S)
        assert real_zygote.terminate() == 0
        assert not is_running(sandbox["pid"])
