"""Frames of several routers for the same function are computed in batches."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from raw_http import DEADLINE_S, TOKEN, post_request, read_response, request_frame, stopped
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


def test_one_router_is_not_concurrent() -> None:
    senders = SenderTracker()
    assert not any(senders.record_is_concurrent("a", 0.1 * n) for n in range(30))


def test_routers_are_concurrent_while_another_sent_recently() -> None:
    senders = SenderTracker()
    assert not senders.record_is_concurrent("a", 0.0)
    assert senders.record_is_concurrent("b", 0.5)
    assert senders.record_is_concurrent("b", 0.9 * SENDER_TTL_S)
    assert not senders.record_is_concurrent("b", SENDER_TTL_S)
    assert senders.record_is_concurrent("a", SENDER_TTL_S + 0.5)


@dataclass
class RecordingCompute:
    """Records batches; any batch that contains `bad` fails."""

    bad: ComputeTask | None = None
    batches: list[Sequence[ComputeTask]] = field(default_factory=list)

    def compute_batch(self, tasks: Sequence[ComputeTask]) -> list[list[Buffer]]:
        self.batches.append(tasks)
        if self.bad in tasks:
            raise RuntimeError("bad")
        return [[bytes([w.request.header.n_rows])] for w in tasks]


def pop_from(*tasks: ComputeTask) -> tuple[list[ComputeTask], list[ComputeTask]]:
    queue = deque((task, None) for task in tasks)
    batch = pop_batch(queue)
    return [w for w, _ in batch], [w for w, _ in queue]


def test_batch_contains_the_first_task_and_all_with_its_key() -> None:
    a, b, c, d = make_task(), make_task(layer=1), make_task(2), make_task(function=OTHER)
    assert pop_from(a, b, c, d) == ([a, c], [b, d])
    assert pop_from(b, d) == ([b], [d])


def test_large_frames_are_computed_alone() -> None:
    small, large, full = make_task(1), make_task(MAX_BATCH_ROWS), make_task(MAX_BATCH_ROWS - 1)
    assert pop_from(small, large, full) == ([small, full], [large])
    assert pop_from(large, small) == ([large], [small])


def compute_all(
    compute: RecordingCompute, *tasks: ComputeTask
) -> list[list[Buffer] | BaseException]:
    async def run() -> list[list[Buffer] | BaseException]:
        batcher = DynamicBatcher(compute.compute_batch)
        async with asyncio.timeout(DEADLINE_S):
            futures = [batcher.submit(task) for task in tasks]
            return await asyncio.gather(*futures, return_exceptions=True)

    return asyncio.run(run())


def test_queued_frames_are_computed_in_one_batch_and_answered_individually() -> None:
    compute, tasks = (
        RecordingCompute(),
        [make_task(1), make_task(2), make_task(3, layer=1), make_task(4)],
    )
    assert compute_all(compute, *tasks) == [[bytes([n])] for n in (1, 2, 3, 4)]
    assert compute.batches == [[tasks[0], tasks[1], tasks[3]], [tasks[2]]]


def test_failing_task_does_not_fail_its_batch() -> None:
    bad = make_task(2)
    compute, tasks = RecordingCompute(bad), [make_task(1), bad, make_task(3)]
    first, second, third = compute_all(compute, *tasks)
    assert (first, third) == ([b"\x01"], [b"\x03"])
    assert isinstance(second, RuntimeError)
    assert compute.batches == [tasks, [tasks[0]], [bad], [tasks[2]]]


def test_cancelled_future_does_not_affect_the_batch() -> None:
    async def run(scenario: Callable[[DynamicBatcher], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario(DynamicBatcher(compute.compute_batch))

    async def scenario(batcher: DynamicBatcher) -> None:
        cancelled, remaining = batcher.submit(make_task(1)), batcher.submit(make_task(2))
        cancelled.cancel()
        assert await remaining == [b"\x02"]

    compute = RecordingCompute()
    asyncio.run(run(scenario))


@pytest.fixture
def routers(sandbox_server: SandboxProcess) -> Iterator[list[socket.socket]]:
    """Connections from three hosts."""
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


def read_counters(sandbox_server: SandboxProcess) -> tuple[float, float]:
    """Return the numbers of computed frames and of batches."""
    text = sandbox_server.http.get("/metrics").text
    matches = [
        re.search(rf"^faasmoe_expert_{name} (\S+)$", text, re.MULTILINE)
        for name in ("frames_total", "compute_seconds_count")
    ]
    n_frames, n_batches = (float(match[1]) for match in matches if match is not None)
    return n_frames, n_batches


def make_concurrent(routers: Sequence[socket.socket], spec: FunctionSpec) -> None:
    for router in routers:
        router.sendall(post_request(spec.id, request_frame()))
        assert read_response(router)[0] == 200


def test_sandbox_batches_frames_of_several_routers(
    sandbox_server: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    make_concurrent(routers, spec)
    frames = [request_frame(n_rows=n, expert=n % 3) for n in (2, 3, 4)]
    alone = [
        sandbox_server.http.post(f"/v1/functions/{spec.id}", content=body).content
        for body in frames
    ]
    before = read_counters(sandbox_server)
    with stopped(sandbox_server):
        for router, body in zip(routers, frames, strict=True):
            router.sendall(post_request(spec.id, body))
    responses = [read_response(router) for router in routers]
    n_frames, n_batches = read_counters(sandbox_server)
    assert [status for status, _, _ in responses] == [200, 200, 200]
    assert [len(body) for _, _, body in responses] == [len(body) for body in alone]
    assert n_frames == before[0] + 3
    assert n_batches < before[1] + 3


def test_sandbox_rejects_only_the_bad_frame(
    sandbox_server: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    make_concurrent(routers, spec)
    with stopped(sandbox_server):
        for router, expert in zip(routers, (1, 7, 2), strict=True):
            router.sendall(post_request(spec.id, request_frame(expert=expert)))
    assert [read_response(router)[0] for router in routers] == [200, 400, 200]


def test_sandbox_answers_remaining_routers_when_one_disconnects(
    sandbox_server: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    make_concurrent(routers, spec)
    with stopped(sandbox_server):
        for router in routers:
            router.sendall(post_request(spec.id, request_frame()))
        routers[1].close()
    assert [read_response(routers[n])[0] for n in (0, 2)] == [200, 200]


def test_queued_frames_count_against_the_read_limits(
    sandbox: StartSandbox, store: Store, routers: list[socket.socket]
) -> None:
    """Queued frames may pile up behind a long computation, so they must be bounded."""
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
        matches = sorted(read_response(caller)[0] for caller in callers)
        assert matches[:2] == [200, 200]
        assert set(matches) == {200, 429}
        assert (
            sandbox_server.http.post(
                f"/v1/functions/{spec.id}", content=request_frame()
            ).status_code
            == 200
        )
