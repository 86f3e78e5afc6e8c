"""The emulated device detects races that a real one shows only rarely."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from faasmoe_expert.functions.transfer import CudaCopyStream
from faasmoe_router.dispatch.device_transfer import BufferedTransfer, PinnedMemory

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def ones(cuda: torch.device) -> Tensor:
    return torch.ones(4, device=cuda)


def pinned(value: float) -> Tensor:
    return torch.empty(4, pin_memory=True).fill_(value)


def test_copied_data_is_garbage_until_it_is_waited_for(ones: Tensor, cuda: torch.device) -> None:
    host = pinned(5.0)
    host.copy_(ones, non_blocking=True)
    assert host.isnan().all()
    PinnedMemory(cuda).record_event()()
    assert host.eq(1).all()


def test_memory_overwritten_before_its_copy_is_detected(cuda: torch.device) -> None:
    from emulated.streams import Race

    host = pinned(5.0)
    there = host.to(cuda, non_blocking=True)
    mark = PinnedMemory(cuda).record_event()
    host.fill_(6.0)
    with pytest.raises(Race, match="overwritten"):
        mark()
    assert there.cpu().eq(5).all()


def test_event_completes_only_earlier_work(ones: Tensor, cuda: torch.device) -> None:
    first, second = pinned(0.0), pinned(0.0)
    first.copy_(ones, non_blocking=True)
    mark = PinnedMemory(cuda).record_event()
    second.copy_(ones, non_blocking=True)
    mark()
    assert first.eq(1).all()
    assert second.isnan().all()
    torch.cuda.synchronize()


def test_another_stream_sees_a_copy_after_waiting(ones: Tensor, cuda: torch.device) -> None:
    lane = CudaCopyStream(cuda)
    bytes_there = ones.view(torch.uint8)
    wait = lane.copy_async(bytes_there, pinned(3.0).view(torch.uint8))
    assert (ones + 0).cpu().isnan().all()
    wait()
    assert ones.cpu().eq(3).all()


@pytest.mark.parametrize(
    "mix",
    [
        pytest.param(lambda there: there + torch.ones(4), id="sum"),
        pytest.param(lambda there: there.index_add_(0, torch.arange(4), there), id="index"),
        pytest.param(lambda there: torch.mm(there[None], torch.ones(4, 1)), id="product"),
    ],
)
def test_host_and_device_tensors_do_not_mix(mix: Callable[[Tensor], Tensor], ones: Tensor) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        mix(ones)


def test_numpy_cannot_access_the_device(ones: Tensor) -> None:
    with pytest.raises(TypeError, match="copy it to host memory first"):
        ones.numpy()


def test_premature_reuse_of_a_host_buffer_is_detected(cuda: torch.device) -> None:
    """Shows why each layer waits."""
    from emulated.streams import Race

    stage = BufferedTransfer(PinnedMemory(cuda))
    stage.to_device(torch.ones(4))
    stage._n_transferred = 0
    stage.to_device(torch.zeros(4))
    with pytest.raises(Race, match="overwritten"):
        torch.cuda.synchronize()
