"""Fan-outs to misbehaving servers: errors by position, other calls succeed, nothing hangs."""

import contextlib
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import pytest
from core_waits import Stopwatch
from faasmoe_up import free_port

from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_router.dispatch.fanout import DispatchTimeouts, Fanout
from faasmoe_router.dispatch.transport import (
    MAX_IDLE_PER_ADDRESS,
    Call,
    CallError,
    ConnectError,
    StatusError,
)

PATIENT = DispatchTimeouts(120.0, 120.0, 120.0)  # for a busy machine
SHORT = DispatchTimeouts(connect_timeout_s=4.0, call_timeout_s=4.0)  # for calls that time out
GRACE_S = 5.0  # beyond the deadline, for a busy machine
N_HUNG = 60


class Server(Protocol):
    """The server that `serve` starts."""

    address: str
    n_connections: int


Serve = Callable[..., Server]
Behaviour = Callable[[socket.socket], None]


def receive_request(connection: socket.socket) -> bytes | None:
    """Return the body of the next request, None at the end of the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(1 << 16)
        if not part:
            return None
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    while len(body) < int(found[1]):
        body += connection.recv(1 << 20)
    return body


def http(body: bytes, *, status: str = "200 OK", length: str = "", headers: str = "") -> bytes:
    size = length or str(len(body))
    return f"HTTP/1.1 {status}\r\ncontent-length: {size}\r\n{headers}\r\n".encode() + body


def echo(connection: socket.socket) -> None:
    while (body := receive_request(connection)) is not None:
        connection.sendall(http(body))


def echo_once(connection: socket.socket) -> None:
    body = receive_request(connection)
    assert body is not None
    connection.sendall(http(body))


def responds(response: bytes) -> Behaviour:
    """Responds to each request with these bytes, and keeps the connection open."""

    def behave(connection: socket.socket) -> None:
        while receive_request(connection) is not None:
            connection.sendall(response)

    return behave


def responds_and_closes(response: bytes) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        receive_request(connection)
        connection.sendall(response)

    return behave


def resets(connection: socket.socket) -> None:
    receive_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def never_reads(connection: socket.socket) -> None:
    connection.recv(1 << 30, socket.MSG_PEEK)
    wait_for_hangup(connection)


def wait_for_hangup(connection: socket.socket) -> None:
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    poller.poll(120_000)


def drips(connection: socket.socket) -> None:
    """Sends a large response byte by byte, so there is always something to read."""
    receive_request(connection)
    connection.sendall(http(b"", length="60000000"))
    while True:
        connection.sendall(b"x")
        time.sleep(0.0001)  # leaves the interpreter to the others of this process


def floods_a_head(connection: socket.socket) -> None:
    receive_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"name: value\r\n" * 100)


def n_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def open_fanout() -> Iterator[Callable[[DispatchTimeouts], Fanout]]:
    with contextlib.ExitStack() as stack:

        def make(timeouts: DispatchTimeouts) -> Fanout:
            fanout = Fanout(token="secret", timeouts=timeouts)
            stack.callback(fanout.close)
            return fanout

        yield make


@pytest.fixture
def fanout(open_fanout: Callable[[DispatchTimeouts], Fanout]) -> Fanout:
    return open_fanout(PATIENT)


def run(
    fanout: Fanout, *calls: Call, timeouts: DispatchTimeouts = PATIENT
) -> tuple[dict[int, bytes], dict[int, CallError]]:
    """Return responses and errors by position; fails if the deadline is exceeded."""
    responses: dict[int, bytes] = {}

    def handle_response(position: int, body: memoryview) -> None:
        assert position not in responses
        responses[position] = bytes(body)

    stopwatch = Stopwatch()
    errors = fanout.run(calls, handle_response)
    assert stopwatch.elapsed_s() < timeouts.call_timeout_s + GRACE_S
    assert sorted([*responses, *errors]) == list(range(len(calls)))
    return responses, errors


def call(server: Server, body: bytes = b"frame") -> Call:
    return Call(server.address, "f1", [body[:2], body[2:]])


def test_all_calls_succeed_and_connections_are_reused(fanout: Fanout, serve: Serve) -> None:
    servers = [serve(echo) for _ in range(3)]
    for i in range(4):
        bodies = [f"{i} {n}".encode() * 1000 for n in range(6)]
        calls = [call(servers[n % 3], body) for n, body in enumerate(bodies)]
        responses, errors = run(fanout, *calls)
        assert responses == dict(enumerate(bodies))
        assert not errors
    assert [server.n_connections for server in servers] == [2, 2, 2]


def test_call_is_one_http_request_with_the_token(fanout: Fanout, serve: Serve) -> None:
    heads: list[bytes] = []

    def record_head(connection: socket.socket) -> None:
        heads.append(connection.recv(1 << 16))
        connection.sendall(http(b""))

    server = serve(record_head)
    run(fanout, call(server))
    assert heads == [
        b"POST /v1/functions/f1 HTTP/1.1\r\nhost: " + server.address.encode()
        + b"\r\nauthorization: Bearer secret\r\ncontent-length: 5\r\n\r\nframe"
    ]  # fmt: skip


@pytest.mark.parametrize("size_bytes", [0, 1, 128 << 10, (128 << 10) + 1, 8 << 20])
def test_bodies_of_every_size_are_transferred(
    fanout: Fanout, serve: Serve, size_bytes: int
) -> None:
    body = os.urandom(size_bytes)
    server = serve(echo)
    for _ in range(2):
        responses, errors = run(fanout, call(server, body), call(server, b"small"))
        assert not errors
        assert responses[0] == body
        assert responses[1] == b"small"


def test_frame_of_many_buffers_is_sent_completely(fanout: Fanout, serve: Serve) -> None:
    parts = [os.urandom(1000) for _ in range(200)]
    responses, _ = run(fanout, Call(serve(echo).address, "f1", parts))
    assert responses == {0: b"".join(parts)}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        pytest.param(resets, "cannot receive", id="resets"),
        pytest.param(
            responds_and_closes(b""), "closed after 0 bytes", id="closes without a response"
        ),
        pytest.param(
            responds_and_closes(b"HTTP/1.1 200 OK\r\ncont"),
            "closed after 21 bytes",
            id="in the head",
        ),
        pytest.param(
            responds_and_closes(http(b"abc", length="4")), "closed after", id="in the body"
        ),
        pytest.param(responds(b""), "no response in time", id="never responds"),
        pytest.param(never_reads, "no response in time", id="never reads"),
        pytest.param(drips, "no response in time", id="drips"),
        pytest.param(
            responds(http(b"abc", length="4")), "no response in time", id="length too large"
        ),
        pytest.param(
            responds(http(b"abc", length="2")), "bytes after the end", id="length too small"
        ),
        pytest.param(responds(b"\0" * 100_000), "head exceeds", id="garbage"),
        pytest.param(
            responds(b"garbage\r\n\r\n"), "not an HTTP/1.1 response", id="garbage with an end"
        ),
        pytest.param(responds(http(b"").replace(b"1.1", b"1.0")), "not an HTTP/1.1", id="HTTP/1.0"),
        pytest.param(responds(http(b"", length="-1")), "not an HTTP/1.1", id="length negative"),
        pytest.param(
            responds(http(b"", length="9" * 5000)), "not an HTTP/1.1", id="length of 5000"
        ),
        pytest.param(
            responds(http(b"", length="99999999999")), "is too large", id="length of 100 GB"
        ),
        pytest.param(responds(b"HTTP/1.1 200 OK\r\n\r\n"), "not an HTTP/1.1", id="no length"),
        pytest.param(
            responds(b"HTTP/1.1 OK\r\ncontent-length: 0\r\n\r\n"), "not an", id="no status"
        ),
        pytest.param(floods_a_head, "head exceeds", id="huge head"),
    ],
)
def test_misbehaving_server_fails_only_its_own_calls(
    open_fanout: Callable[[DispatchTimeouts], Fanout],
    serve: Serve,
    behaviour: Behaviour,
    message: str,
) -> None:
    timeouts = SHORT if message == "no response in time" else PATIENT
    fanout = open_fanout(timeouts)
    good, bad = serve(echo), serve(behaviour)
    frame = bytes(8 << 20) if behaviour is never_reads else b"frame"
    for _ in range(2):
        calls = [call(bad, frame), call(good), call(bad, frame), call(good)]
        responses, errors = run(fanout, *calls, timeouts=timeouts)
        assert responses == {1: b"frame", 3: b"frame"}
        for position in (0, 2):
            assert message in str(errors[position])
            assert bad.address in str(errors[position])


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "500 Internal", "503 Busy"])
def test_error_status_is_reported_and_its_connection_is_reused(
    fanout: Fanout, serve: Serve, status: str
) -> None:
    server = serve(responds(http(b'{"error": 1}', status=status)))
    for _ in range(3):
        _, errors = run(fanout, call(server))
        error = errors[0]
        assert isinstance(error, StatusError)
        assert error.status == int(status[:3])
        assert str(error) == f'status {error.status}: {{"error": 1}}'
    assert server.n_connections == 1


def test_large_response_follows_an_error_status_on_the_same_connection(
    fanout: Fanout, serve: Serve
) -> None:
    """The error may still hold a view of the buffer, which then cannot be resized."""

    def behave(connection: socket.socket) -> None:
        receive_request(connection)
        connection.sendall(http(b"no", status="404 Not Found"))
        echo(connection)

    server, body = serve(behave), bytes(4 << 20)
    _, errors = run(fanout, call(server))
    responses, _ = run(fanout, call(server, body))
    assert isinstance(errors[0], StatusError)
    assert responses == {0: body}


def test_refused_connection_is_an_immediate_error(fanout: Fanout, serve: Serve) -> None:
    refusing = Call(f"127.0.0.1:{free_port()}", "f1", [b"x"])
    responses, errors = run(fanout, refusing, call(serve(echo)))
    assert "cannot connect" in str(errors[0])
    assert responses == {1: b"frame"}


@pytest.mark.parametrize("address", ["nowhere.invalid:80", "127.0.0.1:99999", "127.0.0.1", "x:y"])
def test_invalid_address_is_an_error(fanout: Fanout, address: str) -> None:
    _, errors = run(fanout, Call(address, "f1", [b"x"]))
    assert f"{address}: cannot connect" in str(errors[0])


def test_hanging_connections_share_one_connect_timeout(
    open_fanout: Callable[[DispatchTimeouts], Fanout], serve: Serve
) -> None:
    """A listener with a full backlog never accepts connections."""
    fanout = open_fanout(DispatchTimeouts(1.0, 120.0, 120.0))
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        host, port = full.getsockname()
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        hung = [Call(f"{host}:{port}", "f1", [b"x"])] * N_HUNG
        stopwatch, started_s = Stopwatch(), time.monotonic()
        responses, errors = run(fanout, *hung, call(serve(echo)))
        assert time.monotonic() - started_s >= 1.0
        assert stopwatch.elapsed_s() < 5 * 1.0  # if each waited separately: N_HUNG * 1.0
    assert set(errors) == set(range(N_HUNG))
    assert all("no connection in time" in str(error) for error in errors.values())
    assert responses == {N_HUNG: b"frame"}


def test_connections_closed_while_idle_are_replaced(fanout: Fanout, serve: Serve) -> None:
    server = serve(echo_once)
    for i in range(4):
        responses, errors = run(fanout, *[call(server, b"%d %d" % (i, n)) for n in range(3)])
        assert not errors
        assert responses == {n: b"%d %d" % (i, n) for n in range(3)}


def test_call_is_repeated_only_once_on_a_new_connection(fanout: Fanout, serve: Serve) -> None:
    server = serve(echo_once, resets)
    run(fanout, call(server))
    _, errors = run(fanout, call(server))
    assert set(errors) == {0}
    assert server.n_connections == 2


def test_call_with_a_partial_response_is_not_repeated(fanout: Fanout, serve: Serve) -> None:
    def behave(connection: socket.socket) -> None:
        echo_once(connection)
        responds_and_closes(b"HTTP/1.1 2")(connection)

    server = serve(behave, echo)
    run(fanout, call(server))
    _, errors = run(fanout, call(server))
    assert "closed after 10 bytes" in str(errors[0])
    assert server.n_connections == 1


def test_call_error_of_the_handler_fails_the_call_without_a_repeat(
    fanout: Fanout, serve: Serve
) -> None:
    server = serve(echo)
    run(fanout, call(server))

    def reject(position: int, body: memoryview) -> None:
        raise CallError("bad frame")

    errors = fanout.run([call(server)], reject)
    assert str(errors[0]) == "bad frame"
    assert server.n_connections == 1


def test_exception_of_the_handler_leaves_no_connection_open(fanout: Fanout, serve: Serve) -> None:
    servers = [serve(echo), serve(responds(b""))]
    before = n_fds()

    def fail(position: int, body: memoryview) -> None:
        raise KeyError(position)

    with pytest.raises(KeyError):
        fanout.run([call(server) for server in servers], fail)
    assert count_sockets_to(servers) == 0
    assert n_fds() >= before


def count_sockets_to(servers: list[Server]) -> int:
    """Count this process's connections to these servers."""
    import psutil

    ports = {int(server.address.rpartition(":")[2]) for server in servers}
    found = psutil.Process().net_connections("tcp4")
    return sum(1 for c in found if c.raddr and c.raddr.port in ports and c.fd >= 0)


def test_response_before_the_end_of_the_request_closes_the_connection(
    fanout: Fanout, serve: Serve
) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(http(b"too large", status="413 Too Large"))
        wait_for_hangup(connection)

    server = serve(behave, echo)
    _, errors = run(fanout, call(server, bytes(32 << 20)))
    assert isinstance(errors[0], StatusError)
    assert run(fanout, call(server))[0] == {0: b"frame"}
    assert server.n_connections == 2


def test_connection_close_header_is_honoured(fanout: Fanout, serve: Serve) -> None:
    def behave(connection: socket.socket) -> None:
        body = receive_request(connection)
        connection.sendall(http(body or b"", headers="Connection: close\r\n"))
        wait_for_hangup(connection)

    server = serve(behave)
    for _ in range(3):
        assert run(fanout, call(server))[0] == {0: b"frame"}
    assert server.n_connections == 3


def test_stray_bytes_are_never_taken_for_the_next_response(fanout: Fanout, serve: Serve) -> None:
    def behave(connection: socket.socket) -> None:
        echo_once(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong extra")
        wait_for_hangup(connection)

    server = serve(behave, echo)
    run(fanout, call(server))
    responses, errors = run(fanout, call(server))
    assert responses.get(0, b"frame") == b"frame"
    assert len(responses) + len(errors) == 1


def test_idle_connections_are_bounded_and_closed_on_retain(fanout: Fanout, serve: Serve) -> None:
    server, other = serve(echo), serve(echo)
    run(fanout, *[call(server)] * (MAX_IDLE_PER_ADDRESS + 5), call(other))
    assert count_sockets_to([server]) == MAX_IDLE_PER_ADDRESS
    fanout.retain({other.address})
    assert count_sockets_to([server]) == 0
    assert count_sockets_to([other]) == 1
    fanout.close()
    assert count_sockets_to([other]) == 0


def test_many_failures_leave_no_descriptor_open(fanout: Fanout, serve: Serve) -> None:
    servers = [serve(echo_once), serve(resets), serve(responds(b"garbage\r\n\r\n"))]
    refusing = Call(f"127.0.0.1:{free_port()}", "f1", [b"x"])
    for _ in range(50):
        run(fanout, refusing, *[call(server) for server in servers])
    assert count_sockets_to(servers) <= 1


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A short path, as a Unix socket's is limited to 107 bytes."""
    with TemporaryDirectory(prefix="faasmoe-") as folder:
        yield Path(folder)


def test_servers_of_this_machine_are_called_over_unix_sockets(
    serve: Serve, socket_dir: Path
) -> None:
    servers = [serve(echo, socket_dir=socket_dir) for _ in range(3)]
    bodies = [bytes([number]) * (5 << number * 10) for number in range(3)]  # up to 5 MiB
    with contextlib.closing(Fanout(timeouts=PATIENT, socket_dir=socket_dir)) as fanout:
        for _ in range(2):
            calls = [call(server, body) for server, body in zip(servers, bodies, strict=True)]
            assert run(fanout, *calls) == (dict(enumerate(bodies)), {})
    assert [server.n_connections for server in servers] == [1, 1, 1]


def test_server_without_a_unix_socket_is_called_over_tcp(serve: Serve, socket_dir: Path) -> None:
    with contextlib.closing(Fanout(timeouts=PATIENT, socket_dir=socket_dir)) as fanout:
        assert run(fanout, call(serve(echo)))[0] == {0: b"frame"}


def test_server_with_a_removed_unix_socket_is_unreachable(serve: Serve, socket_dir: Path) -> None:
    server = serve(echo, socket_dir=socket_dir)
    unix_socket_path(socket_dir, int(server.address.rpartition(":")[2])).unlink()
    with contextlib.closing(Fanout(timeouts=PATIENT, socket_dir=socket_dir)) as fanout:
        assert isinstance(run(fanout, call(server))[1][0], ConnectError)
