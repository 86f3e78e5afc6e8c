"""Memory is counted, limited and released."""

from collections.abc import Callable, Sequence

import pytest
import torch
from fake_copy_streams import FakeCopyStream
from sandbox_processes import PreparedStore, StartSandbox, make_function_spec
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import OutOfMemory
from faasmoe_expert.functions.transfer import Uploader
from faasmoe_expert.server.memory_budget import SandboxMemoryBudget, memory_budget_for
from faasmoe_expert.server.runtime import SandboxRuntime

CPU = torch.device("cpu")


class FakeDeviceMemory:
    """A device shared with other processes; counts releases of cached memory."""

    def __init__(self, free_bytes: int) -> None:
        self.available_bytes = free_bytes
        self.n_released = 0

    def free_bytes(self) -> int:
        return self.available_bytes

    def release_cached(self) -> None:
        self.n_released += 1


class ExhaustedCopyStream(FakeCopyStream):
    """A device that runs out of memory after `n_copies` copies."""

    def __init__(self, n_copies: int) -> None:
        self.remaining = n_copies

    def copy_async(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        self.remaining -= 1
        if self.remaining < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().copy_async(target, source)


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


def block_size_bytes(store: Store, experts: Sequence[int]) -> int:
    return store.manifest.layers[0].expert_bytes * len(experts)


def attach(sandbox: SandboxRuntime, store: Store, spec: FunctionSpec) -> None:
    sandbox.attach(spec, store=store.path, model_digest=store.manifest.digest)


def reported_memory(sandbox: SandboxRuntime) -> tuple[int | None, int]:
    reported = sandbox.list_functions()["sandbox"]["memory"]
    return reported["limit_bytes"], reported["used_bytes"]


def test_host_is_unlimited_by_default() -> None:
    budget = memory_budget_for(CPU, None)
    budget.check_fits(1 << 60)
    assert budget.limit_bytes() is None


def test_limit_applies_to_all_functions_together() -> None:
    budget = memory_budget_for(CPU, 100)
    budget.check_fits(60)
    budget.add(60)
    budget.check_fits(40)
    with pytest.raises(OutOfMemory) as refused:
        budget.check_fits(41)
    assert str(refused.value) == (
        "memory: got a function of 41 bytes, expected at most 40, what attached functions "
        "leave of 100"
    )
    assert refused.value.field == "memory"
    budget.release(60)
    budget.check_fits(100)


def test_keeps_the_reserve_free_on_a_device() -> None:
    budget = SandboxMemoryBudget(None, FakeDeviceMemory(100), reserve_bytes=30)
    assert budget.limit_bytes() == 70
    budget.check_fits(70)
    with pytest.raises(OutOfMemory, match="got a function of 71 bytes, expected at most 70"):
        budget.check_fits(71)


def test_limit_follows_the_free_memory_of_a_shared_device() -> None:
    device = FakeDeviceMemory(100)
    budget = SandboxMemoryBudget(None, device, reserve_bytes=10)
    budget.add(20)
    device.available_bytes = 15
    assert budget.limit_bytes() == 25
    with pytest.raises(
        OutOfMemory, match="expected at most 5, what attached functions leave of 25"
    ):
        budget.check_fits(6)
    device.available_bytes = 0
    assert budget.limit_bytes() == 20


def test_smaller_of_setting_and_free_memory_applies() -> None:
    assert SandboxMemoryBudget(50, FakeDeviceMemory(100), reserve_bytes=0).limit_bytes() == 50
    assert SandboxMemoryBudget(500, FakeDeviceMemory(100), reserve_bytes=0).limit_bytes() == 100


def test_attach_counts_memory_and_detach_releases_it(store: Store) -> None:
    device = FakeDeviceMemory(1 << 40)
    budget = SandboxMemoryBudget(None, device, reserve_bytes=0)
    sandbox = SandboxRuntime(
        SandboxConfig(capacity=4), CPU, memory_budget=budget, uploader=Uploader(FakeCopyStream())
    )
    spec = make_function_spec(store, [0], [0, 1])
    attach(sandbox, store, spec)
    attach(sandbox, store, spec)  # idempotent
    assert reported_memory(sandbox)[1] == block_size_bytes(store, [0, 1])
    sandbox.detach(spec.id)
    assert reported_memory(sandbox)[1] == 0
    assert device.n_released == 1


def test_rejected_attachment_changes_nothing_and_succeeds_after_a_detach(store: Store) -> None:
    config = SandboxConfig(capacity=4, memory_bytes=block_size_bytes(store, [0, 1, 2]))
    sandbox = SandboxRuntime(config, CPU)
    first, second = make_function_spec(store, [0], [0, 1]), make_function_spec(store, [0], [2, 3])
    attach(sandbox, store, first)
    before = sandbox.list_functions()
    with pytest.raises(OutOfMemory):
        attach(sandbox, store, second)
    assert sandbox.list_functions() == before
    sandbox.detach(first.id)
    attach(sandbox, store, second)


def test_releases_everything_when_the_device_runs_out_of_memory(store: Store) -> None:
    device = FakeDeviceMemory(1 << 40)
    budget = SandboxMemoryBudget(None, device, reserve_bytes=0)
    stream = ExhaustedCopyStream(1)
    sandbox = SandboxRuntime(SandboxConfig(), CPU, memory_budget=budget, uploader=Uploader(stream))
    spec = make_function_spec(store, [0], [0, 1])
    with pytest.raises(OutOfMemory, match=r"memory: allocation failed .*CUDA out of memory"):
        attach(sandbox, store, spec)
    assert (reported_memory(sandbox)[1], device.n_released) == (0, 1)
    stream.remaining = 100
    attach(sandbox, store, spec)


def test_exceeding_the_limit_returns_503_with_the_field(
    sandbox: StartSandbox, store: Store
) -> None:
    limit = block_size_bytes(store, [0])
    with sandbox(capacity=4, memory_bytes=limit) as sandbox_server:
        spec = make_function_spec(store, [0], [0, 1])
        body = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
        response = sandbox_server.http.put(f"/v1/functions/{spec.id}", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["field"]) == (
            503,
            "out_of_memory",
            "memory",
        )
        assert f"expected at most {limit}" in error["message"]
        sandbox_server.attach(store, make_function_spec(store, [0], [5]))
        reported = sandbox_server.http.get("/v1/functions").json()["sandbox"]["memory"]
        assert reported == {"limit_bytes": limit, "used_bytes": limit}
