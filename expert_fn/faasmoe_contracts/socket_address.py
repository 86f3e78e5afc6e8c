"""Addresses of stream sockets, as text: HOST:PORT, or the absolute path of a Unix socket."""

from __future__ import annotations

import asyncio
import socket

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.tls import TlsPeer

EXPECTED = "HOST:PORT, or the absolute path of a Unix socket"
MAX_PORT = 65535
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 4


def split_host_port(address: str) -> tuple[str, int] | None:
    """Return host and port of an address; None for a Unix socket.

    Raises:
        ContractError: the address is neither.
    """
    if address.startswith("/"):
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ContractError("address", repr(address[:80]), EXPECTED)
    return host.strip("[]"), int(port)


async def open_connection(
    address: str, *, limit: int, ack_timeout_s: float | None = None, tls: TlsPeer | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an address.

    A machine that is gone ends no connection: reading from it fails half a minute later, as the
    system asks for it.

    Args:
        address: where to.
        limit: most bytes of a line, and of what is read ahead.
        ack_timeout_s: how long what was written may stay unread by the other machine, for one that
            always reads; None for the system's quarter of an hour.
        tls: how the other end of a TCP connection is known; None connects without TLS.

    Raises:
        OSError: nobody listens there, or another one than `tls` names.
        ContractError: the address is invalid.
    """
    if (target := split_host_port(address)) is None:
        return await asyncio.open_unix_connection(address, limit=limit)
    reader, writer = await asyncio.open_connection(
        *target,
        limit=limit,
        ssl=None if tls is None else tls.context(),
        server_hostname=None if tls is None else tls.name,
    )
    probe_peer(writer)
    if ack_timeout_s is not None:
        set_ack_timeout(writer, ack_timeout_s)
    return reader, writer


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write to a connection, unless it is lost.

    A StreamWriter does not say so: uvloop raises RuntimeError, asyncio nothing.

    Raises:
        ConnectionResetError: the connection is lost or closed.
    """
    if writer.transport.is_closing():
        raise ConnectionResetError("the connection is lost")
    writer.write(data)


def set_ack_timeout(writer: asyncio.StreamWriter, timeout_s: float) -> None:
    """Let the system end a TCP connection whose other machine leaves unread what was written.

    Args:
        writer: writes to the connection.
        timeout_s: for how long, in seconds.
    """
    connection = writer.get_extra_info("socket")
    timeout_ms = round(timeout_s * 1000)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)


def probe_peer(writer: asyncio.StreamWriter) -> None:
    """Let the system end a TCP connection half a minute after the other machine is gone."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
