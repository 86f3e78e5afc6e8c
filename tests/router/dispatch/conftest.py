"""Fixtures: scripted TCP servers on loopback, and a record of activation waits."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_router.dispatch.cold_start import ActivationWaiter

Behaviour = Callable[[socket.socket], None]
"""Handles one accepted connection, which is closed when it returns."""


class RecordedWaits(threading.Event):
    """An event that adds up the timeouts of its waits.

    Unlike elapsed time, the sum of the timeouts can be bounded on a machine of any speed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, and record the timeout."""
        self.requested_s += timeout or 0.0
        return super().wait(timeout)


@pytest.fixture
def activation_waits(monkeypatch: pytest.MonkeyPatch) -> RecordedWaits:
    """Records the waits of all calls that wait for an activation in this test."""
    waits = RecordedWaits()
    init = ActivationWaiter.__init__

    def init_recorded(waiter: ActivationWaiter, *args: Any, **kwargs: Any) -> None:
        init(waiter, *args, **kwargs)
        waiter.routing_changed = waits

    monkeypatch.setattr(ActivationWaiter, "__init__", init_recorded)
    return waits


class ScriptedServer:
    """Handles the n-th connection by the n-th behaviour, further ones by the last."""

    def __init__(self, *behaviours: Behaviour, socket_dir: Path | None = None) -> None:
        """Listen on TCP, or only on a Unix socket in `socket_dir`."""
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
        """Close all sockets and join all threads."""
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
    """Starts a server: `serve(behaviour, …, socket_dir=folder)`."""
    servers: list[ScriptedServer] = []

    def start(*behaviours: Behaviour, socket_dir: Path | None = None) -> ScriptedServer:
        servers.append(ScriptedServer(*behaviours, socket_dir=socket_dir))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
