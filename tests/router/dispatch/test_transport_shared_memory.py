"""Large frames to a sandbox of this machine are passed in shared memory; results are the same."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, make_function_spec

from faasmoe_contracts.wire import Dtype, OutputMode, encode_request
from faasmoe_expert.errors import BadFrame
from faasmoe_expert.server.connection import SharedMemoryChannel
from faasmoe_expert.server.http import HttpResponse
from faasmoe_router.dispatch.fanout import DispatchTimeouts, Fanout
from faasmoe_router.dispatch.transport import MIN_REGION_BYTES, Call, CallError, SharedMemoryClient

HIDDEN = 32
PATIENT = DispatchTimeouts(120.0, 120.0, 120.0)  # for a busy machine


def parts_of(size_bytes: int, *, n_parts: int = 3) -> list[memoryview]:
    frame = os.urandom(size_bytes)
    offsets = [size_bytes * n // n_parts for n in range(n_parts + 1)]
    return [memoryview(frame)[a:b] for a, b in itertools.pairwise(offsets)]


class Pair:
    """Both ends of a connection, in one process."""

    def __init__(self, client_pid: int | None) -> None:
        self.client = SharedMemoryClient(1000)
        self.channel = SharedMemoryChannel(client_pid)

    def echo(self, parts: list[memoryview]) -> tuple[bytes, bool]:
        """Echo a frame; return the response, and whether it was shared."""
        lines, sent = self.client.write_frame(parts)
        headers = dict(line.split(": ") for line in lines.split("\r\n") if line)
        body = b"".join(sent)
        assert int(headers["content-length"]) == len(body)
        if location := headers.get("x-faasmoe-frame"):
            frame = self.channel.read_frame(location.encode())
            response = self.channel.write_response(HttpResponse(200, "frame", [frame]), len(frame))
        else:
            response = HttpResponse(200, "frame", [body])
            if offer := headers.get("x-faasmoe-region"):
                response = self.channel.map_region(offer.encode(), response)
        response_headers = dict(
            line.encode().split(b": ") for line in response.headers.split("\r\n") if line
        )
        self.client.handle_response_headers(response_headers)
        if found := response_headers.get(b"x-faasmoe-frame"):
            return bytes(self.client.read_response(found)), True
        return b"".join(response.body), False


def test_large_frames_are_shared_once_confirmed_and_small_ones_never() -> None:
    pair = Pair(os.getpid())
    shared = []
    for size_bytes in (10, 999, 5000, 5000, 10, 1000, MIN_REGION_BYTES // 2):
        parts = parts_of(size_bytes)
        response, was_shared = pair.echo(parts)
        assert response == b"".join(parts)
        shared.append(was_shared)
    assert shared == [False, False, False, True, False, True, True]


def test_frame_that_does_not_fit_is_sent_and_a_larger_region_offered() -> None:
    pair = Pair(os.getpid())
    sizes = (5000, 5000, MIN_REGION_BYTES, MIN_REGION_BYTES, 5000)
    echoes = [(parts, pair.echo(parts)) for parts in map(parts_of, sizes)]
    assert all(response == b"".join(parts) for parts, (response, _) in echoes)
    assert [was_shared for _, (_, was_shared) in echoes] == [False, True, False, True, True]


def test_server_that_does_not_confirm_gets_one_offer_and_frames_over_the_socket() -> None:
    pair = Pair(None)
    for _ in range(3):
        parts = parts_of(5000)
        assert pair.echo(parts) == (b"".join(parts), False)
    lines, _ = pair.client.write_frame(parts_of(5000))
    assert "x-faasmoe-region" not in lines


def test_close_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    pair = Pair(os.getpid())
    pair.echo(parts_of(5000))
    pair.echo(parts_of(5000))
    pair.client.close()
    with pytest.raises(BadFrame):
        Pair(os.getpid()).channel.read_frame(b"10")
    del pair
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("location", [b"", b"0", b"x 1", b"0 -1", b"1048576 1", b"0 1048577"])
def test_invalid_response_location_is_a_call_error(location: bytes) -> None:
    pair = Pair(os.getpid())
    pair.echo(parts_of(5000))
    pair.echo(parts_of(5000))
    with pytest.raises(CallError, match="x-faasmoe-frame"):
        pair.client.read_response(location)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="faasmoe-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def sandbox_server(
    sandbox: StartSandbox, prepared_store: PreparedStore, folder: Path
) -> Iterator[tuple[SandboxProcess, str]]:
    """A sandbox of this machine, and the id of its function."""
    store = prepared_store("mixtral")
    spec = make_function_spec(store, [0], [0, 1, 2])
    with sandbox(socket_dir=folder, token="secret") as sandbox_server:
        sandbox_server.attach(store, spec)
        yield sandbox_server, spec.id


def frame_of(n_rows: int) -> list[Any]:
    rows = np.random.default_rng(n_rows).standard_normal((n_rows, HIDDEN), dtype=np.float32)
    return list(
        encode_request(
            rows.tobytes(),
            dtype=Dtype.FLOAT32,
            mode=OutputMode.REDUCED,
            layer=0,
            hidden_size=HIDDEN,
            n_rows=n_rows,
            pair_row=np.arange(n_rows, dtype=np.int32),
            pair_expert=np.full(n_rows, 1, dtype=np.int32),
            pair_weight=np.ones(n_rows, dtype=np.float32),
        )
    )


def n_shared(sandbox_server: SandboxProcess) -> float:
    text = sandbox_server.http.get("/metrics").text
    found = re.search(r"^faasmoe_expert_shared_frames_total (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def responses_to(fanout: Fanout, call: Call, n_calls: int = 1) -> list[bytes]:
    found: list[bytes] = []
    for _ in range(n_calls):
        assert fanout.run([call], lambda _, body: found.append(bytes(body))) == {}
    return found


def test_responses_are_equal_over_shared_memory_unix_socket_and_tcp(
    sandbox_server: tuple[SandboxProcess, str], folder: Path
) -> None:
    process, function_id = sandbox_server
    before = n_shared(process)
    found = []
    for socket_dir, min_shared_bytes in ((folder, 1), (folder, 1 << 40), (None, 1)):
        new_fanout = Fanout(
            token="secret",
            timeouts=PATIENT,
            socket_dir=socket_dir,
            min_shared_bytes=min_shared_bytes,
        )
        with contextlib.closing(new_fanout) as fanout:
            for n_rows in (1, 600, 7):
                call = Call(process.address, function_id, frame_of(n_rows))
                found.append(responses_to(fanout, call, 3))
    by_memory, by_socket, by_tcp = found[:3], found[3:6], found[6:]
    assert by_memory == by_socket == by_tcp
    assert n_shared(process) == before + 8  # all but the first, which was sent with the offer


def test_idle_connections_release_their_shared_pages_and_stay_usable(
    sandbox_server: tuple[SandboxProcess, str], folder: Path
) -> None:
    process, function_id = sandbox_server
    new_fanout = Fanout(token="secret", timeouts=PATIENT, socket_dir=folder, min_shared_bytes=1)
    with contextlib.closing(new_fanout) as fanout:
        call = Call(process.address, function_id, frame_of(6000))
        expected = responses_to(fanout, call, 2)
        before = shmem_bytes()
        fanout.release_memory()
        assert before - shmem_bytes() > 1_000_000  # a frame and its response, 0.8 MB each
        assert responses_to(fanout, call, 2) == expected


def shmem_bytes() -> int:
    found = re.search(r"RssShmem:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_overlapped_work_uses_one_thread_during_calls_to_this_machine(
    sandbox_server: tuple[SandboxProcess, str], folder: Path
) -> None:
    process, function_id = sandbox_server
    call = Call(process.address, function_id, frame_of(1))
    seen = []
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for socket_dir in (folder, None):
            new_fanout = Fanout(token="secret", timeouts=PATIENT, socket_dir=socket_dir)
            with contextlib.closing(new_fanout) as fanout:
                record = lambda: seen.append(torch.get_num_threads())  # noqa: E731
                assert fanout.run([call], lambda *_: None, while_waiting=record) == {}
    finally:
        torch.set_num_threads(n_threads)
    assert seen == [1, 2]


def test_sandbox_death_during_a_shared_call_is_a_call_error(
    serve: Callable[..., Any], folder: Path
) -> None:
    def dies_on_second_request(connection: socket.socket) -> None:
        channel = SharedMemoryChannel(os.getpid())
        head = connection.recv(1 << 16)
        offer = re.search(rb"x-faasmoe-region: ([^\r]*)", head)
        length = re.search(rb"content-length: (\d+)", head)
        assert offer is not None
        assert length is not None
        n_remaining = int(length[1]) - len(head.partition(b"\r\n\r\n")[2])
        while n_remaining > 0:
            n_remaining -= len(connection.recv(n_remaining))
        response = channel.map_region(offer[1], HttpResponse(200, "frame", [b"yes"]))
        connection.sendall(response.encode_head(keep_alive=True) + b"yes")
        connection.sendall(
            b"HTTP/1.1 200 OK\r\n" if b"x-faasmoe-frame" in connection.recv(1 << 16) else b"?"
        )

    server = serve(dies_on_second_request, socket_dir=folder)
    with contextlib.closing(
        Fanout(timeouts=PATIENT, socket_dir=folder, min_shared_bytes=1000)
    ) as fanout:
        call = Call(server.address, "f", [os.urandom(5000)])
        assert responses_to(fanout, call) == [b"yes"]
        errors = fanout.run([call], lambda *_: pytest.fail("expected no response"))
    assert "closed after" in str(errors[0])
