"""A sandbox listens on a Unix socket beside its TCP port."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from faasmoe_up import free_port
from raw_http import TOKEN, request_frame
from sandbox_processes import StartSandbox

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.unix_socket import unix_socket_path


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A short path, because Unix socket paths are limited to 107 bytes."""
    with TemporaryDirectory(prefix="faasmoe-") as name:
        yield Path(name) / "sockets"


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_serves_tcp_and_unix_socket_alike_and_requires_the_token(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, socket_dir: Path
) -> None:
    with sandbox(token=TOKEN, socket_dir=socket_dir) as sandbox_server:
        sandbox_server.attach(store, spec)
        path = unix_socket_path(socket_dir, port_of(sandbox_server.address))
        assert stat.S_IMODE(os.stat(socket_dir).st_mode) == 0o700
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://sandbox", timeout=60
        ) as unix_client:
            url = f"/v1/functions/{spec.id}"
            assert unix_client.post(url, content=request_frame()).status_code == 401
            headers = {"authorization": f"Bearer {TOKEN}"}
            response = unix_client.post(url, content=request_frame(), headers=headers)
        assert response.status_code == 200
        assert response.content == sandbox_server.http.post(url, content=request_frame()).content


def test_removes_the_socket_on_exit(sandbox: StartSandbox, socket_dir: Path) -> None:
    with sandbox(socket_dir=socket_dir) as sandbox_server:
        assert unix_socket_path(socket_dir, port_of(sandbox_server.address)).exists()
        sandbox_server.process.terminate()
        assert sandbox_server.process.wait(120) == 0
    assert list(socket_dir.iterdir()) == []


def test_replaces_the_socket_of_a_killed_sandbox(sandbox: StartSandbox, socket_dir: Path) -> None:
    port = free_port()
    with sandbox(socket_dir=socket_dir, port=port) as sandbox_server:
        sandbox_server.process.kill()
        sandbox_server.process.wait()
    path = unix_socket_path(socket_dir, port)
    assert path.exists()
    with (
        sandbox(socket_dir=socket_dir, port=port),
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as unix_client,
    ):
        assert unix_client.get("http://sandbox/readyz").status_code == 200


def test_falls_back_to_tcp_with_a_warning(sandbox: StartSandbox, socket_dir: Path) -> None:
    socket_dir.write_text("in the way")
    with sandbox(socket_dir=socket_dir) as sandbox_server:
        assert sandbox_server.http.get("/readyz").status_code == 200
        assert "FAASMOE_SOCKET_DIR" in sandbox_server.log.read_text()
