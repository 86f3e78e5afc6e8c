"""The router uses one torch thread where functions occupy the other cores, else all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from faasmoe_router.dispatch.fanout import limit_torch_threads


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_threads", "n_local_calls", "expected"),
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
def test_number_of_threads_while_functions_compute(
    n_threads: int, n_local_calls: int, expected: int
) -> None:
    torch.set_num_threads(n_threads)
    with limit_torch_threads(n_local_calls):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == n_threads


def test_threads_are_restored_after_an_error() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), limit_torch_threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
