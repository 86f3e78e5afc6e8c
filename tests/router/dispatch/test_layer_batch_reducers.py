"""Parts are added in a fixed order, whenever they arrive."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from faasmoe_contracts.wire import OutputMode
from faasmoe_router.dispatch.grouping import Group, group_pairs
from faasmoe_router.dispatch.layer_batch import new_reducer

INDEX = np.array([[0, 2], [1, 2], [3, 0], [9, 9]])  # [T, k]; the last row has no expert
WEIGHT = np.ones((4, 2), dtype=np.float32)  # [T, k]
FUNCTION_OF = np.array([0, 0, 1, 2], dtype=np.int32)


def groups() -> list[Group]:
    return group_pairs(INDEX, WEIGHT, FUNCTION_OF, max_rows=2)


def outputs(mode: OutputMode, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = [len(g.pair_slot) if mode is OutputMode.UNREDUCED else len(g.rows) for g in groups()]
    return [(torch.randn(n, 3, generator=generator) * 1e3).to(dtype) for n in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", OutputMode)
def test_the_sum_does_not_depend_on_the_order_of_arrival(
    mode: OutputMode, dtype: torch.dtype
) -> None:
    hidden, results = torch.zeros(4, 3, dtype=dtype), []
    for order in itertools.permutations(range(len(groups()))):
        total = new_reducer(hidden, mode=mode, top_k=2)
        for position in order:
            total.add(position, groups()[position], outputs(mode, dtype)[position])
        results.append(total.result())
    assert all(torch.equal(r, results[0]) for r in results)
    assert results[0].dtype == dtype


@pytest.mark.parametrize("mode", OutputMode)
def test_every_part_is_added_to_its_row(mode: OutputMode) -> None:
    total, expected = new_reducer(torch.zeros(4, 3), mode=mode, top_k=2), torch.zeros(4, 3)
    for position, (group, part) in enumerate(
        zip(groups(), outputs(mode, torch.float32), strict=True)
    ):
        total.add(position, group, part)
        rows = group.pair_slot // 2 if mode is OutputMode.UNREDUCED else group.rows
        expected.index_add_(0, torch.from_numpy(rows), part)
    torch.testing.assert_close(total.result(), expected)
    assert not total.result()[3].any()


def test_a_sum_can_be_had_before_all_parts_are_there() -> None:
    total, given = (
        new_reducer(torch.zeros(4, 3), mode=OutputMode.REDUCED, top_k=2),
        outputs(OutputMode.REDUCED, torch.float32),
    )
    total.add(2, groups()[2], given[2])
    expected = torch.zeros(4, 3).index_add_(0, torch.from_numpy(groups()[2].rows), given[2])
    assert torch.equal(total.result(), expected)


@pytest.mark.parametrize("mode", OutputMode)
def test_a_part_that_comes_twice_counts_once(mode: OutputMode) -> None:
    once, twice = (new_reducer(torch.zeros(4, 3), mode=mode, top_k=2) for _ in range(2))
    for position in (2, 0, 1, 3):
        part = outputs(mode, torch.float32)[position]
        once.add(position, groups()[position], part)
        for _ in range(2):
            twice.add(position, groups()[position], part)
    assert torch.equal(twice.result(), once.result())


@pytest.mark.parametrize("mode", OutputMode)
def test_a_sum_is_made_on_the_device_of_its_transfer(mode: OutputMode) -> None:
    """Bits are those of the host, however many parts are on their way at a time."""
    transfer = CountingTransfer()
    on_host = new_reducer(torch.zeros(4, 3), mode=mode, top_k=2)
    on_device = new_reducer(torch.zeros(4, 3), mode=mode, top_k=2, transfer=transfer)
    for position in (1, 3, 0, 2):
        part = outputs(mode, torch.bfloat16)[position]
        on_host.add(position, groups()[position], part)
        on_device.add(position, groups()[position], part)
    assert torch.equal(on_device.result(), on_host.result())
    assert transfer.n_transferred == 2 * len(groups())  # each part, and where it belongs


class CountingTransfer:
    """A way to the host's own memory that counts."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.n_transferred = 0

    def to_device(self, host: Tensor) -> Tensor:
        self.n_transferred += 1
        return host.clone()

    copy_to_device = to_device


def test_what_was_put_may_change_afterwards() -> None:
    """Answers lie in a buffer that the next call overwrites."""
    for mode in OutputMode:
        total, given = (
            new_reducer(torch.zeros(4, 3), mode=mode, top_k=2),
            outputs(mode, torch.float32)[0],
        )
        total.add(0, groups()[0], given)
        before = total.result()
        given.zero_()
        assert torch.equal(total.result(), before)
        assert before.any()
