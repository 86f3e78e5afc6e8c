"""Transfers of a layer's inputs to the host and its outputs back: one wait, reused buffers.

The device is the CPU, which copies synchronously, with host memory that records its events.
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
    """Host memory that is not pinned and records allocations and events."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.events: list[str] = []

    def empty(self, size_bytes: int) -> Tensor:
        self.sizes.append(size_bytes)
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def record_event(self) -> Callable[[], None]:
        self.events.append("record")
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
def test_transfers_preserve_values(memory: UnpinnedMemory, dtype: torch.dtype) -> None:
    transfer = BufferedTransfer(memory)
    for n_rows in (1, 700, 3):
        hidden, index, weight = inputs(n_rows, dtype=dtype)
        host_inputs = transfer.to_host(hidden, index, weight, while_waiting=lambda: None)
        assert torch.equal(host_inputs.rows, hidden)
        assert host_inputs.rows.is_contiguous()
        assert (host_inputs.top_k_index == index.numpy()).all()
        assert (host_inputs.top_k_weight == weight.float().numpy()).all()
        on_device = transfer.to_device(host_inputs.rows * 2)
        assert torch.equal(on_device, hidden * 2)
        assert on_device.dtype == dtype


def test_non_contiguous_rows_are_copied_in_order(memory: UnpinnedMemory) -> None:
    hidden, index, weight = inputs(6)
    strided = hidden.t().contiguous().t()  # [T, H]
    host_inputs = BufferedTransfer(memory).to_host(
        strided, index, weight, while_waiting=lambda: None
    )
    assert torch.equal(host_inputs.rows, hidden)


def test_to_host_waits_once_after_enqueueing_overlapped_work(memory: UnpinnedMemory) -> None:
    transfer = BufferedTransfer(memory)
    transfer.to_host(*inputs(4), while_waiting=lambda: memory.events.append("shared expert"))
    assert memory.events == ["record", "shared expert", "wait"]


def test_buffers_are_allocated_once_for_many_layers(memory: UnpinnedMemory) -> None:
    transfer = BufferedTransfer(memory)
    for _ in range(50):
        hidden, index, weight = inputs(64)
        host_inputs = transfer.to_host(hidden, index, weight, while_waiting=lambda: None)
        for _ in range(3):
            transfer.to_device(host_inputs.rows)
    assert len(memory.sizes) == 6  # rows, indices, weights, three outputs
    grown = inputs(4096)
    transfer.to_host(*grown, while_waiting=lambda: None)
    assert memory.sizes[6:] == [grown[0].nbytes]


def test_buffer_allocated_in_inference_mode_is_usable_outside_it(memory: UnpinnedMemory) -> None:
    transfer = BufferedTransfer(memory)
    with torch.inference_mode():
        transfer.to_host(*inputs(3), while_waiting=lambda: None)
    hidden, index, weight = inputs(3)
    assert torch.equal(
        transfer.to_host(hidden, index, weight, while_waiting=lambda: None).rows, hidden
    )


def test_each_output_has_a_separate_buffer_until_the_next_layer() -> None:
    memory = UnpinnedMemory()
    transfer = BufferedTransfer(memory)
    transfer.to_host(*inputs(3), while_waiting=lambda: None)
    outputs = [torch.full((3, 32), float(n)) for n in range(4)]
    on_device = [transfer.to_device(output) for output in outputs]
    for output in outputs:
        output.fill_(-1)  # as a connection's buffer does with the next response
    assert [output[0, 0].item() for output in on_device] == [0, 1, 2, 3]
    assert len(memory.sizes) == 3 + len(outputs)


def test_router_on_the_cpu_needs_no_transfer() -> None:
    assert transfer_for(torch.device("cpu")) is None


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", OutputMode)
def test_layer_with_buffered_transfer_equals_the_direct_one(
    sandbox: StartSandbox, prepared_store: PreparedStore, memory: UnpinnedMemory, mode: OutputMode
) -> None:
    store = prepared_store("mixtral")
    with sandbox(capacity=100) as sandbox_server:
        table = sandbox_server.attach_blocks(store, 3)
        direct = Dispatcher(store, table, mode=mode)
        buffered = Dispatcher(store, table, mode=mode, device_transfer=BufferedTransfer(memory))
        work_done: list[str] = []
        for n_rows in (1, 19, 300, 2):
            expected = direct.compute(LAYER, *inputs(n_rows))
            got = buffered.compute(
                LAYER, *inputs(n_rows), while_waiting=lambda: work_done.append("shared")
            )
            assert torch.equal(got, expected)
        assert work_done == ["shared"] * 4
        assert memory.events.count("wait") == 4
        direct.close()
        buffered.close()
