"""Frames in shared memory: taken from who is at the other end of a Unix socket, else sent."""

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
Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture(scope="module")
def unix_sandbox(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> Iterator[SandboxProcess]:
    """A sandbox with one function, on a Unix socket too."""
    with (
        TemporaryDirectory(prefix="faasmoe-") as folder,
        sandbox(token=TOKEN, socket_dir=Path(folder) / "near", capacity=2) as sandbox_server,
    ):
        sandbox_server.attach(store, spec)
        sandbox_server.log.with_suffix(".socket").symlink_to(
            unix_socket_path(Path(folder) / "near", int(sandbox_server.address.rpartition(":")[2]))
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
def ask(connection: socket.socket, spec: FunctionSpec) -> Ask:
    def ask(body: bytes, headers: str = "") -> tuple[int, dict[str, str], bytes]:
        connection.sendall(post_request(spec.id, body, headers=headers))
        return read_response(connection)

    return ask


@pytest.fixture
def region() -> Iterator[SharedRegion]:
    region = SharedRegion.create(SIZE)
    yield region
    region.close_descriptor()


def offer_of(region: SharedRegion, size_bytes: int = SIZE) -> str:
    return f"x-faasmoe-region: {region.descriptor} {size_bytes}\r\n"


def n_shared(sandbox_server: SandboxProcess) -> float:
    text = sandbox_server.http.get("/metrics").text
    found = re.search(r"^faasmoe_expert_shared_frames_total (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_frame_in_shared_memory_is_answered_there_with_the_same_bytes(
    unix_sandbox: SandboxProcess, ask: Ask, region: SharedRegion
) -> None:
    before = n_shared(unix_sandbox)
    status, headers, _ = ask(request_frame(), offer_of(region))
    assert (status, headers["x-faasmoe-region"]) == (200, str(SIZE))
    region.close_descriptor()
    for n_rows in (2, 3, 2):
        request = request_frame(n_rows=n_rows)
        region.view[: len(request)] = request
        status, headers, body = ask(b"", f"x-faasmoe-frame: {len(request)}\r\n")
        assert (status, body) == (200, b"")
        begin, length = map(int, headers["x-faasmoe-frame"].split())
        assert begin >= len(request)
        assert begin % 64 == 0
        assert bytes(region.view[: len(request)]) == request  # it is needed if computed again
        assert bytes(region.view[begin : begin + length]) == ask(request)[2]
    assert n_shared(unix_sandbox) == before + 3


def test_a_frame_that_is_gathered_is_answered_in_shared_memory_too(
    unix_sandbox: SandboxProcess, spec: FunctionSpec, ask: Ask, region: SharedRegion
) -> None:
    request = request_frame()
    ask(request, offer_of(region))
    region.view[: len(request)] = request
    sent = unix_sandbox.http.post(
        f"/v1/functions/{spec.id}", content=request
    )  # as from another router
    _, headers, body = ask(b"", f"x-faasmoe-frame: {len(request)}\r\n")
    begin, length = map(int, headers["x-faasmoe-frame"].split())
    assert body == b""
    assert bytes(region.view[begin : begin + length]) == sent.content


def test_an_offer_beside_a_frame_that_is_gathered_is_taken(
    unix_sandbox: SandboxProcess, spec: FunctionSpec, ask: Ask, region: SharedRegion
) -> None:
    unix_sandbox.http.post(
        f"/v1/functions/{spec.id}", content=request_frame()
    )  # as from another router
    status, headers, body = ask(request_frame(), offer_of(region))
    assert (status, headers["x-faasmoe-region"]) == (200, str(SIZE))
    assert body


def test_an_answer_that_does_not_fit_is_sent(ask: Ask, region: SharedRegion) -> None:
    n_rows = SIZE // 2 // (32 * 4 + 12) + 60  # more than half of it
    request = request_frame(n_rows=n_rows)
    assert SIZE // 2 < len(request) < SIZE
    _, _, sent = ask(request, offer_of(region))
    region.view[: len(request)] = request
    status, headers, body = ask(b"", f"x-faasmoe-frame: {len(request)}\r\n")
    assert status == 200
    assert "x-faasmoe-frame" not in headers
    assert body == sent


def test_a_larger_region_takes_the_place_of_the_first(ask: Ask, region: SharedRegion) -> None:
    request = request_frame()
    ask(request, offer_of(region))
    larger = SharedRegion.create(2 * SIZE)
    _, headers, sent = ask(request, offer_of(larger, 2 * SIZE))
    assert headers["x-faasmoe-region"] == str(2 * SIZE)
    larger.close_descriptor()
    larger.view[: len(request)] = request
    _, headers, _ = ask(b"", f"x-faasmoe-frame: {len(request)}\r\n")
    begin, length = map(int, headers["x-faasmoe-frame"].split())
    assert bytes(larger.view[begin : begin + length]) == sent


@pytest.mark.parametrize("place", ["10", "x", "-1", "1 2", "", "99999999999999999999"])
def test_a_frame_without_shared_memory_is_refused_by_name(place: str, ask: Ask) -> None:
    status, _, body = ask(b"", f"x-faasmoe-frame: {place}\r\n")
    assert status == 400
    assert b"x-faasmoe-frame" in body
    assert ask(request_frame())[0] == 200  # and the connection goes on


def test_a_frame_beyond_the_shared_memory_is_refused(ask: Ask, region: SharedRegion) -> None:
    ask(request_frame(), offer_of(region))
    assert ask(b"", f"x-faasmoe-frame: {SIZE + 1}\r\n")[0] == 400


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
def test_an_offer_that_cannot_be_taken_costs_nothing(
    offer: str, ask: Ask, region: SharedRegion
) -> None:
    text = offer.format(fd=region.descriptor)
    status, headers, body = ask(request_frame(), f"x-faasmoe-region: {text}\r\n")
    assert status == 200
    assert "x-faasmoe-region" not in headers
    assert body == ask(request_frame())[2]


def test_an_offer_beside_a_refused_frame_is_not_taken(ask: Ask, region: SharedRegion) -> None:
    status, headers, _ = ask(b"junk", offer_of(region))
    assert status == 400
    assert "x-faasmoe-region" not in headers
    assert ask(b"", "x-faasmoe-frame: 10\r\n")[0] == 400


def test_over_tcp_nothing_is_shared(
    unix_sandbox: SandboxProcess, spec: FunctionSpec, region: SharedRegion
) -> None:
    host, _, port = unix_sandbox.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(post_request(spec.id, request_frame(), headers=offer_of(region)))
        status, headers, _ = read_response(connection)
    assert status == 200
    assert "x-faasmoe-region" not in headers
