"""Keep-alive connections to sandboxes."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

from faasmoe_router.dispatch.calls import Call
from faasmoe_router.dispatch.connection import Connection
from faasmoe_router.dispatch.sharing import SHARED_FRAME_BYTES

MAX_IDLE_PER_ADDRESS = 8


class ConnectionPool:
    """The connections that no call uses. Belongs to one thread, but for `retain` and `rest`.

    Args:
        token: bearer token of the sandboxes.
        socket_dir: where sandboxes of this machine have Unix sockets; None for TCP alone.
        shared_bytes: frames of so many bytes and more are shared with those, not sent.
    """

    def __init__(
        self,
        *,
        token: str = "",
        socket_dir: Path | None = None,
        shared_bytes: int = SHARED_FRAME_BYTES,
    ) -> None:
        self._authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._socket_dir = socket_dir
        self._shared_bytes = shared_bytes
        self._idle: dict[str, list[Connection]] = {}
        self._known: Collection[str] | None = None  # None: every address
        self._lock = threading.Lock()  # of the two above

    def connection(self, address: str, *, fresh: bool) -> Connection:
        """Return an idle connection, or a new one; raises CallError."""
        if not fresh:
            with self._lock:
                if idle := self._idle.get(address):
                    return idle.pop()
        return Connection(address, socket_dir=self._socket_dir, shared_bytes=self._shared_bytes)

    def head(self, call: Call) -> bytes:
        """Return the head of a call's HTTP request, but for what says where its body is."""
        return (
            f"POST /v1/functions/{call.function_id} HTTP/1.1\r\nhost: {call.address}\r\n"
            f"{self._authorization}"
        ).encode()

    def keep(self, connection: Connection) -> None:
        """Take a connection back whose answer was read."""
        address = connection.address
        with self._lock:
            is_known = self._known is None or address in self._known
            if is_known and connection.is_reusable:
                idle = self._idle.setdefault(address, [])
                if len(idle) < MAX_IDLE_PER_ADDRESS:
                    connection.rest()
                    idle.append(connection)
                    return
        connection.close()

    def retain(self, addresses: Collection[str]) -> None:
        """Close the connections to all other addresses, those in use once they are answered.

        Their sandboxes are gone. May be called from any thread.
        """
        with self._lock:
            self._known = addresses
            gone = [self._idle.pop(a) for a in list(self._idle) if a not in addresses]
        for connection in (c for connections in gone for c in connections):
            connection.close()

    def rest(self) -> None:
        """Give back memory that idle connections keep for the next calls; from any thread."""
        with self._lock:
            for connection in (c for connections in self._idle.values() for c in connections):
                connection.rest_long()

    def close(self) -> None:
        """Close all idle connections."""
        self.retain(())
