"""The memory limit of all sandboxes: which functions are evicted, which wait, and convergence."""

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
    MemoryClaim,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.plan.memory_budget import MemoryLimit
from faasmoe_operator.plan.sandboxes import SandboxPlan, plan_sandboxes

NOW = 1000.0
DEMAND, MEMORY = ActionReason.DEMAND, ActionReason.MEMORY
DETACHING = AssignmentState.DETACHING


def assignment(function: str, *, last_used: float, size: int = 40, **options: Any) -> Assignment:
    return Assignment(function, memory_bytes=size, last_used=last_used, **options)


def sandbox(
    name: str, *assignments: Assignment, state: SandboxState = SandboxState.READY
) -> ObservedSandbox:
    return ObservedSandbox(name, state, "t", 900.0, assignments)


def demand(
    function: str, *, last_used: float = NOW, size: int = 40, **options: Any
) -> FunctionDemand:
    return FunctionDemand(
        function, options.pop("replicas", 1), size, last_used=last_used, **options
    )


def plan(
    demands: list[FunctionDemand], *sandboxes: ObservedSandbox, limit: int = 100, capacity: int = 8
) -> SandboxPlan:
    fleet_settings = FleetSettings(
        "t", warm_pool=0, shape=SandboxShape(capacity), memory_limit_bytes=limit
    )
    return plan_sandboxes(fleet_settings, demands, sandboxes=sandboxes, now=NOW)


def test_evicts_the_least_recently_used_before_the_missing_function_is_attached() -> None:
    idle, newer = assignment("idle", last_used=10), assignment("newer", last_used=20)
    demands = [demand("idle", last_used=10), demand("newer", last_used=20), demand("f")]
    got = plan(demands, sandbox("a", idle, newer))
    assert got == SandboxPlan((Detach("a", "idle", MEMORY),))
    detaching = replace(idle, state=DETACHING)
    assert plan(demands, sandbox("a", detaching, newer)) == SandboxPlan(
        (), waiting_for_memory=("idle",)
    )
    got = plan(demands, sandbox("a", newer))
    assert got == SandboxPlan((Attach("a", "f", DEMAND),), waiting_for_memory=("idle",))


def test_evicted_function_does_not_evict_more_recently_used_ones() -> None:
    demands = [demand("old", last_used=10), demand("g", last_used=20), demand("f", last_used=30)]
    full = sandbox("a", assignment("g", last_used=20), assignment("f", last_used=30))
    assert plan(demands, full) == SandboxPlan((), waiting_for_memory=("old",))


def test_functions_in_use_are_not_evicted() -> None:
    full = sandbox("a", assignment("g", last_used=NOW - 1), assignment("h", last_used=NOW - 0.5))
    demands = [demand("g", last_used=NOW - 1), demand("h", last_used=NOW - 0.5), demand("f")]
    assert plan(demands, full) == SandboxPlan((), waiting_for_memory=("f",))


def test_pinned_functions_are_not_evicted() -> None:
    full = sandbox("a", assignment("g", last_used=1), assignment("h", last_used=2))
    demands = [
        demand("g", last_used=1, pinned=True),
        demand("h", last_used=2),
        demand("f"),
    ]
    assert plan(demands, full).actions == (Detach("a", "h", MEMORY),)


def test_evicts_several_functions_or_none_if_they_would_not_suffice() -> None:
    parts = [assignment(name, last_used=i, size=30) for i, name in enumerate("ghi")]
    others = [demand(a.function, last_used=a.last_used, size=30) for a in parts]
    got = plan([*others, demand("f", size=60)], sandbox("a", *parts))
    assert got.actions == (Detach("a", "g", MEMORY), Detach("a", "h", MEMORY))
    busy = [*parts[:1], *(replace(a, last_used=NOW) for a in parts[1:])]
    got = plan([*others, demand("f", size=60)], sandbox("a", *busy))
    assert got == SandboxPlan((), waiting_for_memory=("f",))


def test_unplanned_functions_are_detached_before_any_eviction() -> None:
    full = sandbox("a", assignment("stranger", last_used=999), assignment("g", last_used=1))
    got = plan([demand("g", last_used=1), demand("f")], full)
    assert got.actions == (Detach("a", "stranger", ActionReason.NOT_PLANNED),)


def test_creates_no_sandbox_for_a_function_that_waits_for_memory() -> None:
    full = [
        sandbox("a", assignment("g", last_used=NOW)),
        sandbox("b", assignment("h", last_used=NOW)),
    ]
    demands = [demand("g"), demand("h"), demand("f")]
    assert plan(demands, *full, capacity=1) == SandboxPlan((), waiting_for_memory=("f",))


def test_memory_of_a_terminating_sandbox_counts_as_used() -> None:
    ending = sandbox("a", assignment("g", last_used=1, size=80), state=SandboxState.DRAINING)
    assert plan([demand("f")], ending, sandbox("b")).actions == (Delete("b", ActionReason.IDLE),)
    assert plan([demand("f")], sandbox("b")).actions == (Attach("b", "f", DEMAND),)


def test_evicts_when_a_new_sandbox_would_have_too_little_memory() -> None:
    """On a shared device, an empty sandbox reports the memory that the full one does not use."""
    idle, busy = assignment("idle", last_used=10), assignment("busy", last_used=NOW)
    demands = [demand("idle", last_used=10), demand("busy"), demand("f")]
    full_shape, empty_shape = SandboxShape(8, 90), SandboxShape(8, 10)
    fleet_settings = FleetSettings("t", warm_pool=1, shape=empty_shape, memory_limit_bytes=85)
    empty = replace(sandbox("b"), shape=empty_shape)

    def step(*assignments: Assignment) -> SandboxPlan:
        full = replace(sandbox("a", *assignments), shape=full_shape)
        return plan_sandboxes(fleet_settings, demands, sandboxes=[full, empty], now=NOW)

    assert step(idle, busy).actions == (Detach("a", "idle", MEMORY),)
    assert step(busy).actions == (Attach("a", "f", DEMAND),)


def test_function_larger_than_the_limit_is_unschedulable() -> None:
    got = plan([demand("f", size=101)], sandbox("a"), limit=100)
    assert (got.unschedulable, got.waiting_for_memory) == (("f",), ())


def test_second_replicas_are_admitted_after_all_first_ones() -> None:
    got = plan([demand("f", replicas=2), demand("g")])
    assert got == SandboxPlan((Create(1, DEMAND),), waiting_for_memory=("f",))


def test_no_function_waits_without_a_limit() -> None:
    fleet_settings = FleetSettings("t", warm_pool=0, shape=SandboxShape(8))
    demands = [demand(name, size=1 << 40) for name in "fgh"]
    got = plan_sandboxes(fleet_settings, demands, sandboxes=[sandbox("a")], now=NOW)
    assert got.waiting_for_memory == ()
    assert len(got.actions) == 3


def test_rejects_a_memory_limit_of_zero() -> None:
    with pytest.raises(PlanError, match="memory_limit_bytes: got 0, expected at least 1"):
        FleetSettings("t", memory_limit_bytes=0)


SIZES = {"f": 10, "g": 20, "h": 30, "i": 40}


@given(
    limit=st.integers(40, 110),
    capacity=st.integers(1, 4),
    uses=st.lists(st.tuples(st.sampled_from(sorted(SIZES)), st.floats(0.5, 5)), max_size=12),
)
@settings(max_examples=120)
def test_memory_limit_always_holds_and_plans_converge(
    limit: int, capacity: int, uses: list[tuple[str, float]]
) -> None:
    now, names = 0.0, (f"s{n:02}" for n in itertools.count())
    last_used = dict.fromkeys(SIZES, 0.0)
    fleet: dict[str, ObservedSandbox] = {}
    fleet_settings = FleetSettings(
        "t", warm_pool=0, shape=SandboxShape(capacity), memory_limit_bytes=limit
    )

    def step() -> SandboxPlan:
        demands = [
            FunctionDemand(f, int(at > 0), SIZES[f], last_used=at) for f, at in last_used.items()
        ]
        observed = [
            replace(
                s,
                assignments=tuple(
                    replace(a, last_used=last_used[a.function]) for a in s.assignments
                ),
            )
            for s in fleet.values()
        ]
        got = plan_sandboxes(fleet_settings, demands, sandboxes=observed, now=now)
        for action in got.actions:
            match action:
                case Create(count):
                    for name in itertools.islice(names, count):
                        fleet[name] = ObservedSandbox(name, SandboxState.READY, "t", now)
                case Delete(name):
                    del fleet[name]
                case Attach(name, f):
                    added = Assignment(f, memory_bytes=SIZES[f])
                    assignments = (*fleet[name].assignments, added)
                    fleet[name] = replace(fleet[name], assignments=assignments)
                case Detach(name, f):
                    assignments = tuple(a for a in fleet[name].assignments if a.function != f)
                    fleet[name] = replace(fleet[name], assignments=assignments)
            used_bytes = sum(a.memory_bytes for s in fleet.values() for a in s.assignments)
            assert used_bytes <= limit
        return got

    for function, wait_s in uses:
        now += wait_s
        last_used[function] = now
        step()
    now += 10
    plans = [step() for _ in range(30)]
    assert plans[-1].actions == ()
    attached = {a.function for s in fleet.values() for a in s.assignments}
    if uses:
        assert uses[-1][0] in attached  # the most recently used function


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 3)), max_size=9),
    st.tuples(st.sampled_from("abc"), st.integers(0, 3)),
)
def test_claims_that_come_first_are_those_that_precede(
    waiting: list[tuple[str, int, int]], admitted: tuple[str, int]
) -> None:
    claims = tuple(MemoryClaim(name, size, float(used)) for name, size, used in waiting)
    claim = MemoryClaim(admitted[0], 1, float(admitted[1]))
    expected = sum(other.size_bytes for other in claims if other.precedes(claim))
    limit = MemoryLimit(9, 0, 0, claims)
    assert limit.claimed_bytes(claim) == expected
    limit.claims = (*claims, MemoryClaim("z", 5, 9.0))
    assert limit.claimed_bytes(claim) == expected + 5
