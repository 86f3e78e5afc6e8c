"""Memory that several functions map is counted once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from faasmoe_operator.plan.fleet import MachineMemory, MemoryClaim, MemoryHolder
from faasmoe_operator.plan.memory_budget import MemoryAdmission, machine_limit
from faasmoe_operator.plan.shared_memory import SharedFunctions

SIZES = {"x": 90, "y": 50, "": 30}
"""Size by content; what has none is shared with nobody."""


def holder(
    name: str, content: str = "x", *, private: int = 0, is_leaving: bool = False
) -> MemoryHolder:
    return MemoryHolder(
        ("s", name),
        SIZES[content] + private,
        0.0,
        is_leaving=is_leaving,
        content=content,
        private_bytes=private,
    )


def sizes(*held: MemoryHolder) -> list[int]:
    """Return the parts of holders of as many models."""
    shared = SharedFunctions({str(n): [h] for n, h in enumerate(held)})
    return [part.size_bytes for found in shared.parts.values() for part in found]


def test_what_several_map_is_held_once() -> None:
    assert sizes(holder("a"), holder("b"), holder("c")) == [30, 30, 30]
    assert sizes(holder("a"), holder("b", "y"), holder("c", "")) == [90, 50, 30]
    assert sizes(holder("a", ""), holder("b", "")) == [30, 30]
    assert sizes(holder("a", private=5), holder("b", private=7)) == [50, 52]


def test_what_leaves_frees_only_what_nobody_maps_who_stays() -> None:
    assert sizes(holder("a", private=5, is_leaving=True), holder("b")) == [5, 90]
    assert sizes(holder("a", is_leaving=True), holder("b", is_leaving=True)) == [45, 45]
    assert sizes(holder("a", is_leaving=True)) == [90]
    held = {"m": [holder("a", is_leaving=True)], "n": [holder("b", "y")]}
    assert SharedFunctions(held).resident == {"y"}


HOLDERS = st.builds(
    holder,
    st.sampled_from("abc"),
    st.sampled_from(sorted(SIZES)),
    private=st.integers(0, 9),
    is_leaving=st.booleans(),
)


@given(st.lists(HOLDERS))
def test_parts_add_up_to_what_is_held(held: list[MemoryHolder]) -> None:
    shared = sum(SIZES[content] for content in {h.content for h in held} - {""})
    others = sum(h.size_bytes if not h.content else h.private_bytes for h in held)
    rounding = len(held)
    assert 0 <= sum(sizes(*held)) - shared - others <= rounding


def test_own_functions_count_beyond_their_sizes() -> None:
    own = [holder("a", private=5), holder("b", "y", private=5), holder("c", "", is_leaving=True)]
    shared = SharedFunctions({"m": own, "n": [holder("d")]})
    assert shared.extra_bytes("m") == (45 + 5 - 90) + 5
    assert shared.extra_bytes("other") == 0


def test_what_others_hold_takes_no_memory_of_the_machine() -> None:
    machine = MachineMemory(100, (replace(holder("a"), last_used=9.0),))
    claim = MemoryClaim("b", 90, 10.0)
    waiting = MemoryAdmission((machine_limit(machine),), [], 0.0)
    assert not waiting.admit(claim)
    assert list(waiting.waiting) == ["b"]
    resident = replace(machine, resident=frozenset({"b"}))
    assert MemoryAdmission((machine_limit(resident),), [], 0.0).admit(claim)


def test_own_sizes_are_those_that_are_held() -> None:
    machine = MachineMemory(100, own_extra_bytes=-60)
    limit = machine_limit(machine, 90, 90)
    assert (limit.used_bytes, limit.planned_bytes) == (30, 30)
    assert MemoryAdmission((limit,), [], 0.0).admit(MemoryClaim("b", 70, 10.0))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"size_bytes": 0, "last_used": 0.0}, id="numbers"),
        pytest.param({"is_leaving": True, "is_evictable": False, "is_idle": True}, id="flags"),
    ],
)
def test_a_holder_keeps_all_but_what_is_changed(changes: dict[str, Any]) -> None:
    holder = MemoryHolder(("s", "f"), 10, 2.0, is_pinned=True, content="c", private_bytes=3)
    assert holder.changed(**changes) == replace(holder, **changes)


HELD = st.lists(HOLDERS, max_size=4)


@given(st.lists(st.tuples(HELD, HELD, st.booleans()), max_size=4))
def test_parts_follow_from_what_is_held_now_whatever_it_was_before(
    models: list[tuple[list[MemoryHolder], list[MemoryHolder], bool]],
) -> None:
    before = {str(n): held for n, (held, _, _) in enumerate(models)}
    now = {str(n): held if stays else new for n, (held, new, stays) in enumerate(models)}
    after = SharedFunctions(now, SharedFunctions(before))
    assert after.parts == SharedFunctions(now).parts


def test_parts_that_have_not_changed_are_not_made_again() -> None:
    first, second = [holder("a"), holder("b", "y")], [holder("c"), holder("d", "y")]
    before = SharedFunctions({"m": first, "n": second})
    after = SharedFunctions({"m": first, "n": second, "o": [holder("e")]}, before)
    assert [part.size_bytes for part in after.parts["m"]] == [30, 25]
    assert after.parts["m"][1] is before.parts["m"][1]
