"""A sandbox rejects what exceeds its limits and keeps serving."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_http import DEADLINE_S, HIDDEN, TOKEN, post_request, read_response, request_frame
from sandbox_processes import SandboxProcess, StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import MAX_FRAME_BYTES
from faasmoe_expert.errors import SandboxOverloaded
from faasmoe_expert.server.http import ReadLimits

MAX_FRAMES = 4


@pytest.fixture
def limited_sandbox(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> Iterator[SandboxProcess]:
    settings = {"max_frames": MAX_FRAMES, "max_bodies_bytes": MAX_FRAME_BYTES}
    with sandbox(token=TOKEN, **settings) as sandbox_server:
        sandbox_server.attach(store, spec)
        yield sandbox_server
        assert (
            sandbox_server.http.post(
                f"/v1/functions/{spec.id}", content=request_frame()
            ).status_code
            == 200
        )
        assert "Traceback" not in sandbox_server.log.read_text()


def connect(sandbox_server: SandboxProcess) -> socket.socket:
    host, port = sandbox_server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60))
def test_read_limits_are_never_exceeded_and_fully_released(
    steps: list[tuple[int, int]],
) -> None:
    limits = ReadLimits(max_frames=3, max_bytes=100)
    acquired: list[int] = []
    for first, more in steps:
        try:
            limits.acquire(first)
        except SandboxOverloaded:
            if acquired:
                limits.release(acquired.pop(0))
            continue
        try:
            limits.extend(more)
        except SandboxOverloaded:
            limits.release(first)
        else:
            acquired.append(first + more)
        assert len(acquired) <= 3
        assert sum(acquired) <= 100
    for size in acquired:
        limits.release(size)
    limits.acquire(100)


def test_rejects_one_body_too_many_and_answers_the_others(
    limited_sandbox: SandboxProcess, spec: FunctionSpec
) -> None:
    request = post_request(spec.id, request_frame())
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(limited_sandbox)) for _ in range(MAX_FRAMES)]
        for client in clients:
            client.sendall(request[:-1])
        assert limited_sandbox.http.get("/healthz").status_code == 200  # so all of them were read
        last = stack.enter_context(connect(limited_sandbox))
        last.sendall(request)
        status, headers, body = read_response(last)
        assert (status, headers["connection"]) == (429, "close")
        assert b'"code": "overloaded"' in body
        assert b'"field": "frames"' in body
        for client in clients:
            client.sendall(request[-1:])
            assert read_response(client)[0] == 200


def test_counts_announced_bodies_before_they_arrive(
    limited_sandbox: SandboxProcess, spec: FunctionSpec
) -> None:
    request = post_request(spec.id, request_frame())
    with connect(limited_sandbox) as greedy, connect(limited_sandbox) as other:
        greedy.sendall(post_request(spec.id, bytes(MAX_FRAME_BYTES - 10))[:1000])
        assert limited_sandbox.http.get("/healthz").status_code == 200
        other.sendall(request)
        status, _, body = read_response(other)
        assert (status, b'"field": "body"' in body) == (429, True)
    with connect(limited_sandbox) as next_client:  # the greedy client has disconnected
        next_client.sendall(request)
        assert read_response(next_client)[0] == 200


def test_out_of_memory_rejects_the_frame_and_later_frames_succeed(
    limited_sandbox: SandboxProcess, spec: FunctionSpec
) -> None:
    process = psutil.Process(limited_sandbox.process.pid)
    n_pairs = 400_000  # 51 MB of gathered rows
    large = request_frame(
        n_rows=1000,
        pair_row=np.sort(np.arange(n_pairs, dtype=np.int32) % 1000),
        pair_expert=np.zeros(n_pairs, dtype=np.int32),
        pair_weight=np.ones(n_pairs, dtype=np.float32),
    )
    path = f"/v1/functions/{spec.id}"
    assert HIDDEN * 4 * n_pairs > 48 << 20
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + (24 << 20), -1))
    response = limited_sandbox.http.post(path, content=large)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "out_of_memory")
    assert limited_sandbox.http.post(path, content=request_frame()).status_code == 200
    process.rlimit(resource.RLIMIT_AS, (-1, -1))
    assert limited_sandbox.http.post(path, content=large).status_code == 200


def test_rejects_a_corrupted_block_when_attaching_and_computing(
    sandbox: StartSandbox, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("damaged") / "store"
    shutil.copytree(store.path, copy)
    path = copy / store.layer_entry(0).file
    first, second = make_function_spec(store, [0], [0, 1]), make_function_spec(store, [0], [6, 7])

    def flip(offset: int) -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)

    last = path.stat().st_size - 1  # in the last expert of a tensor
    with sandbox(token=TOKEN, capacity=4) as sandbox_server:
        body = {"store": str(copy), "model_digest": store.manifest.digest}
        for spec in (first, second):
            attached = sandbox_server.http.put(
                f"/v1/functions/{spec.id}", json={**body, **spec.to_json()}
            )
            assert attached.status_code == 201
        content = {spec.id: request_frame(expert=spec.experts[-1]) for spec in (first, second)}

        def codes() -> list[str]:
            responses = [
                sandbox_server.http.post(f"/v1/functions/{name}", content=data)
                for name, data in content.items()
            ]
            return ["ok" if a.status_code == 200 else a.json()["error"]["code"] for a in responses]

        assert codes() == ["ok", "ok"]
        flip(last)
        assert codes() == ["ok", "corrupted"]
        assert sandbox_server.http.delete(f"/v1/functions/{second.id}").status_code == 204
        refused = sandbox_server.http.put(
            f"/v1/functions/{second.id}", json={**body, **second.to_json()}
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "corrupted"
        assert "expert 7" in refused.json()["error"]["message"]
        flip(last)
        assert (
            sandbox_server.http.put(
                f"/v1/functions/{second.id}", json={**body, **second.to_json()}
            ).status_code
            == 201
        )
        assert codes() == ["ok", "ok"]
