"""Memory is counted, refused before it runs out, and given back."""

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
from faasmoe_expert.server.memory_budget import MemoryBudget, memory_budget_for
from faasmoe_expert.server.runtime import SandboxRuntime

CPU = torch.device("cpu")


class FakeDeviceMemory:
    """A device of which others take some; notes when memory was given back."""

    def __init__(self, free_bytes: int) -> None:
        self.free = free_bytes
        self.n_released = 0

    def free_bytes(self) -> int:
        return self.free

    def release_cached(self) -> None:
        self.n_released += 1


class ExhaustedCopyStream(FakeCopyStream):
    """Its device runs out of memory at the n-th copy."""

    def __init__(self, n_copies: int) -> None:
        self.left = n_copies

    def copy_async(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().copy_async(target, source)


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


def size_of(store: Store, experts: Sequence[int]) -> int:
    return store.manifest.layers[0].expert_bytes * len(experts)


def attach(sandbox: SandboxRuntime, store: Store, spec: FunctionSpec) -> None:
    sandbox.attach(spec, store=store.path, model_digest=store.manifest.digest)


def reported_memory(sandbox: SandboxRuntime) -> tuple[int | None, int]:
    reported = sandbox.list_functions()["sandbox"]["memory"]
    return reported["limit_bytes"], reported["used_bytes"]


def test_without_a_limit_the_host_takes_everything() -> None:
    memory = memory_budget_for(CPU, None)
    memory.check_fits(1 << 60)
    assert memory.limit_bytes() is None


def test_a_setting_limits_all_functions_together() -> None:
    memory = memory_budget_for(CPU, 100)
    memory.check_fits(60)
    memory.add(60)
    memory.check_fits(40)
    with pytest.raises(OutOfMemory) as refused:
        memory.check_fits(41)
    assert str(refused.value) == (
        "memory: got a function of 41 bytes, expected at most 40, what is left of 100 beside the "
        "functions that are attached"
    )
    assert refused.value.field == "memory"
    memory.release(60)
    memory.check_fits(100)


def test_a_device_leaves_its_reserve_free() -> None:
    memory = MemoryBudget(None, FakeDeviceMemory(100), reserve_bytes=30)
    assert memory.limit_bytes() == 70
    memory.check_fits(70)
    with pytest.raises(OutOfMemory, match="got a function of 71 bytes, expected at most 70"):
        memory.check_fits(71)


def test_what_others_take_of_a_device_is_seen_at_the_next_attach() -> None:
    device = FakeDeviceMemory(100)
    memory = MemoryBudget(None, device, reserve_bytes=10)
    memory.add(20)
    device.free = 15
    assert memory.limit_bytes() == 25
    with pytest.raises(OutOfMemory, match="expected at most 5, what is left of 25"):
        memory.check_fits(6)
    device.free = 0
    assert memory.limit_bytes() == 20


def test_the_smaller_of_setting_and_device_counts() -> None:
    assert MemoryBudget(50, FakeDeviceMemory(100), reserve_bytes=0).limit_bytes() == 50
    assert MemoryBudget(500, FakeDeviceMemory(100), reserve_bytes=0).limit_bytes() == 100


def test_attaching_takes_and_detaching_gives_back(store: Store) -> None:
    device = FakeDeviceMemory(1 << 40)
    memory = MemoryBudget(None, device, reserve_bytes=0)
    sandbox = SandboxRuntime(
        SandboxConfig(capacity=4), CPU, memory_budget=memory, uploader=Uploader(FakeCopyStream())
    )
    spec = make_function_spec(store, [0], [0, 1])
    attach(sandbox, store, spec)
    attach(sandbox, store, spec)  # again: it is the same
    assert reported_memory(sandbox)[1] == size_of(store, [0, 1])
    sandbox.detach(spec.id)
    assert reported_memory(sandbox)[1] == 0
    assert device.n_released == 1


def test_what_is_refused_changes_nothing_and_room_lets_it_in(store: Store) -> None:
    config = SandboxConfig(capacity=4, memory_bytes=size_of(store, [0, 1, 2]))
    sandbox = SandboxRuntime(config, CPU)
    first, second = make_function_spec(store, [0], [0, 1]), make_function_spec(store, [0], [2, 3])
    attach(sandbox, store, first)
    before = sandbox.list_functions()
    with pytest.raises(OutOfMemory):
        attach(sandbox, store, second)
    assert sandbox.list_functions() == before
    sandbox.detach(first.id)
    attach(sandbox, store, second)


def test_a_device_that_runs_out_half_way_keeps_nothing(store: Store) -> None:
    device = FakeDeviceMemory(1 << 40)
    memory = MemoryBudget(None, device, reserve_bytes=0)
    lane = ExhaustedCopyStream(1)
    sandbox = SandboxRuntime(SandboxConfig(), CPU, memory_budget=memory, uploader=Uploader(lane))
    spec = make_function_spec(store, [0], [0, 1])
    with pytest.raises(OutOfMemory, match=r"memory: cannot be had .*CUDA out of memory"):
        attach(sandbox, store, spec)
    assert (reported_memory(sandbox)[1], device.n_released) == (0, 1)
    lane.left = 100
    attach(sandbox, store, spec)


def test_the_refusal_is_a_503_that_names_the_field(sandbox: StartSandbox, store: Store) -> None:
    limit = size_of(store, [0])
    with sandbox(capacity=4, memory_bytes=limit) as sandbox_server:
        spec = make_function_spec(store, [0], [0, 1])
        body = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
        answer = sandbox_server.http.put(f"/v1/functions/{spec.id}", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["field"]) == (
            503,
            "out_of_memory",
            "memory",
        )
        assert f"expected at most {limit}" in error["message"]
        sandbox_server.attach(store, make_function_spec(store, [0], [5]))
        said = sandbox_server.http.get("/v1/functions").json()["sandbox"]["memory"]
        assert said == {"limit_bytes": limit, "used_bytes": limit}
