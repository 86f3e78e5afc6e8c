"""Grouping puts every valid pair into exactly one group, in order, within the size of a frame."""

import itertools
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from numpy.typing import NDArray

from faasmoe_router.dispatch.layer_batch import Group, group_pairs


@dataclass(frozen=True, slots=True)
class Case:
    index: NDArray[np.int64]  # [T, k]
    weight: NDArray[np.float32]  # [T, k]
    function_of: NDArray[np.int32]  # [E]
    max_rows: int

    def groups(self) -> list[Group]:
        return group_pairs(self.index, self.weight, self.function_of, max_rows=self.max_rows)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_rows, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    function_of = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    expert = st.integers(-2, len(function_of) + 1)  # some are out of range
    n_slots = n_rows * top_k
    index = draw(st.lists(expert, min_size=n_slots, max_size=n_slots))
    weight = draw(st.lists(st.floats(0, 2, width=32), min_size=n_slots, max_size=n_slots))
    return Case(
        np.array(index, dtype=np.int64).reshape(n_rows, top_k),
        np.array(weight, dtype=np.float32).reshape(n_rows, top_k),
        np.array(function_of, dtype=np.int32),
        draw(st.integers(1, 14)),
    )


@given(cases())
def test_every_valid_pair_is_in_exactly_one_group(case: Case) -> None:
    flat = case.index.reshape(-1)
    valid = [s for s, e in enumerate(flat) if 0 <= e < len(case.function_of)]
    slots = [int(s) for group in case.groups() for s in group.pair_slot]
    assert sorted(slots) == valid


@given(cases())
def test_group_matches_the_routing_of_its_slots(case: Case) -> None:
    top_k = case.index.shape[1]
    for group in case.groups():
        slots = group.pair_slot
        np.testing.assert_array_equal(group.pair_expert, case.index.reshape(-1)[slots])
        np.testing.assert_array_equal(group.pair_weight, case.weight.reshape(-1)[slots])
        np.testing.assert_array_equal(group.rows[group.pair_row], slots // top_k)
        assert set(case.function_of[group.pair_expert]) == {group.function_index}
        arrays = (group.pair_row, group.pair_expert, group.pair_weight)
        assert [array.dtype.name for array in arrays] == ["int32", "int32", "float32"]


@given(cases())
def test_groups_are_bounded_and_ordered(case: Case) -> None:
    groups = case.groups()
    assert [g.function_index for g in groups] == sorted(g.function_index for g in groups)
    for group in groups:
        assert 1 <= len(group.rows) <= case.max_rows
        assert (np.diff(group.rows) > 0).all()
        assert (np.diff(group.pair_row) >= 0).all()
        assert set(group.pair_row) == set(range(len(group.rows)))


@given(cases())
def test_row_is_in_one_group_of_a_function(case: Case) -> None:
    seen = [(g.function_index, int(row)) for g in case.groups() for row in g.rows]
    assert len(seen) == len(set(seen))


@given(cases())
def test_only_the_last_group_of_a_function_is_partial(case: Case) -> None:
    groups = case.groups()
    for group, following in itertools.pairwise(groups):
        if group.function_index == following.function_index:
            assert len(group.rows) == case.max_rows
