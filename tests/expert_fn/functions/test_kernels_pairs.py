"""Pairs are walked by expert, and cut into tiles of one size."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_expert.functions.kernels import TILE_ROWS, RoutedPairs


def test_experts_come_in_ascending_order_with_their_pairs() -> None:
    expert = np.array([5, 2, 5, 9, 2], dtype=np.int32)
    pairs = RoutedPairs(np.arange(5, dtype=np.int32), expert, torch.ones(5))
    found = [(e, positions.tolist()) for e, positions in pairs.by_expert()]
    assert found == [(2, [1, 4]), (5, [0, 2]), (9, [3])]


def test_tiles_cover_every_pair_once_and_end_in_zeros() -> None:
    hidden = torch.arange(1.0, 12.0)[:, None].expand(11, 3)  # [T, H]
    row, expert = np.arange(11).repeat(2), np.tile([4, 1], 11)
    pairs = RoutedPairs(row.astype(np.int32), expert.astype(np.int32), torch.ones(22))
    tiles = list(pairs.tiles(hidden))
    assert [(e, len(index)) for e, index, _ in tiles] == [(1, 8), (1, 3), (4, 8), (4, 3)]
    assert sorted(torch.cat([index for _, index, _ in tiles]).tolist()) == list(range(22))
    for expert_of_tile, index, rows in tiles:
        assert set(pairs.expert[index]) == {expert_of_tile}
        assert rows.shape == (TILE_ROWS, 3)
        assert torch.equal(rows[: len(index)], hidden[pairs.row[index]])
        assert not rows[len(index) :].any()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 40))
def test_runs_hold_every_pair_once_in_whole_experts_and_bounded_rows(
    experts: list[int], max_rows: int
) -> None:
    expert = np.array(experts, np.int32)
    pairs = RoutedPairs(np.arange(len(expert), dtype=np.int32), expert, torch.ones(len(expert)))
    runs = list(pairs.padded_groups(lambda n: -(-n // 4) * 4, max_rows=max_rows))
    positions = np.concatenate([run.positions for run in runs])
    assert positions.tolist() == np.argsort(expert, kind="stable").tolist()
    spans = [span for run in runs for span in run.spans]
    assert [e for e, _, _ in spans] == sorted(set(experts))
    for run in runs:
        assert run.n_rows <= max_rows or len(run.spans) == 1
        assert (run.spans[0][1], run.spans[-1][2]) == (0, run.n_rows)
        owner = {row: e for e, begin, end in run.spans for row in range(begin, end)}
        assert [owner[place] for place in run.padded_index.tolist()] == expert[
            run.positions
        ].tolist()
        assert len(set(run.padded_index.tolist())) == len(run.padded_index)
