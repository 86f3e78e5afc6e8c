"""The functions of a model: the real autoscalers and the real sandbox plan, in simulated time.

Decisions are `FunctionAutoscalers` and `plan_sandboxes`, as the operator makes them; this module
only lets their actions take as long as was measured. Functions of equal size, scaling and experts
see the same load, since every step calls all layers, so one autoscaler decides for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.events import Event, EventLoop, Integral
from benchmarks.simulation.nodes import Nodes, Pod

from faasmoe_operator.control.autoscalers import FunctionAutoscalers
from faasmoe_operator.control.controller import ControllerTiming
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.plan.actions import Action, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    ObservedSandbox,
    SandboxState,
)
from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy
from faasmoe_operator.plan.sandboxes import plan_sandboxes

TIMING = ControllerTiming()
LOSS_DETECTED_S = TIMING.adopt_timeout_s
"""Until a sandbox of a lost node is marked as failed: as long as the control process waits."""


@dataclass(frozen=True, slots=True)
class FleetModel:
    """What a fleet runs.

    Attributes:
        functions: all functions.
        thresholds: fewest tokens that probably need each function, in the same order.
        settings: settings of the sandbox plan.
        n_layers: MoE layers.
        sandbox_request_bytes: memory that a sandbox reserves in its node.
        is_one_machine: whether sandboxes are forked from one process, whose memory they share.
        resize: what pods of sandboxes request where they are resized in place; this is counted, and
            nodes still reserve the fixed size.
    """

    functions: tuple[ManagedFunction, ...]
    thresholds: tuple[int, ...]
    settings: FleetSettings
    n_layers: int
    sandbox_request_bytes: int
    is_one_machine: bool
    resize: ResizePolicy


NOTHING = PodRequests(0, 0)


@dataclass(slots=True, eq=False)
class _Sandbox:
    """A sandbox and its functions' states; `observed` is what the plan sees, None if it changed."""

    id: str
    created_at: float
    pod: Pod
    state: SandboxState = SandboxState.STARTING
    functions: dict[int, AssignmentState] = field(default_factory=dict)
    detaches: dict[int, Event] = field(default_factory=dict)
    is_lost: bool = False
    requested: PodRequests = NOTHING
    observed: ObservedSandbox | None = None


@dataclass(slots=True, eq=False)
class _Class:
    """Functions that one autoscaler decides for: the autoscaler's function and all members."""

    representative: ManagedFunction
    threshold: int
    members: list[int] = field(default_factory=list)


class FunctionFleet:
    """The sandboxes of one model.

    Args:
        loop: the clock.
        nodes: where sandboxes are placed.
        model: the model.
        costs: how long actions take.
        memory_bytes: memory in use of the whole system.
        on_changed: called when functions became available or went missing.
    """

    def __init__(
        self,
        loop: EventLoop,
        nodes: Nodes,
        model: FleetModel,
        costs: Calibration,
        *,
        memory_bytes: Integral,
        on_changed: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._nodes = nodes
        self._model = model
        self._costs = costs
        self._memory_bytes = memory_bytes
        self._on_changed = on_changed
        self._classes = _classes(model)
        self._class_of = {i: c for c in self._classes for i in c.members}
        self._index = {function.id: i for i, function in enumerate(model.functions)}
        representatives = [c.representative for c in self._classes]
        self._autoscalers = FunctionAutoscalers(representatives, observed=None, now=loop.now)
        self._sandboxes: dict[str, _Sandbox] = {}
        self._unplaced: dict[str, _Sandbox] = {}
        self._ready = [0] * len(model.functions)
        self._last_used = 0.0
        self._n_created = 0
        self._n_attaching = 0
        self._control_free_s = 0.0
        self._node_free_s: dict[int, float] = {}
        self._plan_event: Event | None = None
        self.n_sandboxes = Integral(loop)
        self.requested_bytes = Integral(loop)
        """Memory that pods of sandboxes request where they are resized in place."""
        self.requested_cores = Integral(loop)
        if model.is_one_machine:
            memory_bytes.add(costs.runtime_bytes)
        self._plan()

    @property
    def activated_below_tokens(self) -> float:
        """Requests of fewer tokens than this need no missing function."""
        missing = (c.threshold for c in self._classes if self._n_ready(c) == 0)
        return min(missing, default=math.inf)

    @property
    def n_hosts(self) -> int:
        """Nodes that hold sandboxes."""
        used = {id(node) for s in self._sandboxes.values() for node in s.pod.nodes}
        return max(1, len(used))

    def activate(self) -> None:
        """Ask for the activation of all functions: any prompt of some tokens needs all of them."""
        now = self._loop.now
        self._last_used = now
        ids = [c.representative.id for c in self._classes]
        if self._autoscalers.activate(ids, now=now):
            self._plan_in(self._costs.control_s)

    def resume(self) -> None:
        """Count the seconds since the last tick as idle: the ticks were skipped."""
        self._autoscalers.backfill({}, now=self._loop.now)

    def tick(self, calls_s: float, *, is_awaited: bool) -> None:
        """Record the last second's load of each function, decide and plan.

        Args:
            calls_s: seconds that calls of all layers were in flight in the last second.
            is_awaited: whether requests wait for functions: each counts as one call in flight.
        """
        now = self._loop.now
        if calls_s > 0 or is_awaited:
            self._last_used = now
        of_layer = calls_s / self._model.n_layers
        loads = {
            c.representative.id: of_layer * len(c.representative.spec.layers)
            + (1.0 if is_awaited and not self._n_ready(c) else 0.0)
            for c in self._classes
        }
        self._autoscalers.observe(loads, now=now)
        ready = {c.representative.id: self._n_ready(c) for c in self._classes}
        changes = self._autoscalers.decide(ready, now=now)
        if changes or self._is_progressing:
            self._plan()

    def is_idle(self) -> bool:
        """Return whether nothing changes without load or an activation."""
        ready = {c.representative.id: self._n_ready(c) for c in self._classes}
        return not self._is_progressing and self._autoscalers.is_idle(ready, now=self._loop.now)

    @property
    def _is_progressing(self) -> bool:
        return bool(
            self._n_attaching
            or self._plan_event
            or any(
                s.detaches or s.is_lost or s.state is not SandboxState.READY
                for s in self._sandboxes.values()
            )
        )

    def _n_ready(self, one: _Class) -> int:
        return min(self._ready[index] for index in one.members)

    def _plan_in(self, delay_s: float) -> None:
        if self._plan_event is None:
            self._plan_event = self._loop.after(delay_s, self._plan)

    def _plan(self) -> None:
        if self._plan_event is not None:
            self._plan_event.cancel()
            self._plan_event = None
        self._place_pending()
        desired = {c: self._autoscalers.desired(c.representative.id) for c in self._classes}
        self._cancel_detaches(desired)
        plan = plan_sandboxes(
            self._model.settings,
            self._demands(desired),
            sandboxes=[self._observe(s) for s in self._sandboxes.values()],
            now=self._loop.now,
        )
        for action in plan.actions:
            self._execute(action)

    def _demands(self, desired: dict[_Class, int]) -> Sequence[FunctionDemand]:
        return [
            FunctionDemand(
                function.id,
                desired[self._class_of[index]],
                function.size_bytes,
                function.anti_affinity_key,
                last_used=self._last_used,
                pinned=function.scaling.min_scale > 0,
            )
            for index, function in enumerate(self._model.functions)
        ]

    def _observe(self, sandbox: _Sandbox) -> ObservedSandbox:
        if sandbox.observed is None:
            sandbox.observed = ObservedSandbox(
                sandbox.id,
                sandbox.state,
                self._model.settings.template_hash,
                sandbox.created_at,
                tuple(
                    Assignment(
                        self._model.functions[index].id,
                        state,
                        self._model.functions[index].size_bytes,
                        self._last_used,
                        self._model.functions[index].anti_affinity_key,
                    )
                    for index, state in sandbox.functions.items()
                ),
            )
        return sandbox.observed

    def _execute(self, action: Action) -> None:
        match action:
            case Create():
                for _ in range(action.count):
                    self._create()
            case Delete():
                self._delete(self._sandboxes[action.sandbox])
            case Attach():
                self._attach(self._sandboxes[action.sandbox], self._index[action.function])
            case Detach():
                self._detach(self._sandboxes[action.sandbox], self._index[action.function])

    def _create(self) -> None:
        self._n_created += 1
        name = f"sandbox-{self._n_created}"
        pod = Pod(self._model.sandbox_request_bytes, on_lost=lambda: self._on_lost(sandbox))
        sandbox = self._sandboxes[name] = _Sandbox(name, self._loop.now, pod)
        self._unplaced[name] = sandbox
        self._place_pending()

    def _place_pending(self) -> None:
        """Place the sandboxes that wait for a node with free memory."""
        for name, sandbox in list(self._unplaced.items()):
            if not self._nodes.place(sandbox.pod):
                return
            del self._unplaced[name]
            self._memory_bytes.add(self._sandbox_bytes)
            self.n_sandboxes.add(1)
            self._resize(sandbox, self._model.resize.idle)
            self._loop.after(self._costs.sandbox_start_s, partial(self._on_started, sandbox))

    @property
    def _sandbox_bytes(self) -> float:
        runtime_bytes = 0.0 if self._model.is_one_machine else self._costs.runtime_bytes
        return self._costs.sandbox_bytes + runtime_bytes

    def _on_started(self, sandbox: _Sandbox) -> None:
        if sandbox.state is SandboxState.STARTING and not sandbox.is_lost:
            sandbox.state, sandbox.observed = SandboxState.READY, None
            self._plan_in(TIMING.coalesce_s)

    def _delete(self, sandbox: _Sandbox) -> None:
        del self._sandboxes[sandbox.id]
        sandbox.state = SandboxState.DRAINING
        for index, state in list(sandbox.functions.items()):
            if state is AssignmentState.ATTACHED and not sandbox.is_lost:
                self._ready[index] -= 1
            self._remove(sandbox, index)
        if self._unplaced.pop(sandbox.id, None) is None and not sandbox.is_lost:
            self._give_back(sandbox)

    def _resize(self, sandbox: _Sandbox, requests: PodRequests) -> None:
        before, sandbox.requested = sandbox.requested, requests
        self.requested_bytes.add(requests.memory_bytes - before.memory_bytes)
        self.requested_cores.add((requests.cpu_millis - before.cpu_millis) / 1000)

    def _resize_to_functions(self, sandbox: _Sandbox) -> None:
        sizes = (self._model.functions[index].size_bytes for index in sandbox.functions)
        self._resize(sandbox, self._model.resize.requests(sizes))

    def _give_back(self, sandbox: _Sandbox) -> None:
        self._resize(sandbox, NOTHING)
        self._nodes.remove(sandbox.pod)
        self._memory_bytes.add(-self._sandbox_bytes)
        self.n_sandboxes.add(-1)

    def _attach(self, sandbox: _Sandbox, index: int) -> None:
        sandbox.functions[index], sandbox.observed = AssignmentState.ATTACHING, None
        self._resize_to_functions(sandbox)
        self._n_attaching += 1
        size_bytes = self._model.functions[index].size_bytes
        self._memory_bytes.add(size_bytes * self._costs.attached_factor)
        now, node = self._loop.now, id(sandbox.pod.nodes[0]) if sandbox.pod.nodes else 0
        self._control_free_s = max(now, self._control_free_s) + self._costs.attach_s
        begin_s = max(self._control_free_s, self._node_free_s.get(node, 0.0))
        self._node_free_s[node] = end_s = begin_s + size_bytes / self._costs.weights_bytes_per_s
        self._loop.at(end_s, lambda: self._on_attached(sandbox, index))

    def _on_attached(self, sandbox: _Sandbox, index: int) -> None:
        self._n_attaching -= 1
        if sandbox.functions.get(index) is AssignmentState.ATTACHING and not sandbox.is_lost:
            sandbox.functions[index], sandbox.observed = AssignmentState.ATTACHED, None
            self._ready[index] += 1
            if self._ready[index] == 1:
                self._on_changed()
        if self._n_attaching == 0:
            self._plan_in(TIMING.coalesce_s)

    def _detach(self, sandbox: _Sandbox, index: int) -> None:
        if sandbox.functions.get(index) is not AssignmentState.ATTACHED:
            return
        sandbox.functions[index], sandbox.observed = AssignmentState.DETACHING, None
        self._ready[index] -= 1
        sandbox.detaches[index] = self._loop.after(
            TIMING.drain_s, lambda: self._on_detached(sandbox, index)
        )
        if self._ready[index] == 0:
            self._on_changed()

    def _on_detached(self, sandbox: _Sandbox, index: int) -> None:
        del sandbox.detaches[index]
        if sandbox.functions.get(index) is AssignmentState.DETACHING:
            self._remove(sandbox, index)
            self._plan_in(TIMING.coalesce_s)

    def _cancel_detaches(self, desired: dict[_Class, int]) -> None:
        """Keep functions that drain but are desired again, as the real executor does."""
        for sandbox in self._sandboxes.values():
            for index, event in list(sandbox.detaches.items()):
                if sandbox.is_lost or self._ready[index] >= desired[self._class_of[index]]:
                    continue
                event.cancel()
                del sandbox.detaches[index]
                sandbox.functions[index], sandbox.observed = AssignmentState.ATTACHED, None
                self._ready[index] += 1
                self._on_changed()

    def _remove(self, sandbox: _Sandbox, index: int) -> None:
        """Forget a function that is not ready any more, and give its memory back."""
        del sandbox.functions[index]
        sandbox.observed = None
        event = sandbox.detaches.pop(index, None)
        if event is not None:
            event.cancel()
        if not sandbox.is_lost:
            self._resize_to_functions(sandbox)
            size_bytes = self._model.functions[index].size_bytes
            self._memory_bytes.add(-size_bytes * self._costs.attached_factor)

    def _on_lost(self, sandbox: _Sandbox) -> None:
        """A lost node took the sandbox: its functions fail now, the plan learns it later."""
        attached = AssignmentState.ATTACHED
        lost = [index for index, state in sandbox.functions.items() if state is attached]
        size_bytes = sum(self._model.functions[i].size_bytes for i in sandbox.functions)
        self._memory_bytes.add(-size_bytes * self._costs.attached_factor - self._sandbox_bytes)
        self.n_sandboxes.add(-1)
        self._resize(sandbox, NOTHING)
        sandbox.is_lost = True
        for index in lost:
            self._ready[index] -= 1
        self._loop.after(LOSS_DETECTED_S, lambda: self._on_loss_detected(sandbox))
        self._on_changed()

    def _on_loss_detected(self, sandbox: _Sandbox) -> None:
        if sandbox.id in self._sandboxes:
            sandbox.state, sandbox.observed = SandboxState.FAILED, None
            self._plan()


def _classes(model: FleetModel) -> list[_Class]:
    classes: dict[object, _Class] = {}
    for index, (function, threshold) in enumerate(
        zip(model.functions, model.thresholds, strict=True)
    ):
        n_layers, n_experts = len(function.spec.layers), len(function.spec.experts)
        key = (n_layers, n_experts, function.size_bytes, function.scaling, threshold)
        classes.setdefault(key, _Class(function, threshold)).members.append(index)
    return list(classes.values())
