"""How a sandbox ends: it says so for a while, answers what is in hand, and begins no work."""

import signal
import socket
import time
from collections.abc import Iterator

import pytest
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

READY = b"GET /readyz HTTP/1.1\r\nhost: test\r\n\r\n"
DRAIN_S = 60.0  # longer than any test: ends when the last client leaves


@pytest.fixture
def draining_sandbox(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> Iterator[SandboxProcess]:
    """A sandbox with one function, to be told to end."""
    with sandbox(token=TOKEN, drain_s=DRAIN_S) as sandbox_server:
        sandbox_server.attach(store, spec)
        yield sandbox_server
        assert sandbox_server.process.poll() == 0, "it did not end by itself"
        assert "Traceback" not in sandbox_server.log.read_text()


def connect(sandbox_server: SandboxProcess) -> socket.socket:
    host, port = sandbox_server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def send_request(client: socket.socket, request: bytes) -> tuple[int, str | None, bytes]:
    """Status, connection header and body."""
    client.sendall(request)
    status, headers, body = read_response(client)
    return status, headers.get("connection"), body


def send_sigterm(sandbox_server: SandboxProcess) -> None:
    sandbox_server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "drains" in sandbox_server.log.read_text())


def test_a_sandbox_that_ends_says_so_and_takes_no_more_work(
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
        ) as late:  # the listener stays, so that nobody is left without a word
            assert send_request(late, READY)[0] == 503
    assert draining_sandbox.process.wait(DEADLINE_S) == 0


def test_a_request_that_was_begun_is_answered_before_its_connection_ends(
    draining_sandbox: SandboxProcess, spec: FunctionSpec
) -> None:
    draining_sandbox.http.close()
    whole = post_request(spec.id, request_frame())
    with connect(draining_sandbox) as probe, connect(draining_sandbox) as worker:
        worker.sendall(whole[:100])
        assert send_request(probe, READY)[0] == 200  # by now the part before it was read
        send_sigterm(draining_sandbox)
        assert send_request(worker, whole[100:])[:2] == (200, "close")
        assert read_all(worker) == b""
    assert draining_sandbox.process.wait(DEADLINE_S) == 0


def test_without_clients_it_ends_at_once(draining_sandbox: SandboxProcess) -> None:
    draining_sandbox.http.close()
    begun_s = time.monotonic()
    draining_sandbox.process.send_signal(signal.SIGTERM)
    assert draining_sandbox.process.wait(DEADLINE_S) == 0
    assert time.monotonic() - begun_s < DRAIN_S / 2


@pytest.mark.parametrize("settings", [{}, {"drain_s": 0}])
def test_clients_that_stay_do_not_hold_up_the_end(
    sandbox: StartSandbox, settings: dict[str, float]
) -> None:
    """By default it ends within the 5 s that a zygote gives it."""
    with sandbox(**settings) as sandbox_server, connect(sandbox_server) as idle:
        sandbox_server.process.send_signal(signal.SIGTERM)
        assert sandbox_server.process.wait(5.0) == 0
        assert idle.recv(1) == b""
