"""Outputs are reduced in a fixed order, whenever they arrive."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from faasmoe_contracts.wire import OutputMode
from faasmoe_router.dispatch.layer_batch import Group, group_pairs, new_reducer

INDEX = np.array([[0, 2], [1, 2], [3, 0], [9, 9]])  # [T, k]; the last row has no expert
WEIGHT = np.ones((4, 2), dtype=np.float32)  # [T, k]
FUNCTION_OF = np.array([0, 0, 1, 2], dtype=np.int32)
SHAPE = torch.Size((4, 3))  # [T, H]


def groups() -> list[Group]:
    return group_pairs(INDEX, WEIGHT, FUNCTION_OF, max_rows=2)


def outputs(mode: OutputMode, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = [len(g.pair_slot) if mode is OutputMode.UNREDUCED else len(g.rows) for g in groups()]
    return [(torch.randn(n, 3, generator=generator) * 1e3).to(dtype) for n in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", OutputMode)
def test_result_does_not_depend_on_the_order_of_arrival(
    mode: OutputMode, dtype: torch.dtype
) -> None:
    results = []
    for order in itertools.permutations(range(len(groups()))):
        reducer = new_reducer(SHAPE, dtype, mode=mode, top_k=2)
        for position in order:
            reducer.add(position, groups()[position], outputs(mode, dtype)[position])
        results.append(reducer.result())
    assert all(torch.equal(r, results[0]) for r in results)
    assert results[0].dtype == dtype


@pytest.mark.parametrize("mode", OutputMode)
def test_sum_of_16_bit_outputs_is_not_rounded_to_16_bits(mode: OutputMode) -> None:
    wide = new_reducer(SHAPE, torch.float32, mode=mode, top_k=2)
    narrow = new_reducer(SHAPE, torch.bfloat16, mode=mode, top_k=2)
    for position, output in enumerate(outputs(mode, torch.bfloat16)):
        wide.add(position, groups()[position], output)
        narrow.add(position, groups()[position], output)
    assert wide.result().dtype == torch.float32
    assert torch.equal(wide.result().bfloat16(), narrow.result())
    assert not torch.equal(wide.result(), narrow.result().float())


@pytest.mark.parametrize("mode", OutputMode)
def test_every_output_is_added_to_its_rows(mode: OutputMode) -> None:
    reducer, expected = new_reducer(SHAPE, torch.float32, mode=mode, top_k=2), torch.zeros(4, 3)
    for position, (group, output) in enumerate(
        zip(groups(), outputs(mode, torch.float32), strict=True)
    ):
        reducer.add(position, group, output)
        rows = group.pair_slot // 2 if mode is OutputMode.UNREDUCED else group.rows
        expected.index_add_(0, torch.from_numpy(rows), output)
    torch.testing.assert_close(reducer.result(), expected)
    assert not reducer.result()[3].any()


def test_result_is_available_before_all_outputs_have_arrived() -> None:
    reducer = new_reducer(SHAPE, torch.float32, mode=OutputMode.REDUCED, top_k=2)
    output = outputs(OutputMode.REDUCED, torch.float32)[2]
    reducer.add(2, groups()[2], output)
    expected = torch.zeros(4, 3).index_add_(0, torch.from_numpy(groups()[2].rows), output)
    assert torch.equal(reducer.result(), expected)


@pytest.mark.parametrize("mode", OutputMode)
def test_duplicate_output_counts_once(mode: OutputMode) -> None:
    once, twice = (new_reducer(SHAPE, torch.float32, mode=mode, top_k=2) for _ in range(2))
    for position in (2, 0, 1, 3):
        output = outputs(mode, torch.float32)[position]
        once.add(position, groups()[position], output)
        for _ in range(2):
            twice.add(position, groups()[position], output)
    assert torch.equal(twice.result(), once.result())


@pytest.mark.parametrize("mode", OutputMode)
def test_reduction_runs_on_the_device_of_its_transfer(mode: OutputMode) -> None:
    """Bits equal those of a reduction on the host."""
    transfer = CountingTransfer()
    on_host = new_reducer(SHAPE, torch.float32, mode=mode, top_k=2)
    on_device = new_reducer(SHAPE, torch.float32, mode=mode, top_k=2, transfer=transfer)
    for position in (1, 3, 0, 2):
        output = outputs(mode, torch.bfloat16)[position]
        on_host.add(position, groups()[position], output)
        on_device.add(position, groups()[position], output)
    assert torch.equal(on_device.result(), on_host.result())
    assert transfer.n_transferred == 2 * len(groups())  # each output and its indices


class CountingTransfer:
    """A transfer to host memory that counts copies."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.n_transferred = 0

    def to_device(self, host: Tensor) -> Tensor:
        self.n_transferred += 1
        return host.clone()

    copy_to_device = to_device


def test_added_output_may_change_afterwards() -> None:
    """Responses are in a buffer that the next call overwrites."""
    for mode in OutputMode:
        reducer = new_reducer(SHAPE, torch.float32, mode=mode, top_k=2)
        output = outputs(mode, torch.float32)[0]
        reducer.add(0, groups()[0], output)
        before = reducer.result()
        output.zero_()
        assert torch.equal(reducer.result(), before)
        assert before.any()
