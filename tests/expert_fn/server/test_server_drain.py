"""Graceful shutdown: a draining sandbox answers started requests and rejects new work."""

import signal
import socket
import time
from collections.abc import Iterator

import pytest
from core_waits import Stopwatch
from raw_http import (
    DEADLINE_S,
    TOKEN,
    post_request,
    read_all,
    read_response,
    request_frame,
    wait_until,
)
from sandbox_processes import SandboxProcess, StartSandbox

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.server.server import SHUTDOWN_TIMEOUT_S

READY = b"GET /readyz HTTP/1.1\r\nhost: test\r\n\r\n"
DRAIN_S = 600.0  # longer than any test: the drain ends when the last client disconnects


@pytest.fixture
def draining_sandbox(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> Iterator[SandboxProcess]:
    """A sandbox with one function that must exit cleanly after `send_sigterm`."""
    with sandbox(token=TOKEN, drain_s=DRAIN_S) as sandbox_server:
        sandbox_server.attach(store, spec)
        yield sandbox_server
        assert sandbox_server.process.poll() == 0, "did not exit on its own"
        assert "Traceback" not in sandbox_server.log.read_text()


def connect(sandbox_server: SandboxProcess) -> socket.socket:
    host, port = sandbox_server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def send_request(client: socket.socket, request: bytes) -> tuple[int, str | None, bytes]:
    """Send a request; return status, connection header and body."""
    client.sendall(request)
    status, headers, body = read_response(client)
    return status, headers.get("connection"), body


def send_sigterm(sandbox_server: SandboxProcess) -> None:
    sandbox_server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining for" in sandbox_server.log.read_text())


def test_draining_sandbox_is_not_ready_and_rejects_new_work(
    draining_sandbox: SandboxProcess, spec: FunctionSpec
) -> None:
    draining_sandbox.http.close()
    with (
        connect(draining_sandbox) as probe,
        connect(draining_sandbox) as worker,
        connect(draining_sandbox) as control,
    ):
        assert send_request(probe, READY)[0] == 200
        send_sigterm(draining_sandbox)
        assert send_request(probe, READY) == (503, None, b'{"status": "draining"}')
        assert send_request(probe, READY.replace(b"readyz", b"healthz"))[0] == 200
        status, connection, body = send_request(worker, post_request(spec.id, request_frame()))
        assert (status, connection) == (503, "close")
        assert b'"code": "draining"' in body
        assert read_all(worker) == b""
        status, connection, _ = send_request(
            control, post_request(spec.id, b"{}").replace(b"POST", b"PUT", 1)
        )
        assert (status, connection) == (503, "close")
        with connect(
            draining_sandbox
        ) as new_client:  # the listener stays, so that nobody is left without a word
            assert send_request(new_client, READY)[0] == 503
    assert draining_sandbox.process.wait(DEADLINE_S) == 0


def test_answers_a_started_request_before_closing_its_connection(
    draining_sandbox: SandboxProcess, spec: FunctionSpec
) -> None:
    draining_sandbox.http.close()
    request = post_request(spec.id, request_frame())
    with connect(draining_sandbox) as probe, connect(draining_sandbox) as worker:
        worker.sendall(request[:100])
        assert send_request(probe, READY)[0] == 200  # so the partial request was read, too
        send_sigterm(draining_sandbox)
        assert send_request(worker, request[100:])[:2] == (200, "close")
        assert read_all(worker) == b""
    assert draining_sandbox.process.wait(DEADLINE_S) == 0


def test_exits_immediately_without_clients(draining_sandbox: SandboxProcess) -> None:
    draining_sandbox.http.close()
    start_s = time.monotonic()
    draining_sandbox.process.send_signal(signal.SIGTERM)
    assert draining_sandbox.process.wait(DEADLINE_S) == 0
    assert time.monotonic() - start_s < DRAIN_S / 2


@pytest.mark.parametrize("drain_s", [SandboxConfig().drain_s, 0])
def test_connected_clients_do_not_delay_exit_beyond_the_drain(
    sandbox: StartSandbox, drain_s: float
) -> None:
    """By default the sandbox exits within the 5 s grace period of the zygote."""
    assert drain_s + SHUTDOWN_TIMEOUT_S < 5.0
    with sandbox(drain_s=drain_s) as sandbox_server, connect(sandbox_server) as idle:
        stopwatch = Stopwatch(sandbox_server.process.pid)
        sandbox_server.process.send_signal(signal.SIGTERM)
        while sandbox_server.process.poll() is None:
            assert stopwatch.elapsed_s() < 5.0
            time.sleep(0.01)
        assert sandbox_server.process.returncode == 0
        assert idle.recv(1) == b""
