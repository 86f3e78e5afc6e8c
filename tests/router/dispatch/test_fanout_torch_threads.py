"""One thread for the router where functions take the other cores; all of them else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from faasmoe_router.dispatch.fanout import limit_torch_threads


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "n_calls", "expected"),
    [
        (1, 3, 1),
        (2, 0, 2),
        (2, 1, 1),
        (2, 3, 1),
        (4, 0, 4),
        (4, 2, 4),
        (4, 3, 1),
        (4, 60, 1),
        (16, 3, 16),
    ],
)
def test_threads_while_functions_compute(threads: int, n_calls: int, expected: int) -> None:
    torch.set_num_threads(threads)
    with limit_torch_threads(n_calls):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == threads


def test_threads_are_given_back_after_an_error() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), limit_torch_threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
