"""Calls of functions over TLS: the same answers, clear errors, and no call lost by a rotation."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from raw_http import TOKEN, request_frame
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, make_function_spec
from tls_folders import MODELS, OTHER_ROOT_KEY, tls_peer, write_tls_folder

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.tls import OPERATOR_NAME, TlsFolder, TlsPeer, models_name, peer_names
from faasmoe_router.dispatch.endpoint_health import is_ready
from faasmoe_router.dispatch.fanout import DispatchTimeouts, Fanout
from faasmoe_router.dispatch.transport import Call, CallError, ConnectError

PATIENT = DispatchTimeouts(120, 120, 120)
Serve = Callable[[ssl.SSLSocket], None]


class TlsServer:
    """Accepts connections, and serves each in a thread of its own.

    Attributes:
        address: host:port.
        seen: names of the clients' certificates, by connection.
    """

    def __init__(self, tls: TlsFolder, serve: Serve) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen: list[frozenset[str]] = []
        self._tls = tls
        self._serve = serve
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._run, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _run(self, plain: socket.socket) -> None:
        context = self._tls.server_context()
        with (
            suppress(OSError),
            closing(plain),
            context.wrap_socket(plain, server_side=True) as connection,
        ):
            self.seen.append(peer_names(connection))
            self._serve(connection)


def echo(connection: ssl.SSLSocket) -> None:
    """Answer each request with its body."""
    with connection.makefile("rb") as reader:
        while reader.readline():
            length = 0
            while (line := reader.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                if name == b"content-length":
                    length = int(value)
            body = reader.read(length)
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length
            connection.sendall(head + body)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., TlsServer]]:
    """Start a server with a certificate of models, or another one."""
    with ExitStack() as stack:

        def start(tls: TlsFolder | None = None, serve: Serve = echo) -> TlsServer:
            tls = tls or TlsFolder(write_tls_folder(tmp_path / "server", MODELS))
            return stack.enter_context(closing(TlsServer(tls, serve)))

        yield start


@pytest.fixture
def router(tmp_path: Path) -> TlsPeer:
    return tls_peer(tmp_path / "router", MODELS)


def run(
    router: TlsPeer | None, *calls: Call, fanout: Fanout | None = None
) -> tuple[dict[int, bytes], dict[int, CallError]]:
    responses: dict[int, bytes] = {}

    def take(position: int, body: memoryview) -> None:
        responses[position] = bytes(body)

    with ExitStack() as stack:
        if fanout is None:
            fanout = stack.enter_context(closing(Fanout(token=TOKEN, timeouts=PATIENT, tls=router)))
        errors = fanout.run(calls, take)
    assert sorted([*responses, *errors]) == list(range(len(calls)))
    return responses, errors


@pytest.mark.parametrize("size_bytes", [0, 1, 16 << 10, (256 << 10) + 1, 8 << 20])
def test_bodies_of_every_size_are_transferred(
    start: Callable[..., TlsServer], router: TlsPeer, size_bytes: int
) -> None:
    body, server = os.urandom(size_bytes), start()
    frame = [body[:1000], body[1000:], b""]
    responses, errors = run(router, *(Call(server.address, "f", frame) for _ in range(3)))
    assert not errors
    assert responses == {0: body, 1: body, 2: body}
    assert server.seen == [{MODELS}] * 3


def test_connections_are_reused(start: Callable[..., TlsServer], router: TlsPeer) -> None:
    server = start()
    with closing(Fanout(timeouts=PATIENT, tls=router)) as fanout:
        for number in range(5):
            body = b"%d" % number
            assert run(router, Call(server.address, "f", [body]), fanout=fanout) == ({0: body}, {})
    assert len(server.seen) == 1


def test_a_request_waits_for_a_slow_handshake_without_spinning(
    start: Callable[..., TlsServer], router: TlsPeer, tmp_path: Path
) -> None:
    """While the server thinks, the fan-out does other work and then waits."""
    may_accept, worked = threading.Event(), []

    def work() -> None:
        worked.append(1)
        may_accept.set()

    class SlowFolder(TlsFolder):
        def server_context(self) -> ssl.SSLContext:
            may_accept.wait(120)
            return super().server_context()

    server = start(SlowFolder(tmp_path / "router"))
    with closing(Fanout(timeouts=PATIENT, tls=router)) as fanout:
        responses: dict[int, bytes] = {}
        errors = fanout.run(
            [Call(server.address, "f", [b"frame"])],
            lambda position, body: responses.update({position: bytes(body)}),
            while_waiting=work,
        )
    assert not errors
    assert responses == {0: b"frame"}
    assert worked == [1]


def other_authority(folder: Path) -> TlsFolder:
    return TlsFolder(write_tls_folder(folder, MODELS, root_key=OTHER_ROOT_KEY))


def other_name(folder: Path) -> TlsFolder:
    return TlsFolder(write_tls_folder(folder, models_name("other")))


def expired(folder: Path) -> TlsFolder:
    return TlsFolder(write_tls_folder(folder, MODELS, now_s=time.time() - 200 * 86400))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (other_authority, "self-signed certificate in certificate chain"),
        (other_name, "Hostname mismatch"),
        (expired, "certificate has expired"),
    ],
)
def test_a_server_that_is_another_gets_no_frame(
    start: Callable[..., TlsServer],
    router: TlsPeer,
    tmp_path: Path,
    make: Callable[[Path], TlsFolder],
    reason: str,
) -> None:
    read: list[bytes] = []
    server = start(make(tmp_path / "other"), lambda connection: read.append(connection.recv(1)))
    responses, errors = run(router, Call(server.address, "f", [b"secret"]))
    assert not responses
    assert isinstance(errors[0], ConnectError)
    assert reason in str(errors[0])
    assert not any(read)
    assert not is_ready(server.address, timeout_s=60, tls=router)


def test_a_server_without_tls_is_refused(router: TlsPeer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                received.append(connection.recv(1 << 16))
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

        received: list[bytes] = []
        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        _, errors = run(router, Call(address, "f", [b"secret"]))
        thread.join()
    assert isinstance(errors[0], ConnectError)
    assert b"secret" not in received[0]


@pytest.fixture(scope="module")
def sandbox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tls_folder(tmp_path_factory.mktemp("tls") / "sandbox", MODELS)


@pytest.fixture(scope="module")
def spec(prepared_store: PreparedStore) -> FunctionSpec:
    return make_function_spec(prepared_store("mixtral"), [0], [0, 1, 2])


@pytest.fixture
def secured(
    sandbox: StartSandbox,
    prepared_store: PreparedStore,
    spec: FunctionSpec,
    sandbox_folder: Path,
    tmp_path: Path,
) -> Iterator[SandboxProcess]:
    operator = tls_peer(tmp_path / "operator", OPERATOR_NAME)
    with sandbox(token=TOKEN, tls=operator, tls_folder=sandbox_folder) as running:
        running.attach(prepared_store("mixtral"), spec)
        yield running


def test_a_sandbox_computes_the_same_over_tls(
    secured: SandboxProcess, spec: FunctionSpec, router: TlsPeer
) -> None:
    frame = request_frame()
    expected = secured.http.post(f"/v1/functions/{spec.id}", content=frame).content
    responses, errors = run(router, *(Call(secured.address, spec.id, [frame]) for _ in range(4)))
    assert not errors
    assert set(responses.values()) == {expected}
    assert is_ready(secured.address, timeout_s=60, tls=router)


def test_a_router_of_another_namespace_is_told_why(
    secured: SandboxProcess, spec: FunctionSpec, tmp_path: Path
) -> None:
    other = tls_peer(tmp_path / "other", models_name("other"))
    _, errors = run(other, Call(secured.address, spec.id, [request_frame()]))
    assert "status 403" in str(errors[0])
    assert "certificate" in str(errors[0])


def test_a_router_of_another_authority_is_told_why(
    secured: SandboxProcess, spec: FunctionSpec, tmp_path: Path, sandbox_folder: Path
) -> None:
    files = write_tls_folder(tmp_path / "other", MODELS, root_key=OTHER_ROOT_KEY)
    (files / "ca.crt").write_bytes((sandbox_folder / "ca.crt").read_bytes())
    _, errors = run(
        TlsPeer(TlsFolder(files), MODELS), Call(secured.address, spec.id, [request_frame()])
    )
    assert "does not accept this router's certificate" in str(errors[0])


def test_a_rotation_of_all_certificates_loses_no_call(
    secured: SandboxProcess, spec: FunctionSpec, tmp_path: Path, sandbox_folder: Path
) -> None:
    """Old connections go on, new ones have the new certificate; there are some of both kinds."""
    router = tls_peer(tmp_path / "router", MODELS)
    frame = request_frame()
    calls = [Call(secured.address, spec.id, [frame]) for _ in range(2)]
    expected = secured.http.post(f"/v1/functions/{spec.id}", content=frame).content
    with closing(Fanout(token=TOKEN, timeouts=PATIENT, tls=router)) as fanout:
        for number in range(60):
            if number in (20, 40):
                # Each time another certificate of the same name: the second is of another owner.
                names = (MODELS, f"{number}.faasmoe.internal")
                write_tls_folder(tmp_path / "router", *names)
                write_tls_folder(sandbox_folder, *names)
            more = calls * (1 + number % 3)  # more at once than there were connections
            responses, errors = run(router, *more, fanout=fanout)
            assert not errors
            assert set(responses.values()) == {expected}
            if number % 10 == 9:
                fanout.retain(())  # the next ones need new connections
                fanout.retain([secured.address])
