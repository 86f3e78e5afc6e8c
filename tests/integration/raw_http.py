"""Request frames and raw HTTP over sockets, for tests of the sandbox server."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from sandbox_processes import SandboxProcess

from faasmoe_contracts.wire import Dtype, OutputMode, encode_request

DEADLINE_S = 120.0
TOKEN = "a-token"
TIMEOUT_S = 0.5  # FAASMOE_REQUEST_TIMEOUT_S of the sandbox
HIDDEN = 32


def request_frame(*, n_rows: int = 2, layer: int = 0, expert: int = 1, **changes: Any) -> bytes:
    """Return a request frame with rows of ones for one expert."""
    fields: dict[str, Any] = {
        "dtype": Dtype.FLOAT32,
        "mode": OutputMode.REDUCED,
        "layer": layer,
        "hidden_size": HIDDEN,
        "n_rows": n_rows,
        "pair_row": np.arange(n_rows, dtype=np.int32),
        "pair_expert": np.full(n_rows, expert, dtype=np.int32),
        "pair_weight": np.ones(n_rows, dtype=np.float32),
        **changes,
    }
    rows = np.ones((n_rows, HIDDEN), dtype=np.float32).tobytes()
    return b"".join(encode_request(rows, **fields))


def post_request(function_id: str, body: bytes, *, headers: str = "") -> bytes:
    """Return a complete HTTP request to a function."""
    head = (
        f"POST /v1/functions/{function_id} HTTP/1.1\r\nhost: test\r\n{headers}"
        f"authorization: Bearer {TOKEN}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read status, headers and body of the next response."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _receive_part(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += _receive_part(connection)
    assert len(body) == int(headers["content-length"]), "excess bytes after the response"
    return int(status_line.split()[1]), headers, body


def read_all(connection: socket.socket) -> bytes:
    """Read until the sandbox closes the connection."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def _receive_part(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 16)
    assert part, "connection closed before the end of the response"
    return part


def wait_until(condition: Callable[[], bool], *, deadline_s: float = DEADLINE_S) -> None:
    """Wait until a condition holds; fail after deadline_s seconds."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "timed out waiting for the condition"
        time.sleep(0.01)


@contextmanager
def stopped(sandbox: SandboxProcess) -> Iterator[None]:
    """Stop a sandbox for the lifetime of the context.

    Waits for all of its threads: each stops when it is next scheduled, and may answer until then.
    """
    threads = Path(f"/proc/{sandbox.process.pid}/task")
    os.kill(sandbox.process.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: all(_state(thread) == "T" for thread in threads.iterdir()))
        yield
    finally:
        os.kill(sandbox.process.pid, signal.SIGCONT)


def _state(thread: Path) -> str:
    """Return the state of a thread of /proc, such as R (running) or T (stopped)."""
    return (thread / "stat").read_text().rpartition(") ")[2][0]


def n_connections(sandbox: SandboxProcess) -> int:
    """Return the number of the sandbox's TCP connections, without its listener."""
    connections = psutil.Process(sandbox.process.pid).net_connections("tcp")
    return sum(c.status != psutil.CONN_LISTEN for c in connections)
