"""Memory that routers and the functions of several models share: who makes room for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from faasmoe_operator.plan.actions import ActionReason, Attach, Detach
from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    MachineMemory,
    MemoryClaim,
    MemoryHolder,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.plan.memory_budget import function_holders
from faasmoe_operator.plan.router_memory import (
    ModelMemory,
    RouterMemory,
    RouterPlan,
    joined_holders,
    plan_routers,
)
from faasmoe_operator.plan.sandboxes import SandboxPlan, plan_sandboxes

NOW = 1000.0
LIMIT = 100


def running(name: str, *, last_used: float, size: int = 40, pinned: bool = False) -> RouterMemory:
    return RouterMemory(f"{name}/0", size, last_used, True, True, pinned)


def wanted(
    name: str, *, last_used: float = NOW, size: int = 40, waiting_s: float = 0.0
) -> RouterMemory:
    return RouterMemory(
        f"{name}/0",
        size,
        last_used,
        is_running=False,
        is_wanted=True,
        is_ready=False,
        waiting_since=NOW - waiting_s,
    )


def function(name: str, *, last_used: float, size: int = 40) -> MemoryHolder:
    return MemoryHolder(("s", name), size, last_used)


def plan(
    *routers: RouterMemory,
    models: Mapping[str, ModelMemory] | None = None,
    claims: tuple[MemoryClaim, ...] = (),
    max_starting: int = 9,
) -> RouterPlan:
    """Return the plan, with models in the place of their only routers."""
    got = plan_routers(
        LIMIT, routers, models=models or {}, claims=claims, now=NOW, max_starting=max_starting
    )
    return replace(got, may_run=frozenset(name.removesuffix("/0") for name in got.may_run))


def test_router_starts_while_there_is_memory() -> None:
    got = plan(running("a", last_used=NOW), wanted("b"))
    assert got == RouterPlan(frozenset({"a", "b"}))


def test_least_recently_used_router_makes_room_and_the_next_one_starts_once_it_has_ended() -> None:
    old, newer = running("old", last_used=10.0), running("newer", last_used=20.0)
    got = plan(old, newer, wanted("b"))
    assert got.may_run == {"newer"}
    assert [claim.name for claim in got.claims] == ["b/0"]
    assert plan(replace(old, is_wanted=False), newer, wanted("b")).may_run == {"newer"}
    assert plan(newer, wanted("b")).may_run == {"newer", "b"}


def test_least_recently_used_function_makes_room_for_a_router() -> None:
    used = function("f", last_used=10.0)
    got = plan(running("a", last_used=20.0), wanted("b"), models={"c": ModelMemory((used,))})
    assert got.may_run == {"a"}
    assert got.evicted == (used,)


def test_idle_model_makes_room_as_a_whole_rather_than_two_in_part() -> None:
    models = {"old": ModelMemory((function("f", last_used=1.0, size=20),))}
    old, newer = running("old", last_used=10.0, size=20), running("newer", last_used=20.0)
    got = plan(old, newer, wanted("b"), models=models)
    assert got.may_run == {"newer"}
    assert got.evicted == ()  # the functions go once the router has ended
    larger = plan(old, newer, wanted("b", size=60), models=models)
    assert larger.may_run == {"newer"}


def test_functions_of_a_model_in_use_make_room_one_by_one() -> None:
    cold, hot = function("f", last_used=NOW - 9), function("g", last_used=NOW, size=1)
    models = {"a": ModelMemory((hot, cold))}
    got = plan(running("a", last_used=NOW), wanted("b"), models=models)
    assert got.may_run == {"a"}
    assert got.evicted == (cold,)


def test_pinned_function_stays_when_its_model_makes_room() -> None:
    pinned = replace(function("f", last_used=1.0), is_evictable=False, is_pinned=True)
    idle = running("a", last_used=10.0).holder(NOW)
    assert joined_holders([idle], [pinned]) == [idle, pinned]


def test_first_router_gets_memory_together_with_the_functions_that_it_will_call() -> None:
    models = {"b": ModelMemory(missing_bytes=30)}
    got = plan(running("a", last_used=NOW), wanted("b"), models=models)
    assert got.may_run == {"a"}
    assert [claim.size_bytes for claim in got.claims] == [70]
    assert plan(wanted("b"), models=models).may_run == {"b"}
    second = replace(wanted("b"), name="b/1")
    both = plan(running("b", last_used=NOW), second, models=models)
    assert "b/1" in both.may_run  # the functions are the first one's concern


def test_model_larger_than_the_limit_starts_alone_beside_what_never_ends() -> None:
    models = {"b": ModelMemory(missing_bytes=10 * LIMIT)}
    assert plan(running("a", last_used=NOW, size=10), wanted("b"), models=models).may_run == {"a"}
    kept = running("kept", last_used=0.0, size=10, pinned=True)
    assert plan(kept, wanted("b"), models=models).may_run == {"kept", "b"}


def test_memory_that_is_kept_for_functions_is_not_free() -> None:
    models = {"a": ModelMemory(reserved_bytes=30)}
    assert plan(running("a", last_used=NOW), wanted("b"), models=models).may_run == {"a"}


def test_router_waits_while_all_memory_is_in_use() -> None:
    got = plan(running("a", last_used=NOW), running("c", last_used=NOW - 0.02), wanted("b"))
    assert got.may_run == {"a", "c"}
    assert got.evicted == ()


def test_router_that_never_ends_runs_and_makes_no_room() -> None:
    kept = running("kept", last_used=0.0, size=90, pinned=True)
    assert plan(kept, wanted("b")).may_run == {"kept"}
    starting = replace(kept, is_running=False)
    assert "kept" in plan(starting, running("a", last_used=NOW, size=90)).may_run


def test_of_several_that_wait_the_one_used_last_starts_first() -> None:
    got = plan(wanted("idle", last_used=5.0, size=80), wanted("b", size=80))
    assert got.may_run == {"b"}


def test_longest_waiting_model_starts_first_and_smaller_ones_do_not_overtake_it() -> None:
    late, early = wanted("a", size=40, waiting_s=1.0), wanted("b", size=80, waiting_s=3.0)
    assert plan(late, early).may_run == {"b"}
    assert plan(running("used", last_used=NOW), late, early).may_run == {"used"}
    assert plan(running("used", last_used=NOW), late).may_run == {"used", "a"}


def test_only_some_routers_start_at_a_time() -> None:
    waiting = [wanted(name, size=10, waiting_s=age) for name, age in (("a", 1), ("b", 2), ("c", 3))]
    assert plan(*waiting, max_starting=2).may_run == {"b", "c"}
    starting = replace(running("d", last_used=NOW, size=10), is_ready=False)
    assert plan(starting, *waiting, max_starting=2).may_run == {"d", "c"}
    assert plan(replace(starting, is_ready=True), *waiting, max_starting=2).may_run == {
        *("d", "c", "b")
    }


def test_no_more_models_make_room_than_may_start() -> None:
    idle = [running(name, last_used=1.0 + i, size=30) for i, name in enumerate("xyz")]
    waiting = [wanted(name, waiting_s=age) for name, age in (("a", 1), ("b", 2))]
    assert plan(*idle, *waiting, max_starting=1).may_run == {"y", "z"}


def test_memory_that_a_function_waits_for_is_left_to_it() -> None:
    claim = MemoryClaim("f", 80, NOW)
    assert plan(wanted("b", last_used=NOW - 1), claims=(claim,)).may_run == frozenset()
    assert plan(wanted("b", last_used=NOW + 1), claims=(claim,)).may_run == {"b"}


def test_router_larger_than_the_limit_runs_alone() -> None:
    large, idle = wanted("large", size=3 * LIMIT), running("idle", last_used=10.0)
    assert plan(large, idle).may_run == frozenset()
    assert plan(large).may_run == {"large"}


def test_router_that_is_not_wanted_any_more_ends() -> None:
    ending = replace(running("a", last_used=NOW), is_wanted=False)
    assert plan(ending).may_run == frozenset()


routers = st.builds(
    RouterMemory,
    name=st.sampled_from([f"{name}/0" for name in "abcdefgh"]),
    size_bytes=st.integers(1, 120),
    last_used=st.floats(0, NOW),
    is_running=st.booleans(),
    is_wanted=st.booleans(),
    waiting_since=st.floats(0, NOW),
)


@settings(max_examples=300)
@given(
    st.lists(routers, unique_by=lambda r: r.name),
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.floats(0, NOW), st.integers(1, 60)), max_size=6
    ),
    st.integers(1, 4),
)
def test_what_starts_fits_and_nothing_in_use_is_evicted(
    found: list[RouterMemory], sizes: list[tuple[str, float, int]], max_starting: int
) -> None:
    functions = [
        (model, MemoryHolder(("s", f"f{i}"), size, at)) for i, (model, at, size) in enumerate(sizes)
    ]
    models = {
        name: ModelMemory(tuple(f for model, f in functions if model == name))
        for name in "abcdefgh"
    }
    got = plan(*found, models=models, max_starting=max_starting)
    may_run = {f"{name}/0" for name in got.may_run}
    held = sum(min(r.size_bytes, 90) for r in found if r.is_running)
    held += sum(f.size_bytes for _, f in functions)
    started = [r for r in found if r.name in may_run and not r.is_running]
    if started:
        assert held + sum(min(r.size_bytes, 90) for r in started) <= LIMIT
    assert len(started) <= max_starting
    ended = [r for r in found if r.is_running and r.is_wanted and r.name not in may_run]
    assert all(r.last_used <= NOW - 0.05 for r in ended)
    assert all(f.last_used <= NOW - 2 for f in got.evicted)
    assert all(r.is_wanted for r in found if r.name in may_run)


# One model's plan, which sees what others hold.


def plan_model(
    demands: list[FunctionDemand], *sandboxes: ObservedSandbox, machine: MachineMemory
) -> SandboxPlan:
    fleet = FleetSettings("t", warm_pool=1, max_creates=0, shape=SandboxShape(8), machine=machine)
    return plan_sandboxes(fleet, demands, sandboxes=sandboxes, now=NOW)


def sandbox(*assignments: Assignment) -> ObservedSandbox:
    return ObservedSandbox("own", SandboxState.READY, "t", 900.0, assignments)


def demand(name: str, *, last_used: float = NOW) -> FunctionDemand:
    return FunctionDemand(name, 1, 40, last_used=last_used)


def test_function_of_another_model_makes_room() -> None:
    old, newer = function("old", last_used=10.0), function("newer", last_used=20.0)
    got = plan_model([demand("f")], sandbox(), machine=MachineMemory(LIMIT, (newer, old)))
    assert got.actions == ()
    assert got.evicted_elsewhere == (old,)
    assert got.claims == (MemoryClaim("f", 40, NOW),)
    leaving = replace(old, is_leaving=True, is_evictable=False)
    waiting = plan_model([demand("f")], sandbox(), machine=MachineMemory(LIMIT, (newer, leaving)))
    assert (waiting.actions, waiting.evicted_elsewhere) == ((), ())
    free = plan_model([demand("f")], sandbox(), machine=MachineMemory(LIMIT, (newer,)))
    assert free.actions == (Attach("own", "f", ActionReason.DEMAND),)
    assert free.claims == ()


def test_own_function_makes_room_if_it_was_used_less_recently_than_others() -> None:
    own = sandbox(Assignment("own1", memory_bytes=40, last_used=10.0))
    machine = MachineMemory(LIMIT, (function("other", last_used=20.0),))
    got = plan_model([demand("own1", last_used=10.0), demand("f")], own, machine=machine)
    assert got.actions == (Detach("own", "own1", ActionReason.MEMORY),)
    assert got.evicted_elsewhere == ()


def test_function_leaves_memory_to_what_was_used_more_recently() -> None:
    claim = MemoryClaim("g", 80, NOW)
    got = plan_model(
        [demand("f", last_used=NOW - 5)], sandbox(), machine=MachineMemory(LIMIT, (), (claim,))
    )
    assert got.actions == ()
    assert got.waiting_for_memory == ("f",)


def test_function_that_is_known_to_be_idle_makes_room_at_once() -> None:
    just_used = function("other", last_used=NOW - 0.5, size=80)
    machine = MachineMemory(LIMIT, (just_used,))
    assert plan_model([demand("f")], sandbox(), machine=machine).evicted_elsewhere == ()
    idle = replace(just_used, is_idle=True)
    got = plan_model([demand("f")], sandbox(), machine=MachineMemory(LIMIT, (idle,)))
    assert got.evicted_elsewhere == (idle,)


def test_function_larger_than_the_machine_cannot_be_placed() -> None:
    got = plan_model([demand("f")], sandbox(), machine=MachineMemory(39))
    assert got.unschedulable == ("f",)


def test_functions_of_a_sandbox_that_ends_are_leaving() -> None:
    ending = replace(sandbox(Assignment("f", memory_bytes=1)), state=SandboxState.DRAINING)
    assert function_holders([ending], pinned=[]) == [
        MemoryHolder(("own", "f"), 1, 0.0, is_evictable=False, is_leaving=True)
    ]


def test_functions_are_seen_by_others_with_what_may_be_evicted() -> None:
    own = sandbox(
        Assignment("idle", memory_bytes=1, last_used=3.0),
        Assignment("pinned", memory_bytes=2),
        Assignment("coming", AssignmentState.ATTACHING, 4),
        Assignment("going", AssignmentState.DETACHING, 8),
    )
    assert function_holders([own], pinned=["pinned"]) == [
        MemoryHolder(("own", "idle"), 1, 3.0),
        MemoryHolder(("own", "pinned"), 2, 0.0, is_evictable=False, is_pinned=True),
        MemoryHolder(("own", "coming"), 4, 0.0, is_evictable=False),
        MemoryHolder(("own", "going"), 8, 0.0, is_evictable=False, is_leaving=True),
    ]
