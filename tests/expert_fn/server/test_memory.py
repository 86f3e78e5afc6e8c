"""Memory is counted, refused before it runs out, and given back."""

from collections.abc import Callable, Sequence

import pytest
import torch
from lanes import HostLane
from sandboxes import OpenSandbox, PreparedStore, spec_of
from torch import Tensor

from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import OutOfMemory
from faasmoe_expert.functions.upload import Uploader
from faasmoe_expert.server.memory import FunctionMemory, memory_of
from faasmoe_expert.server.sandbox import Sandbox
from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec

CPU = torch.device("cpu")


class Shared:
    """A device of which others take some; notes when memory was given back."""

    def __init__(self, free_bytes: int) -> None:
        self.free = free_bytes
        self.n_given_back = 0

    def free_bytes(self) -> int:
        return self.free

    def give_back(self) -> None:
        self.n_given_back += 1


class FullLane(HostLane):
    """Its device runs out of memory at the n-th copy."""

    def __init__(self, n_copies: int) -> None:
        self.left = n_copies

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().copy(target, source)


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


def size_of(store: Store, experts: Sequence[int]) -> int:
    return store.manifest.layers[0].expert_bytes * len(experts)


def attach(sandbox: Sandbox, store: Store, spec: FunctionSpec) -> None:
    sandbox.attach(spec, store=store.path, model_digest=store.manifest.digest)


def memory_said(sandbox: Sandbox) -> tuple[int | None, int]:
    said = sandbox.list_functions()["sandbox"]["memory"]
    return said["limit_bytes"], said["used_bytes"]


def test_without_a_limit_the_host_takes_everything() -> None:
    memory = memory_of(CPU, None)
    memory.check(1 << 60)
    assert memory.limit_bytes() is None


def test_a_setting_limits_all_functions_together() -> None:
    memory = memory_of(CPU, 100)
    memory.check(60)
    memory.take(60)
    memory.check(40)
    with pytest.raises(OutOfMemory) as refused:
        memory.check(41)
    assert str(refused.value) == (
        "memory: got a function of 41 bytes, expected at most 40, what is left of 100 beside the "
        "functions that are attached"
    )
    assert refused.value.field == "memory"
    memory.release(60)
    memory.check(100)


def test_a_device_leaves_its_reserve_free() -> None:
    memory = FunctionMemory(None, Shared(100), reserve_bytes=30)
    assert memory.limit_bytes() == 70
    memory.check(70)
    with pytest.raises(OutOfMemory, match="got a function of 71 bytes, expected at most 70"):
        memory.check(71)


def test_what_others_take_of_a_device_is_seen_at_the_next_attach() -> None:
    device = Shared(100)
    memory = FunctionMemory(None, device, reserve_bytes=10)
    memory.take(20)
    device.free = 15
    assert memory.limit_bytes() == 25
    with pytest.raises(OutOfMemory, match="expected at most 5, what is left of 25"):
        memory.check(6)
    device.free = 0
    assert memory.limit_bytes() == 20


def test_the_smaller_of_setting_and_device_counts() -> None:
    assert FunctionMemory(50, Shared(100), reserve_bytes=0).limit_bytes() == 50
    assert FunctionMemory(500, Shared(100), reserve_bytes=0).limit_bytes() == 100


def test_attaching_takes_and_detaching_gives_back(store: Store) -> None:
    device = Shared(1 << 40)
    memory = FunctionMemory(None, device, reserve_bytes=0)
    sandbox = Sandbox(SandboxConfig(capacity=4), CPU, memory=memory, uploader=Uploader(HostLane()))
    spec = spec_of(store, [0], [0, 1])
    attach(sandbox, store, spec)
    attach(sandbox, store, spec)  # again: it is the same
    assert memory_said(sandbox)[1] == size_of(store, [0, 1])
    sandbox.detach(spec.id)
    assert memory_said(sandbox)[1] == 0
    assert device.n_given_back == 1


def test_what_is_refused_changes_nothing_and_room_lets_it_in(store: Store) -> None:
    config = SandboxConfig(capacity=4, memory_bytes=size_of(store, [0, 1, 2]))
    sandbox = Sandbox(config, CPU)
    first, second = spec_of(store, [0], [0, 1]), spec_of(store, [0], [2, 3])
    attach(sandbox, store, first)
    before = sandbox.list_functions()
    with pytest.raises(OutOfMemory):
        attach(sandbox, store, second)
    assert sandbox.list_functions() == before
    sandbox.detach(first.id)
    attach(sandbox, store, second)


def test_a_device_that_runs_out_half_way_keeps_nothing(store: Store) -> None:
    device = Shared(1 << 40)
    memory = FunctionMemory(None, device, reserve_bytes=0)
    lane = FullLane(1)
    sandbox = Sandbox(SandboxConfig(), CPU, memory=memory, uploader=Uploader(lane))
    spec = spec_of(store, [0], [0, 1])
    with pytest.raises(OutOfMemory, match=r"memory: cannot be had .*CUDA out of memory"):
        attach(sandbox, store, spec)
    assert (memory_said(sandbox)[1], device.n_given_back) == (0, 1)
    lane.left = 100
    attach(sandbox, store, spec)


def test_the_refusal_is_a_503_that_names_the_field(sandbox: OpenSandbox, store: Store) -> None:
    limit = size_of(store, [0])
    with sandbox(capacity=4, memory_bytes=limit) as box:
        spec = spec_of(store, [0], [0, 1])
        body = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
        answer = box.http.put(f"/v1/functions/{spec.id}", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["field"]) == (
            503,
            "out_of_memory",
            "memory",
        )
        assert f"expected at most {limit}" in error["message"]
        box.attach(store, spec_of(store, [0], [5]))
        said = box.http.get("/v1/functions").json()["sandbox"]["memory"]
        assert said == {"limit_bytes": limit, "used_bytes": limit}
