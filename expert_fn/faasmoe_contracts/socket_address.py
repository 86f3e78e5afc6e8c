"""Addresses of stream sockets, as text: HOST:PORT, or the absolute path of a Unix socket."""

from __future__ import annotations

import asyncio

from faasmoe_contracts.json_reader import ContractError

EXPECTED = "HOST:PORT, or the absolute path of a Unix socket"
MAX_PORT = 65535


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
    address: str, *, limit: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an address.

    Args:
        address: where to.
        limit: most bytes of a line, and of what is read ahead.

    Raises:
        OSError: nobody listens there.
        ContractError: the address is invalid.
    """
    if (target := split_host_port(address)) is None:
        return await asyncio.open_unix_connection(address, limit=limit)
    return await asyncio.open_connection(*target, limit=limit)
