"""Functions load in the background, one at a time, while frames are computed."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_copy_streams import FakeCopyStream
from raw_http import DEADLINE_S, TOKEN, request_frame
from sandbox_processes import StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import AttachRefused, BadAttachment, OutOfMemory
from faasmoe_expert.functions.function import function_size_bytes
from faasmoe_expert.functions.transfer import Uploader
from faasmoe_expert.server.attachments import Attachment
from faasmoe_expert.server.loader import BackgroundLoader
from faasmoe_expert.server.runtime import LoadedFunction, SandboxRuntime


@dataclass
class LoadGate:
    """Blocks each load until the test releases it."""

    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    started: list[str] = field(default_factory=list)


@pytest.fixture
def gate(runtime: SandboxRuntime, monkeypatch: pytest.MonkeyPatch) -> LoadGate:
    gate, load = LoadGate(), SandboxRuntime.load

    def blocked_load(self: SandboxRuntime, spec: FunctionSpec, **source: Any) -> LoadedFunction:
        gate.started.append(spec.id)
        assert gate.permits.acquire(timeout=DEADLINE_S)
        return load(self, spec, **source)

    monkeypatch.setattr(SandboxRuntime, "load", blocked_load)
    return gate


@pytest.fixture
def runtime(store: Store, spec: FunctionSpec) -> SandboxRuntime:
    """A runtime in this process with one attached function."""
    sandbox = SandboxRuntime(SandboxConfig(capacity=3), torch.device("cpu"))
    sandbox.attach(spec, store=store.path, model_digest=store.manifest.digest)
    return sandbox


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run_with_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(run_with_deadline())


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def compute(sandbox: SandboxRuntime, function_id: str, frame: bytes) -> bytes:
    [parts] = sandbox.compute_batch([sandbox.parse_frame(function_id, bytearray(frame))])
    return b"".join(parts)


def function_ids(sandbox: SandboxRuntime) -> list[str]:
    return [function["id"] for function in sandbox.list_functions()["functions"]]


def test_computes_frames_while_another_function_loads(
    runtime: SandboxRuntime, store: Store, spec: FunctionSpec, gate: LoadGate
) -> None:
    other = make_function_spec(store, [1], [0])
    expected = compute(runtime, spec.id, request_frame())

    async def scenario() -> None:
        loader = BackgroundLoader(runtime)
        pending = asyncio.create_task(
            loader.attach(other, store=store.path, model_digest=store.manifest.digest)
        )
        await wait_until(lambda: bool(gate.started))
        assert compute(runtime, spec.id, request_frame()) == expected
        assert function_ids(runtime) == [spec.id]  # not listed before it can compute
        gate.permits.release()
        function, is_new = await pending
        assert (function["id"], is_new) == (other.id, True)
        assert compute(runtime, other.id, request_frame(layer=1, expert=0))

    run(scenario)


def test_attaches_one_function_at_a_time_and_each_once(
    runtime: SandboxRuntime, store: Store, gate: LoadGate
) -> None:
    one, two = make_function_spec(store, [1], [0]), make_function_spec(store, [1], [1])

    async def scenario() -> None:
        loader = BackgroundLoader(runtime)
        source: dict[str, Any] = {"store": store.path, "model_digest": store.manifest.digest}
        pending = [asyncio.create_task(loader.attach(s, **source)) for s in (one, two, one)]
        await wait_until(lambda: gate.started == [one.id])
        gate.permits.release()
        await wait_until(lambda: gate.started == [one.id, two.id])
        gate.permits.release()
        assert [is_new for _, is_new in await asyncio.gather(*pending)] == [True, True, False]

    run(scenario)


def test_checks_the_capacity_when_loading_starts(
    runtime: SandboxRuntime, store: Store, gate: LoadGate
) -> None:
    specs = [make_function_spec(store, [1], [expert]) for expert in range(3)]
    gate.permits.release(3)

    async def scenario() -> None:
        loader = BackgroundLoader(runtime)
        source: dict[str, Any] = {"store": store.path, "model_digest": store.manifest.digest}
        pending = [loader.attach(spec, **source) for spec in specs]
        results = await asyncio.gather(*pending, return_exceptions=True)
        assert [isinstance(f, AttachRefused) for f in results] == [False, False, True]

    run(scenario)
    assert len(function_ids(runtime)) == 3


def test_failed_attachment_does_not_block_the_next(
    runtime: SandboxRuntime, store: Store, gate: LoadGate
) -> None:
    bad, good = make_function_spec(store, [9], [0]), make_function_spec(store, [1], [0])
    gate.permits.release(2)

    async def scenario() -> None:
        loader = BackgroundLoader(runtime)
        source: dict[str, Any] = {"store": store.path, "model_digest": store.manifest.digest}
        pending = [loader.attach(spec, **source) for spec in (bad, good)]
        refused, attached = await asyncio.gather(*pending, return_exceptions=True)
        assert isinstance(refused, BadAttachment)
        assert not isinstance(attached, BaseException)

    run(scenario)
    assert good.id in function_ids(runtime)


def attachments(store: Store, specs: Sequence[FunctionSpec]) -> list[Attachment]:
    return [Attachment(spec, store.path, store.manifest.digest) for spec in specs]


def attach_all(
    runtime: SandboxRuntime, attached: Sequence[Attachment]
) -> list[dict[str, Any] | Exception]:
    results: list[dict[str, Any] | Exception] = []

    async def scenario() -> None:
        results.extend(await BackgroundLoader(runtime).attach_all(attached))

    run(scenario)
    return results


def test_function_that_is_being_loaded_does_not_come_after_its_store_was_detached(
    runtime: SandboxRuntime, store: Store, spec: FunctionSpec, gate: LoadGate, tmp_path: Path
) -> None:
    shutil.copytree(store.path, tmp_path / "other")
    loading, waiting, elsewhere = (make_function_spec(store, [1], [e]) for e in range(3))

    async def scenario() -> None:
        loader, digest = BackgroundLoader(runtime), store.manifest.digest
        several = loader.attach_all(attachments(store, [loading]))
        pending = [
            asyncio.create_task(several),
            asyncio.create_task(loader.attach(waiting, store=store.path, model_digest=digest)),
            asyncio.create_task(
                loader.attach(elsewhere, store=tmp_path / "other", model_digest=digest)
            ),
        ]
        await wait_until(lambda: gate.started == [loading.id])
        assert loader.detach_all(store.path) == [spec.id]
        gate.permits.release(3)
        first, second, third = await asyncio.gather(*pending, return_exceptions=True)
        assert [type(e) for e in (*first, second)] == [AttachRefused, AttachRefused]  # type: ignore[misc]
        assert not isinstance(third, BaseException)
        again, is_new = await loader.attach(waiting, store=store.path, model_digest=digest)
        assert (again["id"], is_new) == (waiting.id, True)

    run(scenario)
    assert gate.started == [loading.id, elsewhere.id, waiting.id]
    assert function_ids(runtime) == [elsewhere.id, waiting.id]


def test_loads_several_functions_before_it_attaches_the_first(
    runtime: SandboxRuntime, store: Store, spec: FunctionSpec, gate: LoadGate
) -> None:
    specs = [make_function_spec(store, [1], [expert]) for expert in range(2)]

    async def scenario() -> None:
        pending = asyncio.create_task(
            BackgroundLoader(runtime).attach_all(attachments(store, specs))
        )
        gate.permits.release()
        await wait_until(lambda: gate.started == [s.id for s in specs])
        assert function_ids(runtime) == [spec.id]
        gate.permits.release()
        statuses = await pending
        assert [s["id"] for s in statuses if isinstance(s, dict)] == [s.id for s in specs]

    run(scenario)
    assert function_ids(runtime) == [spec.id, *(s.id for s in specs)]


def test_attaches_no_more_functions_than_its_capacity(
    runtime: SandboxRuntime, store: Store, spec: FunctionSpec
) -> None:
    specs = [spec, *(make_function_spec(store, [1], [expert]) for expert in range(3))]
    *attached, refused = attach_all(runtime, attachments(store, specs))
    assert all(isinstance(status, dict) for status in attached)
    assert isinstance(refused, AttachRefused)
    assert len(function_ids(runtime)) == 3


def test_counts_functions_that_are_being_loaded_for_the_memory(
    store: Store, spec: FunctionSpec
) -> None:
    one, two = (make_function_spec(store, [1], [expert]) for expert in range(2))
    config = SandboxConfig(capacity=3, memory_bytes=function_size_bytes(one, store) * 3 // 2)
    runtime = SandboxRuntime(config, torch.device("cpu"))
    attached, refused = attach_all(runtime, attachments(store, (one, two)))
    assert isinstance(attached, dict)
    assert isinstance(refused, OutOfMemory)
    assert function_ids(runtime) == [one.id]


def test_attaches_a_function_once_that_is_asked_for_twice(
    runtime: SandboxRuntime, store: Store
) -> None:
    one = make_function_spec(store, [1], [0])
    bad = make_function_spec(store, [9], [0])
    first, refused, again = attach_all(runtime, attachments(store, (one, bad, one)))
    assert first == again
    assert isinstance(refused, BadAttachment)
    assert function_ids(runtime).count(one.id) == 1


def test_loads_one_at_a_time_where_copies_take_a_device_s_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = SandboxRuntime(
        SandboxConfig(capacity=3), torch.device("cpu"), uploader=Uploader(FakeCopyStream())
    )
    specs = [make_function_spec(store, [1], [expert]) for expert in range(2)]
    attached_when_loaded: list[list[str]] = []
    load = SandboxRuntime.load

    def noted(*args: Any, **source: Any) -> LoadedFunction:
        attached_when_loaded.append(function_ids(copying))
        return load(*args, **source)

    monkeypatch.setattr(SandboxRuntime, "load", noted)
    attach_all(copying, attachments(store, specs))
    assert attached_when_loaded == [[], [specs[0].id]]


def test_sandbox_process_answers_frames_while_loading(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, tmp_path: Path
) -> None:
    """The manifest is a pipe, so that loading blocks until the test writes to it."""
    os.mkfifo(tmp_path / MANIFEST_NAME)
    attachment = {
        "store": str(tmp_path),
        "model_digest": store.manifest.digest,
        "layers": [1],
        "experts": [0],
    }
    with sandbox(token=TOKEN, capacity=2) as sandbox_server, ThreadPoolExecutor(1) as pool:
        sandbox_server.attach(store, spec)
        pending = pool.submit(sandbox_server.http.put, "/v1/functions/other", json=attachment)
        with (tmp_path / MANIFEST_NAME).open("wb") as manifest:
            response = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=request_frame())
            assert response.status_code == 200
            assert not pending.done()
            manifest.write(b"{}")
        refused = pending.result(DEADLINE_S)
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "store")
