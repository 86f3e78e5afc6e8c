"""How a sandbox ends: it says so for a while, answers what is in hand, and begins no work."""

import signal
import socket
import time
from collections.abc import Iterator

import pytest
from rawhttp import DEADLINE_S, TOKEN, frame, post, read_all, read_answer, until
from sandboxes import OpenSandbox, SandboxProcess

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec

READY = b"GET /readyz HTTP/1.1\r\nhost: test\r\n\r\n"
DRAIN_S = 60.0  # longer than any test: ends when the last client leaves


@pytest.fixture
def ending(sandbox: OpenSandbox, store: Store, spec: FunctionSpec) -> Iterator[SandboxProcess]:
    """A sandbox with one function, to be told to end."""
    with sandbox(token=TOKEN, drain_s=DRAIN_S) as box:
        box.attach(store, spec)
        yield box
        assert box.process.poll() == 0, "it did not end by itself"
        assert "Traceback" not in box.log.read_text()


def connect(box: SandboxProcess) -> socket.socket:
    host, port = box.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def ask(client: socket.socket, request: bytes) -> tuple[int, str | None, bytes]:
    """Status, connection header and body."""
    client.sendall(request)
    status, headers, body = read_answer(client)
    return status, headers.get("connection"), body


def tell_to_end(box: SandboxProcess) -> None:
    box.process.send_signal(signal.SIGTERM)
    until(lambda: "drains" in box.log.read_text())


def test_a_sandbox_that_ends_says_so_and_takes_no_more_work(
    ending: SandboxProcess, spec: FunctionSpec
) -> None:
    ending.http.close()
    with connect(ending) as probe, connect(ending) as worker, connect(ending) as control:
        assert ask(probe, READY)[0] == 200
        tell_to_end(ending)
        assert ask(probe, READY) == (503, None, b'{"status": "draining"}')
        assert ask(probe, READY.replace(b"readyz", b"healthz"))[0] == 200
        status, connection, body = ask(worker, post(spec.id, frame()))
        assert (status, connection) == (503, "close")
        assert b'"code": "draining"' in body
        assert read_all(worker) == b""
        status, connection, _ = ask(control, post(spec.id, b"{}").replace(b"POST", b"PUT", 1))
        assert (status, connection) == (503, "close")
        with connect(ending) as late:  # the listener stays, so that nobody is left without a word
            assert ask(late, READY)[0] == 503
    assert ending.process.wait(DEADLINE_S) == 0


def test_a_request_that_was_begun_is_answered_before_its_connection_ends(
    ending: SandboxProcess, spec: FunctionSpec
) -> None:
    ending.http.close()
    whole = post(spec.id, frame())
    with connect(ending) as probe, connect(ending) as worker:
        worker.sendall(whole[:100])
        assert ask(probe, READY)[0] == 200  # by now the part before it was read
        tell_to_end(ending)
        assert ask(worker, whole[100:])[:2] == (200, "close")
        assert read_all(worker) == b""
    assert ending.process.wait(DEADLINE_S) == 0


def test_without_clients_it_ends_at_once(ending: SandboxProcess) -> None:
    ending.http.close()
    begun_s = time.monotonic()
    ending.process.send_signal(signal.SIGTERM)
    assert ending.process.wait(DEADLINE_S) == 0
    assert time.monotonic() - begun_s < DRAIN_S / 2


@pytest.mark.parametrize("settings", [{}, {"drain_s": 0}])
def test_clients_that_stay_do_not_hold_up_the_end(
    sandbox: OpenSandbox, settings: dict[str, float]
) -> None:
    """By default it ends within the 5 s that a zygote gives it."""
    with sandbox(**settings) as box, connect(box) as idle:
        box.process.send_signal(signal.SIGTERM)
        assert box.process.wait(5.0) == 0
        assert idle.recv(1) == b""
