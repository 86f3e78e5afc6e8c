"""The shorter way to a sandbox of the same machine, taken where there is one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from faasmoe_contracts.unix_socket import connect_unix, unix_socket_path


@pytest.fixture
def unix_listener(tmp_path: Path) -> Iterator[socket.socket]:
    """What listens for port 9090."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(unix_socket_path(tmp_path, 9090)))
        listener.listen()
        yield listener


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_sandbox_of_this_machine_is_reached_by_its_unix_socket(
    host: str, unix_listener: socket.socket, tmp_path: Path
) -> None:
    found = connect_unix(tmp_path, f"{host}:9090")
    assert found is not None
    with found, unix_listener.accept()[0] as accepted:
        assert not found.getblocking()
        found.sendall(b"frame")
        assert accepted.recv(100) == b"frame"


@pytest.mark.parametrize(
    "address", ["10.0.0.7:9090", "example.org:9090", "127.0.0.1:9091", "127.0.0.1:", "127.0.0.1:x"]
)
def test_any_other_has_none(address: str, unix_listener: socket.socket, tmp_path: Path) -> None:
    assert connect_unix(tmp_path, address) is None


def test_a_socket_that_was_left_behind_is_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(unix_socket_path(tmp_path, 9090)))
    assert connect_unix(tmp_path, "127.0.0.1:9090") is None


def test_a_folder_whose_path_is_too_long_has_none(tmp_path: Path) -> None:
    assert connect_unix(tmp_path / ("x" * 120), "127.0.0.1:9090") is None
