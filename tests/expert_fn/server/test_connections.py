"""A sandbox bounds the connections that it holds, and does not hold idle ones for ever."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from rawhttp import DEADLINE_S, n_connections, read_all, read_answer, until
from sandboxes import OpenSandbox, SandboxProcess

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n"
MAX_CONNECTIONS = 4
IDLE_TIMEOUT_S = 1.0


def connect(box: SandboxProcess) -> socket.socket:
    host, port = box.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_connection_more_than_the_bound_is_told_and_closed(
    sandbox: OpenSandbox, stack: ExitStack
) -> None:
    box = stack.enter_context(sandbox(max_connections=MAX_CONNECTIONS))
    box.http.close()
    until(lambda: n_connections(box) == 0)
    held = [stack.enter_context(connect(box)) for _ in range(MAX_CONNECTIONS)]
    for client in held:
        client.sendall(HEALTH)
        assert read_answer(client)[0] == 200
    for _ in range(3 * MAX_CONNECTIONS):
        with connect(box) as refused:
            status, headers, body = read_answer(refused)
            assert (status, headers["connection"]) == (503, "close")
            assert b'"code": "too_many_connections"' in body
            assert read_all(refused) == b""
    held[0].close()
    until(lambda: n_connections(box) == MAX_CONNECTIONS - 1)
    with connect(box) as client:
        client.sendall(HEALTH)
        assert read_answer(client)[0] == 200


def test_an_idle_connection_is_closed_in_time(sandbox: OpenSandbox, stack: ExitStack) -> None:
    box = stack.enter_context(sandbox(idle_timeout_s=IDLE_TIMEOUT_S))
    silent, used = (stack.enter_context(connect(box)) for _ in range(2))
    used.sendall(HEALTH)
    assert read_answer(used)[0] == 200
    assert read_all(silent) == b""
    assert read_all(used) == b""


def test_a_connection_in_use_is_not_idle(sandbox: OpenSandbox, stack: ExitStack) -> None:
    box = stack.enter_context(sandbox(idle_timeout_s=IDLE_TIMEOUT_S))
    used = stack.enter_context(connect(box))
    used.settimeout(IDLE_TIMEOUT_S / 4)
    n_answers = 0
    while n_answers < 8:  # for twice the time
        used.sendall(HEALTH)
        assert read_answer(used)[0] == 200
        n_answers += 1
        with pytest.raises(TimeoutError):  # nothing comes, also not the end
            used.recv(1)


def test_a_request_that_is_being_sent_is_not_idle(sandbox: OpenSandbox, stack: ExitStack) -> None:
    box = stack.enter_context(sandbox(idle_timeout_s=0.2, request_timeout_s=2.0))
    slow = stack.enter_context(connect(box))
    slow.sendall(HEALTH[:10])
    status, _, _ = read_answer(slow)
    assert status == 408
