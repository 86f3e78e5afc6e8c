"""Large frames to a sandbox of this machine lie in shared memory; nothing else changes."""

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
from faasmoe_router.dispatch.calls import Call, CallError, DispatchTimeouts
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.transport import MIN_REGION_BYTES, SharedMemoryClient

HIDDEN = 32
PATIENT = DispatchTimeouts(connect_timeout_s=20.0, call_timeout_s=20.0)


def parts_of(size_bytes: int, *, n_parts: int = 3) -> list[memoryview]:
    whole = os.urandom(size_bytes)
    cuts = [size_bytes * n // n_parts for n in range(n_parts + 1)]
    return [memoryview(whole)[a:b] for a, b in itertools.pairwise(cuts)]


class Pair:
    """A connection's two ends, in one process."""

    def __init__(self, client_pid: int | None) -> None:
        self.outbox = SharedMemoryClient(1000)
        self.inbox = SharedMemoryChannel(client_pid)

    def echo(self, parts: list[memoryview]) -> tuple[bytes, bool]:
        """Have a frame answered by itself; return the answer, and whether it was shared."""
        lines, sent = self.outbox.write_frame(parts)
        headers = dict(line.split(": ") for line in lines.split("\r\n") if line)
        body = b"".join(sent)
        assert int(headers["content-length"]) == len(body)
        if place := headers.get("x-faasmoe-frame"):
            frame = self.inbox.read_frame(place.encode())
            answer = self.inbox.write_response(HttpResponse(200, "frame", [frame]), len(frame))
        else:
            answer = HttpResponse(200, "frame", [body])
            if offer := headers.get("x-faasmoe-region"):
                answer = self.inbox.map_region(offer.encode(), answer)
        told = dict(line.encode().split(b": ") for line in answer.headers.split("\r\n") if line)
        self.outbox.handle_response_headers(told)
        if found := told.get(b"x-faasmoe-frame"):
            return bytes(self.outbox.read_response(found)), True
        return b"".join(answer.body), False


def test_frames_go_by_memory_once_it_is_agreed_and_small_ones_never() -> None:
    pair = Pair(os.getpid())
    shared = []
    for size_bytes in (10, 999, 5000, 5000, 10, 1000, MIN_REGION_BYTES // 2):
        parts = parts_of(size_bytes)
        answer, was_shared = pair.echo(parts)
        assert answer == b"".join(parts)
        shared.append(was_shared)
    assert shared == [False, False, False, True, False, True, True]


def test_a_frame_that_does_not_fit_is_sent_and_a_larger_region_offered() -> None:
    pair = Pair(os.getpid())
    sizes = (5000, 5000, MIN_REGION_BYTES, MIN_REGION_BYTES, 5000)
    echoes = [(parts, pair.echo(parts)) for parts in map(parts_of, sizes)]
    assert all(answer == b"".join(parts) for parts, (answer, _) in echoes)
    assert [was_shared for _, (_, was_shared) in echoes] == [False, True, False, True, True]


def test_who_does_not_agree_gets_frames_as_ever_and_one_offer() -> None:
    pair = Pair(None)
    for _ in range(3):
        parts = parts_of(5000)
        assert pair.echo(parts) == (b"".join(parts), False)
    lines, _ = pair.outbox.write_frame(parts_of(5000))
    assert "x-faasmoe-region" not in lines


def test_closing_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    pair = Pair(os.getpid())
    pair.echo(parts_of(5000))
    pair.echo(parts_of(5000))
    pair.outbox.close()
    with pytest.raises(BadFrame):
        Pair(os.getpid()).inbox.read_frame(b"10")
    del pair
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("place", [b"", b"0", b"x 1", b"0 -1", b"1048576 1", b"0 1048577"])
def test_an_answer_that_is_said_to_lie_elsewhere_is_an_error_of_the_call(place: bytes) -> None:
    pair = Pair(os.getpid())
    pair.echo(parts_of(5000))
    pair.echo(parts_of(5000))
    with pytest.raises(CallError, match="x-faasmoe-frame"):
        pair.outbox.read_response(place)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="faasmoe-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def sandbox_server(
    sandbox: StartSandbox, prepared_store: PreparedStore, folder: Path
) -> Iterator[tuple[SandboxProcess, str]]:
    """A sandbox of this machine, and its function."""
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


def answers(fanout: Fanout, call: Call, n_calls: int = 1) -> list[bytes]:
    found: list[bytes] = []
    for _ in range(n_calls):
        assert fanout.run([call], lambda _, body: found.append(bytes(body))) == {}
    return found


def test_a_sandbox_answers_the_same_by_memory_by_socket_and_by_tcp(
    sandbox_server: tuple[SandboxProcess, str], folder: Path
) -> None:
    process, function_id = sandbox_server
    before = n_shared(process)
    found = []
    for socket_dir, shared_bytes in ((folder, 1), (folder, 1 << 40), (None, 1)):
        to_it = Fanout(
            token="secret", timeouts=PATIENT, socket_dir=socket_dir, min_shared_bytes=shared_bytes
        )
        with contextlib.closing(to_it) as fanout:
            for n_rows in (1, 600, 7):
                call = Call(process.address, function_id, frame_of(n_rows))
                found.append(answers(fanout, call, 3))
    by_memory, by_socket, by_tcp = found[:3], found[3:6], found[6:]
    assert by_memory == by_socket == by_tcp
    assert n_shared(process) == before + 8  # all but the first, which was sent beside the offer


def test_idle_connections_give_their_shared_pages_back_and_go_on(
    sandbox_server: tuple[SandboxProcess, str], folder: Path
) -> None:
    process, function_id = sandbox_server
    to_it = Fanout(token="secret", timeouts=PATIENT, socket_dir=folder, min_shared_bytes=1)
    with contextlib.closing(to_it) as fanout:
        call = Call(process.address, function_id, frame_of(6000))
        expected = answers(fanout, call, 2)
        before = shmem_bytes()
        fanout.release_memory()
        assert before - shmem_bytes() > 1_000_000  # a frame and its answer, of 0.8 MB each
        assert answers(fanout, call, 2) == expected


def shmem_bytes() -> int:
    found = re.search(r"RssShmem:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_work_beside_calls_to_this_machine_takes_one_thread(
    sandbox_server: tuple[SandboxProcess, str], folder: Path
) -> None:
    process, function_id = sandbox_server
    call = Call(process.address, function_id, frame_of(1))
    seen = []
    whole = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for socket_dir in (folder, None):
            to_it = Fanout(token="secret", timeouts=PATIENT, socket_dir=socket_dir)
            with contextlib.closing(to_it) as fanout:
                note = lambda: seen.append(torch.get_num_threads())  # noqa: E731
                assert fanout.run([call], lambda *_: None, while_waiting=note) == {}
    finally:
        torch.set_num_threads(whole)
    assert seen == [1, 2]


def test_a_sandbox_that_dies_in_a_shared_call_is_an_error_like_any(
    serve: Callable[..., Any], folder: Path
) -> None:
    def dies_at_the_second(connection: socket.socket) -> None:
        inbox = SharedMemoryChannel(os.getpid())
        head = connection.recv(1 << 16)
        offer = re.search(rb"x-faasmoe-region: ([^\r]*)", head)
        length = re.search(rb"content-length: (\d+)", head)
        assert offer is not None
        assert length is not None
        left = int(length[1]) - len(head.partition(b"\r\n\r\n")[2])
        while left > 0:
            left -= len(connection.recv(left))
        answer = inbox.map_region(offer[1], HttpResponse(200, "frame", [b"yes"]))
        connection.sendall(answer.encode_head(keep_alive=True) + b"yes")
        connection.sendall(
            b"HTTP/1.1 200 OK\r\n" if b"x-faasmoe-frame" in connection.recv(1 << 16) else b"?"
        )

    server = serve(dies_at_the_second, near=folder)
    with contextlib.closing(
        Fanout(timeouts=PATIENT, socket_dir=folder, min_shared_bytes=1000)
    ) as fanout:
        call = Call(server.address, "f", [os.urandom(5000)])
        assert answers(fanout, call) == [b"yes"]
        errors = fanout.run([call], lambda *_: pytest.fail("no answer was expected"))
    assert "closed after" in str(errors[0])
