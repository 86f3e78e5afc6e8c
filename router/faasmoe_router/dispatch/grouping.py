"""Grouping a batch's (token, expert) pairs by function. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Group:
    """What one call carries: some rows and the pairs that one function computes for them.

    Attributes:
        function: position of the function in the layer's list.
        rows: rows of the batch, int64 [R], ascending.
        pair_row: position in `rows` of each pair, int32 [P], ascending.
        pair_expert: global expert index of each pair, int32 [P].
        pair_weight: routing weight of each pair, float32 [P].
        pair_slot: place of each pair in the flattened routing [T * k], int64 [P].
    """

    function_index: int
    rows: NDArray[np.int64]
    pair_row: NDArray[np.int32]
    pair_expert: NDArray[np.int32]
    pair_weight: NDArray[np.float32]
    pair_slot: NDArray[np.int64]


def group_pairs(
    top_k_index: NDArray[np.int64],
    top_k_weight: NDArray[np.float32],
    function_of: NDArray[np.int32],
    *,
    max_rows: int,
) -> list[Group]:
    """Return the calls of one layer: by function, ascending, each of at most `max_rows` rows.

    A pair whose expert index is outside 0..E-1 is a family's way to say "no expert" (a padding or
    a zero-computation slot) and takes part in no call.

    Args:
        top_k_index: expert of each slot, [T, k].
        top_k_weight: weight of each slot, [T, k].
        function_of: position of the function of each expert, int32 [E].
        max_rows: rows that fit into one frame, 1 or more.
    """
    k = top_k_index.shape[1]
    expert = top_k_index.reshape(-1)  # [T * k]
    slot = np.flatnonzero((expert >= 0) & (expert < len(function_of)))  # [P]
    function = function_of[expert[slot]]  # [P]
    order = np.argsort(function, kind="stable")
    slot, function = slot[order], function[order]
    weight = top_k_weight.reshape(-1)
    groups: list[Group] = []
    for start, end in _runs(function):
        pairs = slot[start:end]
        rows, pair_row = _unique_rows(pairs // k)
        groups.extend(
            Group(
                int(function[start]),
                rows[row_start:row_end],
                (pair_row[pair_start:pair_end] - row_start).astype(np.int32),
                expert[pairs[pair_start:pair_end]].astype(np.int32),
                weight[pairs[pair_start:pair_end]].astype(np.float32, copy=False),
                pairs[pair_start:pair_end],
            )
            for row_start, row_end, pair_start, pair_end in _split_frames(
                pair_row, len(rows), max_rows
            )
        )
    return groups


def _runs(values: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    if len(values) == 0:
        return
    boundaries = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    yield from itertools.pairwise(boundaries)


def _unique_rows(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct rows of an ascending list and each entry's position among them."""
    is_first = np.empty(len(rows), dtype=np.bool_)
    is_first[0], is_first[1:] = True, rows[1:] != rows[:-1]
    return rows[is_first], np.cumsum(is_first) - 1


def _split_frames(
    pair_row: NDArray[np.int64], n_rows: int, max_rows: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, end row, first pair, end pair) of each frame."""
    for row_start in range(0, n_rows, max_rows):
        row_end = min(row_start + max_rows, n_rows)
        pair_start, pair_end = np.searchsorted(pair_row, (row_start, row_end)).tolist()
        yield row_start, row_end, pair_start, pair_end
