"""Iteration over routed pairs by expert, in tiles and in padded groups."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_expert.functions.kernels import TILE_ROWS, RoutedPairs


def test_by_expert_yields_ascending_experts_with_their_pairs() -> None:
    expert = np.array([5, 2, 5, 9, 2], dtype=np.int32)
    pairs = RoutedPairs(np.arange(5, dtype=np.int32), expert, torch.ones(5))
    result = [(e, positions.tolist()) for e, positions in pairs.by_expert()]
    assert result == [(2, [1, 4]), (5, [0, 2]), (9, [3])]


def test_tiles_cover_every_pair_once_and_are_zero_padded() -> None:
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
def test_groups_cover_every_pair_once_with_whole_experts_and_bounded_rows(
    experts: list[int], max_rows: int
) -> None:
    expert = np.array(experts, np.int32)
    pairs = RoutedPairs(np.arange(len(expert), dtype=np.int32), expert, torch.ones(len(expert)))
    groups = list(pairs.padded_groups(lambda n: -(-n // 4) * 4, max_rows=max_rows))
    positions = np.concatenate([group.positions for group in groups])
    assert positions.tolist() == np.argsort(expert, kind="stable").tolist()
    spans = [span for group in groups for span in group.spans]
    assert [e for e, _, _ in spans] == sorted(set(experts))
    for group in groups:
        assert group.n_rows <= max_rows or len(group.spans) == 1
        assert (group.spans[0][1], group.spans[-1][2]) == (0, group.n_rows)
        expert_of_row = {row: e for e, start, end in group.spans for row in range(start, end)}
        assert [expert_of_row[row] for row in group.padded_index.tolist()] == expert[
            group.positions
        ].tolist()
        assert len(set(group.padded_index.tolist())) == len(group.padded_index)
