"""Real zygote processes for tests, and a client for their sockets."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_expert.zygote import SOCKET_ENV

DEADLINE_S = 120.0


class ZygoteClient:
    """A connection to a zygote."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("r")
        self.greeting = self.read_event()

    def send(self, **command: Any) -> None:
        self.send_line(json.dumps(command))

    def send_line(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def read_event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.lines.readline())
        return event

    def spawn(self, name: str, **config: Any) -> dict[str, Any]:
        self.send(verb="spawn", id=name, config=config)
        event = self.read_event()
        assert (event["event"], event["id"]) == ("spawned", name)
        return event

    def sandboxes(self) -> list[dict[str, Any]]:
        self.send(verb="list")
        event = self.read_event()
        assert event["event"] == "sandboxes"
        sandboxes: list[dict[str, Any]] = event["sandboxes"]
        return sandboxes

    def is_closed(self) -> bool:
        return self.lines.readline() == ""

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


class ZygoteProcess:
    """A zygote process and the path of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.path = path

    @contextmanager
    def client(self) -> Iterator[ZygoteClient]:
        eventually(self.path.exists)
        client = ZygoteClient(self.path)
        try:
            assert client.greeting == {"event": "ready", "pid": self.process.pid}
            yield client
        finally:
            client.close()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


@contextmanager
def running_zygote(
    *arguments: str, output: Path = Path(os.devnull), **variables: str
) -> Iterator[ZygoteProcess]:
    """Run a zygote for the lifetime of the context; its sandboxes exit with it.

    Args:
        arguments: command-line arguments of Python.
        output: file for its output.
        variables: additional environment variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zygote.sock"
        environment = {
            **os.environ,
            "FAASMOE_TOKEN": "secret",
            SOCKET_ENV: str(path),
            "OMP_NUM_THREADS": "1",  # set by the platform too; otherwise OpenBLAS starts threads
            PARENT_PID_ENV: str(os.getpid()),
            **variables,
        }
        with output.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdout=log, stderr=log, env=environment
            )
        with process:
            try:
                yield ZygoteProcess(process, path)
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
        assert time.monotonic() < deadline_s, "timed out waiting for the condition"
        os.sched_yield()


def is_ready(address: str) -> bool:
    with urllib.request.urlopen(f"http://{address}/readyz", timeout=DEADLINE_S) as response:
        return bool(response.status == 200)
