"""Connections of a gateway to the control plane: Unix sockets of its machine, or the operator.

Over TCP each begins with a `GatewayHello`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from faasmoe_contracts.gateway_hello import GatewayHello
from faasmoe_contracts.socket_address import open_connection, write
from faasmoe_contracts.tls import TlsPeer

ACK_TIMEOUT_S = 15.0  # of an operator whose node is gone: reports go to the next one


class ControlLink:
    """How to reach one part of the control plane.

    Args:
        address: a Unix socket, or HOST:PORT.
        hello: what to say first; None says nothing.
        tls: how the operator is known over TCP; None connects without TLS.

    Attributes:
        is_connected: whether there is a connection, as its user says.
    """

    def __init__(
        self, address: str, hello: GatewayHello | None = None, *, tls: TlsPeer | None = None
    ) -> None:
        self.is_connected = False
        self._tls = tls
        self._address = address
        self._hello = hello

    @classmethod
    def to_socket(cls, path: Path) -> ControlLink:
        """Return the link to a Unix socket."""
        return cls(str(path.absolute()))

    def __str__(self) -> str:
        return self._address

    async def open(self, *, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; raises OSError.

        Args:
            limit: most bytes of a line.
        """
        reader, writer = await open_connection(
            self._address, limit=limit, ack_timeout_s=ACK_TIMEOUT_S, tls=self._tls
        )
        if self._hello is not None:
            write(writer, self._hello.dumps())
        return reader, writer
