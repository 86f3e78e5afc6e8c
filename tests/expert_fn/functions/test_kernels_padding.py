import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_expert.functions.kernels import (
    KernelSpec,
    RoutedPairs,
    gated_per_pair,
    gated_reduced,
    pad_row_count,
)


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, 16), (40, 64), (63, 64), (65, 128), (512, 512)],
)
def test_pads_to_few_row_counts(n_rows: int, expected: int) -> None:
    assert pad_row_count(n_rows) == expected


@given(st.integers(1, 4096))
def test_padding_is_bounded(n_rows: int) -> None:
    padded = pad_row_count(n_rows)
    assert n_rows <= padded < n_rows + max(4, min(64, n_rows))


def test_has_13_row_counts_up_to_512() -> None:
    assert len({pad_row_count(n) for n in range(1, 513)}) == 13


@pytest.mark.parametrize("n_rows", [1, 3, 7, 11])
def test_padding_does_not_change_outputs(n_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "gate_up_proj": torch.randn(2, 12, 8, generator=generator),
        "down_proj": torch.randn(2, 8, 6, generator=generator),
    }
    hidden = torch.randn(n_rows, 8, generator=generator)  # [T, H]
    spec = KernelSpec("gated", "silu", transposed=False, interleaved=False, bias=False)
    row, expert = np.repeat(np.arange(n_rows), 2), np.tile([0, 1], n_rows)
    pairs = RoutedPairs(row.astype(np.int32), expert.astype(np.int32), torch.ones(2 * n_rows))
    per_pair = gated_per_pair(spec, weights, hidden, pairs)  # [P, H]
    total = gated_reduced(spec, weights, hidden, pairs)  # [T, H]
    torch.testing.assert_close(total, per_pair.view(n_rows, 2, -1).sum(1))
