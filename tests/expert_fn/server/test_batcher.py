"""Frames of several routers that wait for the same function: computed as one, each answered."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from raw_http import DEADLINE_S, TOKEN, post_request, read_response, request_frame
from sandbox_processes import SandboxProcess, StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import Buffer, decode_request
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.server.batcher import (
    MAX_BATCH_ROWS,
    SENDER_TTL_S,
    DynamicBatcher,
    SenderTracker,
    pop_batch,
)
from faasmoe_expert.server.runtime import ComputeTask

ONE, OTHER = (cast(ExpertFunction, object()) for _ in range(2))


def make_task(n_rows: int = 1, *, function: ExpertFunction = ONE, layer: int = 0) -> ComputeTask:
    return ComputeTask(function, decode_request(request_frame(n_rows=n_rows, layer=layer)))


def test_one_router_is_not_several() -> None:
    senders = SenderTracker()
    assert not any(senders.record_is_concurrent("a", 0.1 * n) for n in range(30))


def test_routers_are_several_as_long_as_another_has_sent_lately() -> None:
    senders = SenderTracker()
    assert not senders.record_is_concurrent("a", 0.0)
    assert senders.record_is_concurrent("b", 0.5)
    assert senders.record_is_concurrent("b", 0.9 * SENDER_TTL_S)
    assert not senders.record_is_concurrent("b", SENDER_TTL_S)
    assert senders.record_is_concurrent("a", SENDER_TTL_S + 0.5)


@dataclass
class RecordingCompute:
    """Computes by saying which works were computed as one; `bad` fails, and whoever is with it."""

    bad: ComputeTask | None = None
    made: list[Sequence[ComputeTask]] = field(default_factory=list)

    def compute_batch(self, works: Sequence[ComputeTask]) -> list[list[Buffer]]:
        self.made.append(works)
        if self.bad in works:
            raise RuntimeError("bad")
        return [[bytes([w.request.header.n_rows])] for w in works]


def pop_from(*works: ComputeTask) -> tuple[list[ComputeTask], list[ComputeTask]]:
    waiting = deque((work, None) for work in works)
    batch = pop_batch(waiting)
    return [w for w, _ in batch], [w for w, _ in waiting]


def test_a_batch_is_the_first_and_all_that_are_like_it() -> None:
    a, b, c, d = make_task(), make_task(layer=1), make_task(2), make_task(function=OTHER)
    assert pop_from(a, b, c, d) == ([a, c], [b, d])
    assert pop_from(b, d) == ([b], [d])


def test_frames_of_many_rows_are_computed_alone() -> None:
    small, large, full = make_task(1), make_task(MAX_BATCH_ROWS), make_task(MAX_BATCH_ROWS - 1)
    assert pop_from(small, large, full) == ([small, full], [large])
    assert pop_from(large, small) == ([large], [small])


def compute_all(calls: RecordingCompute, *works: ComputeTask) -> list[list[Buffer] | BaseException]:
    async def run() -> list[list[Buffer] | BaseException]:
        gathering = DynamicBatcher(calls.compute_batch)
        async with asyncio.timeout(DEADLINE_S):
            coming = [gathering.submit(work) for work in works]
            return await asyncio.gather(*coming, return_exceptions=True)

    return asyncio.run(run())


def test_frames_that_wait_together_are_computed_as_one_and_answered_each() -> None:
    calls, works = (
        RecordingCompute(),
        [make_task(1), make_task(2), make_task(3, layer=1), make_task(4)],
    )
    assert compute_all(calls, *works) == [[bytes([n])] for n in (1, 2, 3, 4)]
    assert calls.made == [[works[0], works[1], works[3]], [works[2]]]


def test_an_error_is_its_own_frames_alone() -> None:
    bad = make_task(2)
    calls, works = RecordingCompute(bad), [make_task(1), bad, make_task(3)]
    first, second, third = compute_all(calls, *works)
    assert (first, third) == ([b"\x01"], [b"\x03"])
    assert isinstance(second, RuntimeError)
    assert calls.made == [works, [works[0]], [bad], [works[2]]]


def test_who_no_longer_waits_harms_nobody() -> None:
    async def run(leaves: Callable[[DynamicBatcher], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await leaves(DynamicBatcher(calls.compute_batch))

    async def leaves(gathering: DynamicBatcher) -> None:
        gone, stays = gathering.submit(make_task(1)), gathering.submit(make_task(2))
        gone.cancel()
        assert await stays == [b"\x02"]

    calls = RecordingCompute()
    asyncio.run(run(leaves))


@pytest.fixture
def routers(sandbox_server: SandboxProcess) -> Iterator[list[socket.socket]]:
    """Connections of three hosts."""
    host, port = sandbox_server.address.split(":")
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                socket.create_connection(
                    (host, int(port)), timeout=DEADLINE_S, source_address=(source, 0)
                )
            )
            for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3")
        ]


@contextmanager
def stopped(sandbox_server: SandboxProcess) -> Iterator[None]:
    """What is sent meanwhile is there at once when the sandbox goes on."""
    os.kill(sandbox_server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(sandbox_server.process.pid, signal.SIGCONT)


def counted(sandbox_server: SandboxProcess) -> tuple[float, float]:
    """Frames so far, and computations."""
    text = sandbox_server.http.get("/metrics").text
    found = [
        re.search(rf"^faasmoe_expert_{name} (\S+)$", text, re.MULTILINE)
        for name in ("frames_total", "compute_seconds_count")
    ]
    frames, computations = (float(match[1]) for match in found if match is not None)
    return frames, computations


def make_concurrent(routers: Sequence[socket.socket], spec: FunctionSpec) -> None:
    for router in routers:
        router.sendall(post_request(spec.id, request_frame()))
        assert read_response(router)[0] == 200


def test_a_sandbox_computes_frames_of_several_routers_as_one(
    sandbox_server: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    make_concurrent(routers, spec)
    asked = [request_frame(n_rows=n, expert=n % 3) for n in (2, 3, 4)]
    alone = [
        sandbox_server.http.post(f"/v1/functions/{spec.id}", content=body).content for body in asked
    ]
    before = counted(sandbox_server)
    with stopped(sandbox_server):
        for router, body in zip(routers, asked, strict=True):
            router.sendall(post_request(spec.id, body))
    answers = [read_response(router) for router in routers]
    frames, computations = counted(sandbox_server)
    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert [len(body) for _, _, body in answers] == [len(body) for body in alone]
    assert frames == before[0] + 3
    assert computations < before[1] + 3


def test_a_sandbox_refuses_a_bad_frame_alone(
    sandbox_server: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    make_concurrent(routers, spec)
    with stopped(sandbox_server):
        for router, expert in zip(routers, (1, 7, 2), strict=True):
            router.sendall(post_request(spec.id, request_frame(expert=expert)))
    assert [read_response(router)[0] for router in routers] == [200, 400, 200]


def test_a_sandbox_answers_who_waits_when_another_leaves(
    sandbox_server: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    make_concurrent(routers, spec)
    with stopped(sandbox_server):
        for router in routers:
            router.sendall(post_request(spec.id, request_frame()))
        routers[1].close()
    assert [read_response(routers[n])[0] for n in (0, 2)] == [200, 200]


def test_frames_that_wait_count_as_taken_in(
    sandbox: StartSandbox, store: Store, routers: list[socket.socket]
) -> None:
    """What is computed one after the other may pile up behind a long computation: it is bounded."""
    spec = make_function_spec(store, [0], [0, 1, 2])
    with sandbox(token=TOKEN, max_frames=2) as sandbox_server, ExitStack() as stack:
        sandbox_server.attach(store, spec)
        host, port = sandbox_server.address.split(":")
        callers = [
            stack.enter_context(
                socket.create_connection(
                    (host, int(port)), timeout=DEADLINE_S, source_address=(f"127.0.0.{n}", 0)
                )
            )
            for n in range(1, 6)
        ]
        make_concurrent(callers, spec)
        with stopped(sandbox_server):
            for caller in callers:
                caller.sendall(post_request(spec.id, request_frame()))
        found = sorted(read_response(caller)[0] for caller in callers)
        assert found[:2] == [200, 200]
        assert set(found) == {200, 429}
        assert (
            sandbox_server.http.post(
                f"/v1/functions/{spec.id}", content=request_frame()
            ).status_code
            == 200
        )
