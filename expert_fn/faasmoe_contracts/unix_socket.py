"""Where a sandbox listens for routers of its own machine: a Unix socket beside its TCP port.

The socket's path follows from the port, so that a function's address is host:port for everybody. A
router that shares the folder and is told a loopback address takes the Unix socket where there is
one, and TCP where there is none: it is a shorter way through the kernel and nothing else.
"""

from __future__ import annotations

import socket
from pathlib import Path

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "[::1]", "::1", "localhost"})


def unix_socket_path(socket_dir: Path, port: int) -> Path:
    """Return where the sandbox with this TCP port listens too."""
    return socket_dir / f"{port}.sock"


def connect_unix(socket_dir: Path, address: str) -> socket.socket | None:
    """Return a connection to the Unix socket of a sandbox, None if it has none that listens.

    Args:
        folder: where the sandboxes of this machine have their sockets.
        address: host:port of the sandbox; only one on loopback is of this machine.
    """
    host, _, port = address.rpartition(":")
    if host not in LOOPBACK_HOSTS or not port.isdecimal():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(str(unix_socket_path(socket_dir, int(port))))
    except OSError:  # it listens on TCP alone, or its queue is full: TCP tells what is wrong
        connection.close()
        return None
    return connection
