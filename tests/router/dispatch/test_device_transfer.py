"""A layer's way to the host, and its parts' way back: one wait, buffers that are kept.

The device is the CPU, which copies at once; what a copy that is late would do is shown by memory
whose marks carry the copies out.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from sandbox_processes import PreparedStore, StartSandbox
from torch import Tensor

from faasmoe_contracts.wire import OutputMode
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.device_transfer import BufferedTransfer, transfer_for

LAYER = 1


class UnpinnedMemory:
    """Host memory that is not pinned; notes what was asked for and waited for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.events: list[str] = []

    def empty(self, size_bytes: int) -> Tensor:
        self.sizes.append(size_bytes)
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def record_event(self) -> Callable[[], None]:
        self.events.append("mark")
        return lambda: self.events.append("wait")


@pytest.fixture
def memory() -> UnpinnedMemory:
    return UnpinnedMemory()


def inputs(n_rows: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_rows)
    return (
        torch.randn(n_rows, 32, generator=generator).to(dtype),
        torch.rand(n_rows, 8, generator=generator).topk(2).indices,
        torch.rand(n_rows, 2, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_lands_is_what_was_there(memory: UnpinnedMemory, dtype: torch.dtype) -> None:
    stage = BufferedTransfer(memory)
    for n_rows in (1, 700, 3):
        hidden, index, weight = inputs(n_rows, dtype=dtype)
        landed = stage.to_host(hidden, index, weight, while_waiting=lambda: None)
        assert torch.equal(landed.rows, hidden)
        assert landed.rows.is_contiguous()
        assert (landed.top_k_index == index.numpy()).all()
        assert (landed.top_k_weight == weight.float().numpy()).all()
        brought = stage.to_device(landed.rows * 2)
        assert torch.equal(brought, hidden * 2)
        assert brought.dtype == dtype


def test_rows_that_are_not_contiguous_land_in_order(memory: UnpinnedMemory) -> None:
    hidden, index, weight = inputs(6)
    strided = hidden.t().contiguous().t()  # [T, H]
    landed = BufferedTransfer(memory).to_host(strided, index, weight, while_waiting=lambda: None)
    assert torch.equal(landed.rows, hidden)


def test_a_layer_waits_once_behind_the_work_that_it_gave_the_device(memory: UnpinnedMemory) -> None:
    stage = BufferedTransfer(memory)
    stage.to_host(*inputs(4), while_waiting=lambda: memory.events.append("shared expert"))
    assert memory.events == ["mark", "shared expert", "wait"]


def test_memory_is_pinned_once_for_many_layers(memory: UnpinnedMemory) -> None:
    stage = BufferedTransfer(memory)
    for _ in range(50):
        hidden, index, weight = inputs(64)
        landed = stage.to_host(hidden, index, weight, while_waiting=lambda: None)
        for _ in range(3):
            stage.to_device(landed.rows)
    assert len(memory.sizes) == 6  # rows, indices, weights, three parts
    grown = inputs(4096)
    stage.to_host(*grown, while_waiting=lambda: None)
    assert memory.sizes[6:] == [grown[0].nbytes]


def test_what_was_pinned_in_inference_mode_serves_outside_of_it_too(memory: UnpinnedMemory) -> None:
    stage = BufferedTransfer(memory)
    with torch.inference_mode():
        stage.to_host(*inputs(3), while_waiting=lambda: None)
    hidden, index, weight = inputs(3)
    assert torch.equal(
        stage.to_host(hidden, index, weight, while_waiting=lambda: None).rows, hidden
    )


def test_a_part_has_a_buffer_of_its_own_until_the_next_layer_has_landed() -> None:
    memory = UnpinnedMemory()
    stage = BufferedTransfer(memory)
    stage.to_host(*inputs(3), while_waiting=lambda: None)
    parts = [torch.full((3, 32), float(n)) for n in range(4)]
    brought = [stage.to_device(part) for part in parts]
    for part in parts:
        part.fill_(-1)  # what a connection's buffer does with the next answer
    assert [part[0, 0].item() for part in brought] == [0, 1, 2, 3]
    assert len(memory.sizes) == 3 + len(parts)


def test_a_router_on_the_cpu_stages_nothing() -> None:
    assert transfer_for(torch.device("cpu")) is None


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", OutputMode)
def test_a_staged_layer_is_the_direct_one(
    sandbox: StartSandbox, prepared_store: PreparedStore, memory: UnpinnedMemory, mode: OutputMode
) -> None:
    store = prepared_store("mixtral")
    with sandbox(capacity=100) as sandbox_server:
        table = sandbox_server.attach_blocks(store, 3)
        direct = Dispatcher(store, table, mode=mode)
        staged = Dispatcher(store, table, mode=mode, device_transfer=BufferedTransfer(memory))
        done: list[str] = []
        for n_rows in (1, 19, 300, 2):
            expected = direct.compute(LAYER, *inputs(n_rows))
            got = staged.compute(
                LAYER, *inputs(n_rows), while_waiting=lambda: done.append("shared")
            )
            assert torch.equal(got, expected)
        assert done == ["shared"] * 4
        assert memory.events.count("wait") == 4
        direct.close()
        staged.close()
