"""Servers on loopback that behave as a test tells them, connection by connection."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_router.dispatch import Dispatcher

Behaviour = Callable[[socket.socket], None]
"""Gets each accepted connection; the connection is closed when it returns."""


class CountedWaits(threading.Event):
    """What calls are held by, and for how long they wished to be held, all together.

    A bound on that holds on a machine of any speed, other than one on the time that passed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, and note for how long at most."""
        self.requested_s += timeout or 0.0
        return super().wait(timeout)


def count_waits(dispatcher: Dispatcher) -> CountedWaits:
    """Count the waits of a dispatcher's held calls from now on."""
    waiter = dispatcher._executor._activation_waiter
    assert waiter is not None
    waiter.routing_changed = waits = CountedWaits()
    return waits


@pytest.fixture
def waits_of() -> Callable[[Dispatcher], CountedWaits]:
    """Counts waits: `waits = waits_of(dispatcher)`."""
    return count_waits


class ScriptedServer:
    """Gives the n-th connection to the n-th behaviour, later ones to the last."""

    def __init__(self, *behaviours: Behaviour, socket_dir: Path | None = None) -> None:
        """Listens on TCP, or with a folder `near` on a Unix socket alone."""
        self._behaviours = behaviours
        self._listener = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        if socket_dir is not None:
            self._listener.close()
            self._listener = _listen_unix(
                unix_socket_path(socket_dir, int(address.rpartition(":")[2]))
            )
        self.address = address
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.n_connections = 0
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed by `close`
                return
            behaviour = self._behaviours[min(self.n_connections, len(self._behaviours) - 1)]
            self.n_connections += 1
            self._open.append(connection)
            self._threads.append(threading.Thread(target=self._run, args=(behaviour, connection)))
            self._threads[-1].start()

    def _run(self, behaviour: Behaviour, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            behaviour(connection)

    def close(self) -> None:
        """Close everything, and wait until nothing runs."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    return listener


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts a server: `serve(behaviour, …, near=folder)`."""
    servers: list[ScriptedServer] = []

    def start(*behaviours: Behaviour, socket_dir: Path | None = None) -> ScriptedServer:
        servers.append(ScriptedServer(*behaviours, socket_dir=socket_dir))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
