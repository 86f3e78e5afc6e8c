"""A memory limit over all sandboxes: what makes room, what waits, and that it comes to rest."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from faasmoe_operator.errors import PlanError
from faasmoe_operator.plan.actions import ActionReason, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.plan.sandboxes import SandboxPlan, plan_sandboxes

NOW = 1000.0
DEMAND, MEMORY = ActionReason.DEMAND, ActionReason.MEMORY
DETACHING = AssignmentState.DETACHING


def assignment(function: str, *, last_used: float, size: int = 40, **more: Any) -> Assignment:
    return Assignment(function, memory_bytes=size, last_used=last_used, **more)


def sandbox(
    name: str, *assignments: Assignment, state: SandboxState = SandboxState.READY
) -> ObservedSandbox:
    return ObservedSandbox(name, state, "t", 900.0, assignments)


def demand(function: str, *, last_used: float = NOW, size: int = 40, **more: Any) -> FunctionDemand:
    return FunctionDemand(function, more.pop("replicas", 1), size, last_used=last_used, **more)


def plan(
    demands: list[FunctionDemand], *sandboxes: ObservedSandbox, limit: int = 100, capacity: int = 8
) -> SandboxPlan:
    chosen = FleetSettings("t", warm_pool=0, shape=SandboxShape(capacity), memory_limit_bytes=limit)
    return plan_sandboxes(chosen, demands, sandboxes=sandboxes, now=NOW)


def test_the_least_lately_used_makes_room_and_the_missing_one_waits_until_it_is_gone() -> None:
    idle, newer = assignment("idle", last_used=10), assignment("newer", last_used=20)
    demands = [demand("idle", last_used=10), demand("newer", last_used=20), demand("f")]
    got = plan(demands, sandbox("a", idle, newer))
    assert got == SandboxPlan((Detach("a", "idle", MEMORY),))
    leaving = replace(idle, state=DETACHING)
    assert plan(demands, sandbox("a", leaving, newer)) == SandboxPlan(
        (), waiting_for_memory=("idle",)
    )
    got = plan(demands, sandbox("a", newer))
    assert got == SandboxPlan((Attach("a", "f", DEMAND),), waiting_for_memory=("idle",))


def test_one_that_made_room_throws_nothing_out_that_was_used_more_lately() -> None:
    demands = [demand("old", last_used=10), demand("g", last_used=20), demand("f", last_used=30)]
    full = sandbox("a", assignment("g", last_used=20), assignment("f", last_used=30))
    assert plan(demands, full) == SandboxPlan((), waiting_for_memory=("old",))


def test_what_is_in_use_makes_no_room() -> None:
    full = sandbox("a", assignment("g", last_used=NOW - 1), assignment("h", last_used=NOW - 0.5))
    demands = [demand("g", last_used=NOW - 1), demand("h", last_used=NOW - 0.5), demand("f")]
    assert plan(demands, full) == SandboxPlan((), waiting_for_memory=("f",))


def test_pinned_functions_make_no_room() -> None:
    full = sandbox("a", assignment("g", last_used=1), assignment("h", last_used=2))
    demands = [
        demand("g", last_used=1, pinned=True),
        demand("h", last_used=2),
        demand("f"),
    ]
    assert plan(demands, full).actions == (Detach("a", "h", MEMORY),)


def test_several_make_room_for_a_large_one_but_none_for_one_that_would_not_fit_even_so() -> None:
    parts = [assignment(name, last_used=i, size=30) for i, name in enumerate("ghi")]
    others = [demand(a.function, last_used=a.last_used, size=30) for a in parts]
    got = plan([*others, demand("f", size=60)], sandbox("a", *parts))
    assert got.actions == (Detach("a", "g", MEMORY), Detach("a", "h", MEMORY))
    busy = [*parts[:1], *(replace(a, last_used=NOW) for a in parts[1:])]
    got = plan([*others, demand("f", size=60)], sandbox("a", *busy))
    assert got == SandboxPlan((), waiting_for_memory=("f",))


def test_functions_that_nobody_wants_go_before_any_makes_room() -> None:
    full = sandbox("a", assignment("stranger", last_used=999), assignment("g", last_used=1))
    got = plan([demand("g", last_used=1), demand("f")], full)
    assert got.actions == (Detach("a", "stranger", ActionReason.NOT_PLANNED),)


def test_no_sandbox_is_created_for_what_waits_for_memory() -> None:
    full = [
        sandbox("a", assignment("g", last_used=NOW)),
        sandbox("b", assignment("h", last_used=NOW)),
    ]
    demands = [demand("g"), demand("h"), demand("f")]
    assert plan(demands, *full, capacity=1) == SandboxPlan((), waiting_for_memory=("f",))


def test_memory_of_a_sandbox_that_ends_is_not_free_yet() -> None:
    ending = sandbox("a", assignment("g", last_used=1, size=80), state=SandboxState.DRAINING)
    assert plan([demand("f")], ending, sandbox("b")).actions == (Delete("b", ActionReason.IDLE),)
    assert plan([demand("f")], sandbox("b")).actions == (Attach("b", "f", DEMAND),)


def test_room_is_made_also_where_a_new_sandbox_would_have_none() -> None:
    """One device: what an empty sandbox has left is what the full one has not taken."""
    idle, busy = assignment("idle", last_used=10), assignment("busy", last_used=NOW)
    demands = [demand("idle", last_used=10), demand("busy"), demand("f")]
    own, left = SandboxShape(8, 90), SandboxShape(8, 10)
    chosen = FleetSettings("t", warm_pool=1, shape=left, memory_limit_bytes=85)
    empty = replace(sandbox("b"), shape=left)

    def step(*assignments: Assignment) -> SandboxPlan:
        full = replace(sandbox("a", *assignments), shape=own)
        return plan_sandboxes(chosen, demands, sandboxes=[full, empty], now=NOW)

    assert step(idle, busy).actions == (Detach("a", "idle", MEMORY),)
    assert step(busy).actions == (Attach("a", "f", DEMAND),)


def test_a_function_larger_than_the_limit_is_named() -> None:
    got = plan([demand("f", size=101)], sandbox("a"), limit=100)
    assert (got.unschedulable, got.waiting_for_memory) == (("f",), ())


def test_second_replicas_come_after_all_first_ones() -> None:
    got = plan([demand("f", replicas=2), demand("g")])
    assert got == SandboxPlan((Create(1, DEMAND),), waiting_for_memory=("f",))


def test_without_a_limit_nothing_waits() -> None:
    chosen = FleetSettings("t", warm_pool=0, shape=SandboxShape(8))
    demands = [demand(name, size=1 << 40) for name in "fgh"]
    got = plan_sandboxes(chosen, demands, sandboxes=[sandbox("a")], now=NOW)
    assert got.waiting_for_memory == ()
    assert len(got.actions) == 3


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="memory_limit_bytes: got 0, expected at least 1"):
        FleetSettings("t", memory_limit_bytes=0)


SIZES = {"f": 10, "g": 20, "h": 30, "i": 40}


@given(
    limit=st.integers(40, 110),
    capacity=st.integers(1, 4),
    uses=st.lists(st.tuples(st.sampled_from(sorted(SIZES)), st.floats(0.5, 5)), max_size=12),
)
@settings(max_examples=120)
def test_the_limit_always_holds_and_rounds_come_to_rest(
    limit: int, capacity: int, uses: list[tuple[str, float]]
) -> None:
    now, names = 0.0, (f"s{n:02}" for n in itertools.count())
    last_used = dict.fromkeys(SIZES, 0.0)
    fleet: dict[str, ObservedSandbox] = {}
    chosen = FleetSettings("t", warm_pool=0, shape=SandboxShape(capacity), memory_limit_bytes=limit)

    def step() -> SandboxPlan:
        demands = [
            FunctionDemand(f, int(at > 0), SIZES[f], last_used=at) for f, at in last_used.items()
        ]
        known = [
            replace(
                s,
                assignments=tuple(
                    replace(a, last_used=last_used[a.function]) for a in s.assignments
                ),
            )
            for s in fleet.values()
        ]
        got = plan_sandboxes(chosen, demands, sandboxes=known, now=now)
        for action in got.actions:
            match action:
                case Create(count):
                    for name in itertools.islice(names, count):
                        fleet[name] = ObservedSandbox(name, SandboxState.READY, "t", now)
                case Delete(name):
                    del fleet[name]
                case Attach(name, f):
                    added = Assignment(f, memory_bytes=SIZES[f])
                    here = fleet[name]
                    fleet[name] = replace(here, assignments=(*here.assignments, added))
                case Detach(name, f):
                    here = fleet[name]
                    stay = tuple(a for a in here.assignments if a.function != f)
                    fleet[name] = replace(here, assignments=stay)
            taken = sum(a.memory_bytes for s in fleet.values() for a in s.assignments)
            assert taken <= limit
        return got

    for function, wait_s in uses:
        now += wait_s
        last_used[function] = now
        step()
    now += 10
    rounds = [step() for _ in range(30)]
    assert rounds[-1].actions == ()
    there = {a.function for s in fleet.values() for a in s.assignments}
    if uses:
        assert uses[-1][0] in there  # the last that was called has its room
