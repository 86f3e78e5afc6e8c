"""Frames in shared memory of a Unix socket's peer, and the fallback to inline frames."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from raw_http import DEADLINE_S, TOKEN, post_request, read_response, request_frame
from sandbox_processes import SandboxProcess, StartSandbox

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.shared_region import MAX_REGION_BYTES, SharedRegion
from faasmoe_contracts.store import Store
from faasmoe_contracts.unix_socket import unix_socket_path

SIZE = 1 << 16
Send = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture(scope="module")
def unix_sandbox(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> Iterator[SandboxProcess]:
    """A sandbox with one function that also listens on a Unix socket."""
    with (
        TemporaryDirectory(prefix="faasmoe-") as directory,
        sandbox(token=TOKEN, socket_dir=Path(directory) / "sockets", capacity=2) as sandbox_server,
    ):
        sandbox_server.attach(store, spec)
        sandbox_server.log.with_suffix(".socket").symlink_to(
            unix_socket_path(
                Path(directory) / "sockets", int(sandbox_server.address.rpartition(":")[2])
            )
        )
        yield sandbox_server
        assert sandbox_server.process.poll() is None
        assert "Traceback" not in sandbox_server.log.read_text()


@pytest.fixture
def connection(unix_sandbox: SandboxProcess) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(os.readlink(unix_sandbox.log.with_suffix(".socket")))
        yield connection


@pytest.fixture
def send(connection: socket.socket, spec: FunctionSpec) -> Send:
    def send(body: bytes, headers: str = "") -> tuple[int, dict[str, str], bytes]:
        connection.sendall(post_request(spec.id, body, headers=headers))
        return read_response(connection)

    return send


@pytest.fixture
def region() -> Iterator[SharedRegion]:
    region = SharedRegion.create(SIZE)
    yield region
    region.close_descriptor()


def region_header(region: SharedRegion, size_bytes: int = SIZE) -> str:
    return f"x-faasmoe-region: {region.descriptor} {size_bytes}\r\n"


def n_shared_frames(sandbox_server: SandboxProcess) -> float:
    text = sandbox_server.http.get("/metrics").text
    match = re.search(r"^faasmoe_expert_shared_frames_total (\S+)$", text, re.MULTILINE)
    assert match is not None
    return float(match[1])


def test_frame_in_shared_memory_is_answered_there_with_the_same_bytes(
    unix_sandbox: SandboxProcess, send: Send, region: SharedRegion
) -> None:
    before = n_shared_frames(unix_sandbox)
    status, headers, _ = send(request_frame(), region_header(region))
    assert (status, headers["x-faasmoe-region"]) == (200, str(SIZE))
    region.close_descriptor()
    for n_rows in (2, 3, 2):
        request = request_frame(n_rows=n_rows)
        region.view[: len(request)] = request
        status, headers, body = send(b"", f"x-faasmoe-frame: {len(request)}\r\n")
        assert (status, body) == (200, b"")
        start, length = map(int, headers["x-faasmoe-frame"].split())
        assert start >= len(request)
        assert start % 64 == 0
        assert bytes(region.view[: len(request)]) == request  # intact, because a retry may need it
        assert bytes(region.view[start : start + length]) == send(request)[2]
    assert n_shared_frames(unix_sandbox) == before + 3


def test_batched_frame_is_answered_in_shared_memory(
    unix_sandbox: SandboxProcess, spec: FunctionSpec, send: Send, region: SharedRegion
) -> None:
    request = request_frame()
    send(request, region_header(region))
    region.view[: len(request)] = request
    inline_body = unix_sandbox.http.post(
        f"/v1/functions/{spec.id}", content=request
    )  # another client, so that frames are batched
    _, headers, body = send(b"", f"x-faasmoe-frame: {len(request)}\r\n")
    start, length = map(int, headers["x-faasmoe-frame"].split())
    assert body == b""
    assert bytes(region.view[start : start + length]) == inline_body.content


def test_maps_a_region_offered_with_a_batched_frame(
    unix_sandbox: SandboxProcess, spec: FunctionSpec, send: Send, region: SharedRegion
) -> None:
    unix_sandbox.http.post(
        f"/v1/functions/{spec.id}", content=request_frame()
    )  # another client, so that frames are batched
    status, headers, body = send(request_frame(), region_header(region))
    assert (status, headers["x-faasmoe-region"]) == (200, str(SIZE))
    assert body


def test_sends_a_response_inline_if_it_does_not_fit(send: Send, region: SharedRegion) -> None:
    n_rows = SIZE // 2 // (32 * 4 + 12) + 60  # more than half of the region
    request = request_frame(n_rows=n_rows)
    assert SIZE // 2 < len(request) < SIZE
    _, _, inline_body = send(request, region_header(region))
    region.view[: len(request)] = request
    status, headers, body = send(b"", f"x-faasmoe-frame: {len(request)}\r\n")
    assert status == 200
    assert "x-faasmoe-frame" not in headers
    assert body == inline_body


def test_larger_region_replaces_the_first(send: Send, region: SharedRegion) -> None:
    request = request_frame()
    send(request, region_header(region))
    larger = SharedRegion.create(2 * SIZE)
    _, headers, inline_body = send(request, region_header(larger, 2 * SIZE))
    assert headers["x-faasmoe-region"] == str(2 * SIZE)
    larger.close_descriptor()
    larger.view[: len(request)] = request
    _, headers, _ = send(b"", f"x-faasmoe-frame: {len(request)}\r\n")
    start, length = map(int, headers["x-faasmoe-frame"].split())
    assert bytes(larger.view[start : start + length]) == inline_body


@pytest.mark.parametrize("value", ["10", "x", "-1", "1 2", "", "99999999999999999999"])
def test_rejects_a_frame_header_without_region(value: str, send: Send) -> None:
    status, _, body = send(b"", f"x-faasmoe-frame: {value}\r\n")
    assert status == 400
    assert b"x-faasmoe-frame" in body
    assert send(request_frame())[0] == 200  # the connection stays usable


def test_rejects_a_frame_larger_than_the_region(send: Send, region: SharedRegion) -> None:
    send(request_frame(), region_header(region))
    assert send(b"", f"x-faasmoe-frame: {SIZE + 1}\r\n")[0] == 400


@pytest.mark.parametrize(
    "offer",
    [
        "",
        "x y",
        "1",
        "0 65536",
        "999999 65536",
        f"{{fd}} {SIZE * 2}",
        f"{{fd}} {MAX_REGION_BYTES * 2}",
    ],
)
def test_ignores_an_invalid_region(offer: str, send: Send, region: SharedRegion) -> None:
    text = offer.format(fd=region.descriptor)
    status, headers, body = send(request_frame(), f"x-faasmoe-region: {text}\r\n")
    assert status == 200
    assert "x-faasmoe-region" not in headers
    assert body == send(request_frame())[2]


def test_ignores_a_region_offered_with_a_rejected_frame(send: Send, region: SharedRegion) -> None:
    status, headers, _ = send(b"junk", region_header(region))
    assert status == 400
    assert "x-faasmoe-region" not in headers
    assert send(b"", "x-faasmoe-frame: 10\r\n")[0] == 400


def test_ignores_a_region_offered_over_tcp(
    unix_sandbox: SandboxProcess, spec: FunctionSpec, region: SharedRegion
) -> None:
    host, _, port = unix_sandbox.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(post_request(spec.id, request_frame(), headers=region_header(region)))
        status, headers, _ = read_response(connection)
    assert status == 200
    assert "x-faasmoe-region" not in headers
