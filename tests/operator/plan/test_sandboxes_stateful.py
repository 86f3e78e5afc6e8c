"""The sandbox plan against a simulated fleet in which every action takes time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from faasmoe_operator.plan.actions import Action, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.plan.sandboxes import plan_sandboxes

SIZES = {"f": 10, "g": 20, "h": 30, "i": 40, "j": 50}
FUNCTIONS = sorted(SIZES)
ANTI_AFFINITY_KEYS = {"f": "0", "g": "0", "h": "1", "i": "1", "j": ""}
ATTACHED, ATTACHING, DETACHING = (
    AssignmentState.ATTACHED,
    AssignmentState.ATTACHING,
    AssignmentState.DETACHING,
)
PASSES_TO_CONVERGE = 200


class FakeFleet:
    """Sandboxes that assert what real ones would check."""

    def __init__(self, shape: SandboxShape) -> None:
        self.shape = shape
        self.sandboxes: dict[str, ObservedSandbox] = {}
        self._names = (f"s{n:03}" for n in itertools.count())

    def execute(self, action: Action, *, template: str, now: float) -> None:
        match action:
            case Create(count):
                for name in itertools.islice(self._names, count):
                    self.sandboxes[name] = ObservedSandbox(
                        name, SandboxState.STARTING, template, now
                    )
            case Delete(name):
                assert self.sandboxes[name].state in {SandboxState.READY, SandboxState.FAILED}
                self._set(name, state=SandboxState.DRAINING)
            case Attach(name, function):
                self._attach(self.sandboxes[name], function, now=now)
            case Detach(name, function):
                assignments = {a.function: a for a in self.sandboxes[name].assignments}
                assert assignments[function].state is ATTACHED
                assignments[function] = replace(assignments[function], state=DETACHING)
                self._set(name, assignments=tuple(assignments.values()))

    def progress(self, name: str) -> None:
        """Complete all actions in progress in one sandbox."""
        sandbox = self.sandboxes[name]
        if sandbox.state is SandboxState.DRAINING:
            del self.sandboxes[name]
            return
        if sandbox.state is SandboxState.STARTING:
            self._set(name, state=SandboxState.READY)
        remaining = (a for a in sandbox.assignments if a.state is not DETACHING)
        self._set(name, assignments=tuple(replace(a, state=ATTACHED) for a in remaining))

    def fail(self, name: str) -> None:
        self._set(name, state=SandboxState.FAILED)

    def use(self, name: str, *, now: float) -> None:
        used = tuple(replace(a, last_used=now) for a in self.sandboxes[name].assignments)
        self._set(name, assignments=used)

    def serving(self, function: str) -> int:
        return sum(
            a.function == function and a.state is ATTACHED
            for sandbox in self.sandboxes.values()
            if sandbox.state is SandboxState.READY
            for a in sandbox.assignments
        )

    def _attach(self, sandbox: ObservedSandbox, function: str, *, now: float) -> None:
        assert sandbox.state is SandboxState.READY
        assert function not in {a.function for a in sandbox.assignments}
        added = Assignment(
            function,
            ATTACHING,
            memory_bytes=SIZES[function],
            last_used=now,
            anti_affinity_key=ANTI_AFFINITY_KEYS[function],
        )
        self._set(sandbox.id, assignments=(*sandbox.assignments, added))

    def _set(self, name: str, **changes: Any) -> None:
        self.sandboxes[name] = replace(self.sandboxes[name], **changes)


class PlanMachine(RuleBasedStateMachine):
    """Demand, template, pool size and failures change at any time; plans execute in between."""

    @initialize(
        capacity=st.integers(1, 3),
        limit=st.sampled_from([None, 50, 70]),
        pool=st.integers(0, 3),
        creates=st.integers(1, 4),
        surge=st.integers(1, 2),
    )
    def initialize_fleet(
        self, capacity: int, limit: int | None, pool: int, creates: int, surge: int
    ) -> None:
        shape = SandboxShape(capacity, limit)
        self.fleet = FakeFleet(shape)
        self.desired = dict.fromkeys(FUNCTIONS, 0)
        self.now = 0.0
        self.settings = FleetSettings(
            "t0", warm_pool=pool, shape=shape, max_creates=creates, max_surge=surge
        )

    @rule(function=st.sampled_from(FUNCTIONS), replicas=st.integers(0, 3))
    def scale(self, function: str, replicas: int) -> None:
        self.desired[function] = replicas

    @rule(function=st.sampled_from(FUNCTIONS))
    def remove_demand(self, function: str) -> None:
        self.desired.pop(function, None)

    @rule(pool=st.integers(0, 3))
    def resize_pool(self, pool: int) -> None:
        self.settings = replace(self.settings, warm_pool=pool)

    @rule(template=st.sampled_from(["t0", "t1", "t2"]))
    def change_template(self, template: str) -> None:
        self.settings = replace(self.settings, template_hash=template)

    @precondition(lambda self: self.fleet.sandboxes)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.fleet.sandboxes)))
        if self.fleet.sandboxes[name].state is not SandboxState.DRAINING:
            self.fleet.fail(name)

    @precondition(lambda self: self.fleet.sandboxes)
    @rule(data=st.data())
    def progress_some(self, data: st.DataObject) -> None:
        names = st.sets(st.sampled_from(sorted(self.fleet.sandboxes)))
        for name in sorted(data.draw(names)):
            self.fleet.progress(name)

    @precondition(lambda self: self.fleet.sandboxes)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.fleet.sandboxes)))
        self.fleet.use(name, now=self.now)

    @rule()
    def step(self) -> None:
        before = {function: self.fleet.serving(function) for function in FUNCTIONS}
        actions = self.plan()
        self.check_actions(actions)
        for action in actions:
            self.fleet.execute(action, template=self.settings.template_hash, now=self.now)
        for function, serving in before.items():
            assert self.fleet.serving(function) >= min(serving, self.desired.get(function, 0))
        self.now += 1

    @rule()
    def plan_twice(self) -> None:
        self.step()
        again = self.plan()
        if sum(a.count for a in again if isinstance(a, Create)) == 0:
            assert again == ()
        else:
            # Only creates that exceeded the limit of one pass may remain.
            assert all(isinstance(action, Create) for action in again)
            assert self.last_created == self.settings.max_creates

    @rule()
    def converge(self) -> None:
        for _ in range(PASSES_TO_CONVERGE):
            for name in sorted(self.fleet.sandboxes):
                self.fleet.progress(name)
            before = dict(self.fleet.sandboxes)
            self.step()
            if self.fleet.sandboxes == before:
                break
        else:
            raise AssertionError("the plan did not converge")
        self.check_converged()

    @invariant()
    def sandboxes_never_exceed_their_shape(self) -> None:
        limit = self.settings.shape.memory_limit_bytes
        for sandbox in self.fleet.sandboxes.values():
            functions = [a.function for a in sandbox.assignments]
            assert len(functions) == len(set(functions))
            assert len(functions) <= self.settings.shape.capacity
            if limit is not None:
                assert sum(a.memory_bytes for a in sandbox.assignments) <= limit

    def plan(self) -> tuple[Action, ...]:
        demands = [
            FunctionDemand(f, n, SIZES[f], ANTI_AFFINITY_KEYS[f]) for f, n in self.desired.items()
        ]
        plan = plan_sandboxes(
            self.settings, demands, sandboxes=tuple(self.fleet.sandboxes.values()), now=self.now
        )
        assert plan.unschedulable == ()
        return plan.actions

    def check_actions(self, actions: tuple[Action, ...]) -> None:
        self.last_created = sum(a.count for a in actions if isinstance(a, Create))
        assert self.last_created <= self.settings.max_creates
        assert len(set(actions)) == len(actions)
        for action in actions:
            if isinstance(action, Delete):
                sandbox = self.fleet.sandboxes[action.sandbox]
                assert sandbox.state is SandboxState.FAILED or not sandbox.assignments

    def check_converged(self) -> None:
        for function in FUNCTIONS:
            assert self.fleet.serving(function) == self.desired.get(function, 0)
        sandboxes = self.fleet.sandboxes.values()
        assert all(s.state is SandboxState.READY for s in sandboxes)
        assert {s.template_hash for s in sandboxes} <= {self.settings.template_hash}
        generic = [s for s in sandboxes if not s.assignments]
        assert len(generic) == self.settings.warm_pool


TestSandboxPlan = PlanMachine.TestCase
TestSandboxPlan.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
