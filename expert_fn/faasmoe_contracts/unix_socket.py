"""Unix sockets of sandboxes, for routers on the same machine.

A sandbox may listen on a Unix socket beside its TCP port. The socket's path is derived from the
port, so routing tables only contain host:port. A router that shares the directory connects to the
Unix socket of a loopback address if there is one and to TCP otherwise. The Unix socket avoids the
kernel's TCP stack; nothing else differs.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "[::1]", "::1", "localhost"})
PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of SO_PEERCRED, see unix(7)


def unix_socket_path(socket_dir: Path, port: int) -> Path:
    """Return the Unix socket path of the sandbox that listens on TCP port `port`."""
    return socket_dir / f"{port}.sock"


def connect_unix(socket_dir: Path, address: str) -> socket.socket | None:
    """Connect to the Unix socket of a sandbox; None if there is none that accepts connections.

    Args:
        socket_dir: directory with the Unix sockets of this machine's sandboxes.
        address: host:port of the sandbox; None is returned unless the host is loopback.

    Returns:
        A connected, non-blocking socket, or None.
    """
    host, _, port = address.rpartition(":")
    if host not in LOOPBACK_HOSTS or not port.isdecimal():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(str(unix_socket_path(socket_dir, int(port))))
    except OSError:  # no Unix socket or a full backlog: the caller tries TCP, which reports errors
        connection.close()
        return None
    return connection


def peer_pid(connection: socket.socket) -> int | None:
    """Return the process ID of the peer of a Unix socket.

    None for other socket families and for peers in another PID namespace.
    """
    if connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size
    )
    pid: int = PEER_CREDENTIALS.unpack(credentials)[0]
    return pid or None  # the kernel reports 0 for another PID namespace
