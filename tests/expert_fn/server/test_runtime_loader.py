"""Attaching beside the event loop: one after the other, and frames are computed meanwhile."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_http import DEADLINE_S, TOKEN, request_frame
from sandbox_processes import StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import AttachRefused, BadAttachment
from faasmoe_expert.server.runtime import BackgroundLoader, LoadedFunction, SandboxRuntime


@dataclass
class LoadGate:
    """Holds loads back until the test lets one go on."""

    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    started: list[str] = field(default_factory=list)


@pytest.fixture
def gate(runtime: SandboxRuntime, monkeypatch: pytest.MonkeyPatch) -> LoadGate:
    gate, load = LoadGate(), SandboxRuntime.load

    def blocked_load(self: SandboxRuntime, spec: FunctionSpec, **where: Any) -> LoadedFunction:
        gate.started.append(spec.id)
        assert gate.go.acquire(timeout=DEADLINE_S)
        return load(self, spec, **where)

    monkeypatch.setattr(SandboxRuntime, "load", blocked_load)
    return gate


@pytest.fixture
def runtime(store: Store, spec: FunctionSpec) -> SandboxRuntime:
    """A sandbox of this process, with one function attached."""
    sandbox = SandboxRuntime(SandboxConfig(capacity=3), torch.device("cpu"))
    sandbox.attach(spec, store=store.path, model_digest=store.manifest.digest)
    return sandbox


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await story()

    asyncio.run(in_time())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def answer(sandbox: SandboxRuntime, function_id: str, asked: bytes) -> bytes:
    [parts] = sandbox.compute_batch([sandbox.parse_frame(function_id, bytearray(asked))])
    return b"".join(parts)


def ids(sandbox: SandboxRuntime) -> list[str]:
    return [function["id"] for function in sandbox.list_functions()["functions"]]


def test_frames_are_computed_while_another_function_is_being_attached(
    runtime: SandboxRuntime, store: Store, spec: FunctionSpec, gate: LoadGate
) -> None:
    other = make_function_spec(store, [1], [0])
    expected = answer(runtime, spec.id, request_frame())

    async def story() -> None:
        attaching = BackgroundLoader(runtime)
        coming = asyncio.create_task(
            attaching.attach(other, store=store.path, model_digest=store.manifest.digest)
        )
        await until(lambda: bool(gate.started))
        assert answer(runtime, spec.id, request_frame()) == expected
        assert ids(runtime) == [spec.id]  # it is there when it can compute, and not before
        gate.go.release()
        function, is_new = await coming
        assert (function["id"], is_new) == (other.id, True)
        assert answer(runtime, other.id, request_frame(layer=1, expert=0))

    run(story)


def test_functions_are_attached_one_after_the_other_and_the_same_but_once(
    runtime: SandboxRuntime, store: Store, gate: LoadGate
) -> None:
    one, two = make_function_spec(store, [1], [0]), make_function_spec(store, [1], [1])

    async def story() -> None:
        attaching = BackgroundLoader(runtime)
        where: dict[str, Any] = {"store": store.path, "model_digest": store.manifest.digest}
        coming = [asyncio.create_task(attaching.attach(s, **where)) for s in (one, two, one)]
        await until(lambda: gate.started == [one.id])
        gate.go.release()
        await until(lambda: gate.started == [one.id, two.id])
        gate.go.release()
        assert [is_new for _, is_new in await asyncio.gather(*coming)] == [True, True, False]

    run(story)


def test_room_is_counted_when_its_turn_comes(
    runtime: SandboxRuntime, store: Store, gate: LoadGate
) -> None:
    specs = [make_function_spec(store, [1], [expert]) for expert in range(3)]
    gate.go.release(3)

    async def story() -> None:
        attaching = BackgroundLoader(runtime)
        where: dict[str, Any] = {"store": store.path, "model_digest": store.manifest.digest}
        coming = [attaching.attach(spec, **where) for spec in specs]
        found = await asyncio.gather(*coming, return_exceptions=True)
        assert [isinstance(f, AttachRefused) for f in found] == [False, False, True]

    run(story)
    assert len(ids(runtime)) == 3


def test_one_that_cannot_be_attached_keeps_no_other_from_it(
    runtime: SandboxRuntime, store: Store, gate: LoadGate
) -> None:
    bad, good = make_function_spec(store, [9], [0]), make_function_spec(store, [1], [0])
    gate.go.release(2)

    async def story() -> None:
        attaching = BackgroundLoader(runtime)
        where: dict[str, Any] = {"store": store.path, "model_digest": store.manifest.digest}
        coming = [attaching.attach(spec, **where) for spec in (bad, good)]
        refused, attached = await asyncio.gather(*coming, return_exceptions=True)
        assert isinstance(refused, BadAttachment)
        assert not isinstance(attached, BaseException)

    run(story)
    assert good.id in ids(runtime)


def test_a_sandbox_process_answers_frames_while_it_attaches(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, tmp_path: Path
) -> None:
    """Its manifest is a pipe, so that attaching has begun, and goes on, until the test writes."""
    os.mkfifo(tmp_path / MANIFEST_NAME)
    attachment = {
        "store": str(tmp_path),
        "model_digest": store.manifest.digest,
        "layers": [1],
        "experts": [0],
    }
    with sandbox(token=TOKEN, capacity=2) as sandbox_server, ThreadPoolExecutor(1) as pool:
        sandbox_server.attach(store, spec)
        coming = pool.submit(sandbox_server.http.put, "/v1/functions/other", json=attachment)
        with (tmp_path / MANIFEST_NAME).open("wb") as manifest:
            answer = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=request_frame())
            assert answer.status_code == 200
            assert not coming.done()
            manifest.write(b"{}")
        refused = coming.result(DEADLINE_S)
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "store")
