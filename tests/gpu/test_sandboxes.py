"""Sandbox processes on one device: several at once, a full device, forks of a zygote."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from raw_http import request_frame
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, make_function_spec
from zygote_process import eventually, is_ready, running_zygote

from faasmoe_contracts.store import Store
from faasmoe_expert.server.memory_budget import RESERVE_BYTES

MIB = 1 << 20


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts, hidden size 32, float32: what `rawhttp.frame` is for."""
    return prepared_store("mixtral")


def free_bytes() -> int:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free


def response_bytes(box: SandboxProcess, store: Store) -> bytes:
    spec = make_function_spec(store, [0], [0, 1, 2])
    box.attach(store, spec)
    answer = box.http.post(f"/v1/functions/{spec.id}", content=request_frame(n_rows=9))
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture
def fill() -> Iterator[list[torch.Tensor]]:
    """Holds device memory that a test allocates."""
    held: list[torch.Tensor] = []
    yield held
    held.clear()
    torch.cuda.empty_cache()


def test_many_sandboxes_share_one_device(
    sandbox: StartSandbox, store: Store, cuda: torch.device
) -> None:
    before = free_bytes()
    with ExitStack() as stack:
        boxes = [stack.enter_context(sandbox(device="cuda", capacity=4)) for _ in range(4)]
        assert len({response_bytes(box, store) for box in boxes}) == 1
        reported = [box.http.get("/v1/functions").json()["sandbox"] for box in boxes]
        assert {box["device"] for box in reported} == {str(cuda)}
        assert all(box["memory"]["used_bytes"] > 0 for box in reported)
    assert free_bytes() >= before - 64 * MIB


def test_repeated_attach_and_detach_leak_no_device_memory(
    sandbox: StartSandbox, store: Store
) -> None:
    with sandbox(device="cuda", capacity=4) as box:
        spec = make_function_spec(store, [0, 1, 2], range(8))
        response_bytes(box, store)
        for _ in range(3):  # the first ones allocate memory that is kept for good
            box.attach(store, spec)
            box.http.delete(f"/v1/functions/{spec.id}")
        before = free_bytes()
        for _ in range(100):
            box.attach(store, spec)
            assert box.http.delete(f"/v1/functions/{spec.id}").status_code == 204
        assert free_bytes() >= before - 4 * MIB


@pytest.mark.usefixtures("real")
def test_full_device_rejects_functions_before_it_runs_out(
    sandbox: StartSandbox, store: Store, fill: list[torch.Tensor]
) -> None:
    with sandbox(device="cuda", capacity=4) as box:
        response_bytes(box, store)
        left = free_bytes() - RESERVE_BYTES // 2
        fill.append(torch.empty(left, dtype=torch.uint8, device="cuda"))
        spec = make_function_spec(store, [1], range(8))
        body = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
        refused = box.http.put(f"/v1/functions/{spec.id}", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "out_of_memory")
        assert "expected at most 0, what is left of" in error["message"]
        attached = make_function_spec(store, [0], [0, 1, 2])  # keeps serving
        answer = box.http.post(f"/v1/functions/{attached.id}", content=request_frame())
        assert answer.status_code == 200
        fill.clear()
        torch.cuda.empty_cache()
        box.attach(store, spec)


@pytest.mark.usefixtures("real")
def test_forked_sandbox_uses_the_device(store: Store, tmp_path: Path) -> None:
    variables = {"FAASMOE_WARMUP_STORE": str(store.path), "FAASMOE_DEVICE": "auto"}
    command = ("-m", "faasmoe_expert.zygote")
    with running_zygote(*command, output=tmp_path / "log", **variables) as zygote:
        with zygote.client() as client:
            for name in ("s1", "s2"):
                address = client.spawn(name)["address"]
                eventually(partial(is_ready, address))
        log = (tmp_path / "log").read_text()
    assert log.count("device cuda") == 2, json.dumps(log)
