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
from rawhttp import DEADLINE_S, TOKEN, frame, post, read_answer
from sandboxes import OpenSandbox, SandboxProcess, spec_of

from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.server.gathering import (
    MAX_BATCH_ROWS,
    SENDER_LASTS_S,
    Gathering,
    Senders,
    take_batch,
)
from faasmoe_expert.server.sandbox import Work
from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec
from faasmoe_expert.wire import decode_request
from faasmoe_expert.wire.checksum import Buffer

ONE, OTHER = (cast(ExpertFunction, object()) for _ in range(2))


def work(n_rows: int = 1, *, function: ExpertFunction = ONE, layer: int = 0) -> Work:
    return Work(function, decode_request(frame(n_rows=n_rows, layer=layer)))


def test_one_router_is_not_several() -> None:
    senders = Senders()
    assert not any(senders.are_several("a", 0.1 * n) for n in range(30))


def test_routers_are_several_as_long_as_another_has_sent_lately() -> None:
    senders = Senders()
    assert not senders.are_several("a", 0.0)
    assert senders.are_several("b", 0.5)
    assert senders.are_several("b", 0.9 * SENDER_LASTS_S)
    assert not senders.are_several("b", SENDER_LASTS_S)
    assert senders.are_several("a", SENDER_LASTS_S + 0.5)


@dataclass
class Calls:
    """Computes by saying which works were computed as one; `bad` fails, and whoever is with it."""

    bad: Work | None = None
    made: list[Sequence[Work]] = field(default_factory=list)

    def compute(self, works: Sequence[Work]) -> list[list[Buffer]]:
        self.made.append(works)
        if self.bad in works:
            raise RuntimeError("bad")
        return [[bytes([w.request.header.n_rows])] for w in works]


def taken(*works: Work) -> tuple[list[Work], list[Work]]:
    waiting = deque((work, None) for work in works)
    batch = take_batch(waiting)
    return [w for w, _ in batch], [w for w, _ in waiting]


def test_a_batch_is_the_first_and_all_that_are_like_it() -> None:
    a, b, c, d = work(), work(layer=1), work(2), work(function=OTHER)
    assert taken(a, b, c, d) == ([a, c], [b, d])
    assert taken(b, d) == ([b], [d])


def test_frames_of_many_rows_are_computed_alone() -> None:
    small, large, full = work(1), work(MAX_BATCH_ROWS), work(MAX_BATCH_ROWS - 1)
    assert taken(small, large, full) == ([small, full], [large])
    assert taken(large, small) == ([large], [small])


def story(calls: Calls, *works: Work) -> list[list[Buffer] | BaseException]:
    async def run() -> list[list[Buffer] | BaseException]:
        gathering = Gathering(calls.compute)
        async with asyncio.timeout(DEADLINE_S):
            coming = [gathering.add(work) for work in works]
            return await asyncio.gather(*coming, return_exceptions=True)

    return asyncio.run(run())


def test_frames_that_wait_together_are_computed_as_one_and_answered_each() -> None:
    calls, works = Calls(), [work(1), work(2), work(3, layer=1), work(4)]
    assert story(calls, *works) == [[bytes([n])] for n in (1, 2, 3, 4)]
    assert calls.made == [[works[0], works[1], works[3]], [works[2]]]


def test_an_error_is_its_own_frames_alone() -> None:
    bad = work(2)
    calls, works = Calls(bad), [work(1), bad, work(3)]
    first, second, third = story(calls, *works)
    assert (first, third) == ([b"\x01"], [b"\x03"])
    assert isinstance(second, RuntimeError)
    assert calls.made == [works, [works[0]], [bad], [works[2]]]


def test_who_no_longer_waits_harms_nobody() -> None:
    async def run(leaves: Callable[[Gathering], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await leaves(Gathering(calls.compute))

    async def leaves(gathering: Gathering) -> None:
        gone, stays = gathering.add(work(1)), gathering.add(work(2))
        gone.cancel()
        assert await stays == [b"\x02"]

    calls = Calls()
    asyncio.run(run(leaves))


@pytest.fixture
def routers(box: SandboxProcess) -> Iterator[list[socket.socket]]:
    """Connections of three hosts."""
    host, port = box.address.split(":")
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
def stopped(box: SandboxProcess) -> Iterator[None]:
    """What is sent meanwhile is there at once when the sandbox goes on."""
    os.kill(box.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(box.process.pid, signal.SIGCONT)


def counted(box: SandboxProcess) -> tuple[float, float]:
    """Frames so far, and computations."""
    text = box.http.get("/metrics").text
    found = [
        re.search(rf"^faasmoe_expert_{name} (\S+)$", text, re.MULTILINE)
        for name in ("frames_total", "compute_seconds_count")
    ]
    frames, computations = (float(match[1]) for match in found if match is not None)
    return frames, computations


def told_apart(routers: Sequence[socket.socket], spec: FunctionSpec) -> None:
    for router in routers:
        router.sendall(post(spec.id, frame()))
        assert read_answer(router)[0] == 200


def test_a_sandbox_computes_frames_of_several_routers_as_one(
    box: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    told_apart(routers, spec)
    asked = [frame(n_rows=n, expert=n % 3) for n in (2, 3, 4)]
    alone = [box.http.post(f"/v1/functions/{spec.id}", content=body).content for body in asked]
    before = counted(box)
    with stopped(box):
        for router, body in zip(routers, asked, strict=True):
            router.sendall(post(spec.id, body))
    answers = [read_answer(router) for router in routers]
    frames, computations = counted(box)
    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert [len(body) for _, _, body in answers] == [len(body) for body in alone]
    assert frames == before[0] + 3
    assert computations < before[1] + 3


def test_a_sandbox_refuses_a_bad_frame_alone(
    box: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    told_apart(routers, spec)
    with stopped(box):
        for router, expert in zip(routers, (1, 7, 2), strict=True):
            router.sendall(post(spec.id, frame(expert=expert)))
    assert [read_answer(router)[0] for router in routers] == [200, 400, 200]


def test_a_sandbox_answers_who_waits_when_another_leaves(
    box: SandboxProcess, routers: list[socket.socket], spec: FunctionSpec
) -> None:
    told_apart(routers, spec)
    with stopped(box):
        for router in routers:
            router.sendall(post(spec.id, frame()))
        routers[1].close()
    assert [read_answer(routers[n])[0] for n in (0, 2)] == [200, 200]


def test_frames_that_wait_count_as_taken_in(
    sandbox: OpenSandbox, store: Store, routers: list[socket.socket]
) -> None:
    """What is computed one after the other may pile up behind a long computation: it is bounded."""
    spec = spec_of(store, [0], [0, 1, 2])
    with sandbox(token=TOKEN, max_frames=2) as box, ExitStack() as stack:
        box.attach(store, spec)
        host, port = box.address.split(":")
        callers = [
            stack.enter_context(
                socket.create_connection(
                    (host, int(port)), timeout=DEADLINE_S, source_address=(f"127.0.0.{n}", 0)
                )
            )
            for n in range(1, 6)
        ]
        told_apart(callers, spec)
        with stopped(box):
            for caller in callers:
                caller.sendall(post(spec.id, frame()))
        found = sorted(read_answer(caller)[0] for caller in callers)
        assert found[:2] == [200, 200]
        assert set(found) == {200, 429}
        assert box.http.post(f"/v1/functions/{spec.id}", content=frame()).status_code == 200
