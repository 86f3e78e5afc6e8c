"""A sandbox listens on a Unix socket beside its TCP port, for routers of its machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from raw_http import TOKEN, request_frame
from sandbox_processes import StartSandbox

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.unix_socket import unix_socket_path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a Unix socket's has at most 107 bytes."""
    with TemporaryDirectory(prefix="faasmoe-") as name:
        yield Path(name) / "near"


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_it_answers_the_same_on_both_and_asks_both_for_the_token(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, folder: Path
) -> None:
    with sandbox(token=TOKEN, socket_dir=folder) as sandbox_server:
        sandbox_server.attach(store, spec)
        path = unix_socket_path(folder, port_of(sandbox_server.address))
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://sandbox"
        ) as near:
            place = f"/v1/functions/{spec.id}"
            assert near.post(place, content=request_frame()).status_code == 401
            headers = {"authorization": f"Bearer {TOKEN}"}
            answer = near.post(place, content=request_frame(), headers=headers)
        assert answer.status_code == 200
        assert answer.content == sandbox_server.http.post(place, content=request_frame()).content


def test_the_socket_goes_with_the_sandbox(sandbox: StartSandbox, folder: Path) -> None:
    with sandbox(socket_dir=folder) as sandbox_server:
        assert unix_socket_path(folder, port_of(sandbox_server.address)).exists()
        sandbox_server.process.terminate()
        assert sandbox_server.process.wait(20) == 0
    assert list(folder.iterdir()) == []


def test_a_socket_left_by_one_that_was_killed_is_replaced(
    sandbox: StartSandbox, folder: Path
) -> None:
    with sandbox(socket_dir=folder) as sandbox_server:
        port = port_of(sandbox_server.address)
        sandbox_server.process.kill()
        sandbox_server.process.wait()
    path = unix_socket_path(folder, port)
    assert path.exists()
    with (
        sandbox(socket_dir=folder, port=port),
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as near,
    ):
        assert near.get("http://sandbox/readyz").status_code == 200


def test_where_it_cannot_listen_it_says_so_and_serves_on_tcp(
    sandbox: StartSandbox, folder: Path
) -> None:
    folder.write_text("in the way")
    with sandbox(socket_dir=folder) as sandbox_server:
        assert sandbox_server.http.get("/readyz").status_code == 200
        assert "FAASMOE_SOCKET_DIR" in sandbox_server.log.read_text()
