"""Connecting to Unix sockets of local sandboxes, and identifying their peers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from faasmoe_contracts.unix_socket import connect_unix, peer_pid, unix_socket_path


@pytest.fixture
def unix_listener(tmp_path: Path) -> Iterator[socket.socket]:
    """The Unix socket of a sandbox on port 9090."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(unix_socket_path(tmp_path, 9090)))
        listener.listen()
        yield listener


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_connects_to_the_unix_socket_of_a_local_sandbox(
    host: str, unix_listener: socket.socket, tmp_path: Path
) -> None:
    connection = connect_unix(tmp_path, f"{host}:9090")
    assert connection is not None
    with connection, unix_listener.accept()[0] as accepted:
        assert not connection.getblocking()
        connection.sendall(b"frame")
        assert accepted.recv(100) == b"frame"


@pytest.mark.parametrize(
    "address", ["10.0.0.7:9090", "example.org:9090", "127.0.0.1:9091", "127.0.0.1:", "127.0.0.1:x"]
)
def test_returns_none_for_other_addresses(
    address: str, unix_listener: socket.socket, tmp_path: Path
) -> None:
    assert connect_unix(tmp_path, address) is None


def test_returns_none_for_a_stale_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(unix_socket_path(tmp_path, 9090)))
    assert connect_unix(tmp_path, "127.0.0.1:9090") is None


def test_returns_none_if_the_socket_path_is_too_long(tmp_path: Path) -> None:
    assert connect_unix(tmp_path / ("x" * 120), "127.0.0.1:9090") is None


def test_peer_pid_is_known_for_unix_sockets_only() -> None:
    left, right = socket.socketpair()
    with left, right, socket.socket(socket.AF_INET) as tcp:
        assert peer_pid(left) == os.getpid()
        assert peer_pid(tcp) is None
