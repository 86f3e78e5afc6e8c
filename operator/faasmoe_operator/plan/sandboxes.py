"""The sandbox plan: desired replicas and observed sandboxes → create, delete, attach, detach.

The only place that decides what happens to sandboxes. It is pure and recomputed in each pass:

1. Sandboxes that failed or missed the start deadline are deleted and ignored from then on.
2. Surplus replicas and functions that are not in the plan are detached.
3. Missing replicas are placed, all first replicas before second ones: they are attached where there
   is free capacity now, else they reserve capacity that becomes free, else a sandbox is created.
   If that would exceed a memory limit, functions are evicted or the missing one
   waits (`memory_budget`).
4. Replicas in sandboxes with an outdated template get replacements in current ones, at most
   `max_surge` at a time. The old replica becomes surplus only once the new one is ready.
5. The warm pool is filled with empty sandboxes into which nothing was placed. Surplus ones are
   deleted, and outdated ones as soon as the pool does not need them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from faasmoe_operator.plan.actions import Action, ActionReason, Attach, Create, Delete, Detach
from faasmoe_operator.plan.bin_packing import Bin, BinPacker, FreeCapacity
from faasmoe_operator.plan.fleet import (
    FleetSettings,
    FunctionDemand,
    MemoryClaim,
    MemoryHolder,
    ObservedSandbox,
    Replica,
    SandboxState,
    live_replicas,
)
from faasmoe_operator.plan.memory_budget import MemoryBudget


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """The planned actions, and the functions that could not be placed.

    Attributes:
        actions: in the order of execution: attaches first, as requests wait for them; deletes last.
        unschedulable: functions that exceed the memory limit of every sandbox.
        waiting_for_memory: functions that wait because all memory is in use.
        evicted_elsewhere: what is to make room that is not the model's.
        claims: the functions that have no memory of the machine yet, whether it is being freed or
            not.
    """

    actions: tuple[Action, ...]
    unschedulable: tuple[str, ...] = ()
    waiting_for_memory: tuple[str, ...] = ()
    evicted_elsewhere: tuple[MemoryHolder, ...] = ()
    claims: tuple[MemoryClaim, ...] = ()


def plan_sandboxes(
    settings: FleetSettings,
    demands: Sequence[FunctionDemand],
    *,
    sandboxes: Sequence[ObservedSandbox],
    now: float,
) -> SandboxPlan:
    """Plan the actions on a model's sandboxes.

    Args:
        settings: desired state of the sandboxes.
        demands: every function of the model, the most urgent first.
        sandboxes: all observed sandboxes, actions in progress included.
        now: current time, on the same clock as the sandboxes' `created_at`.
    """
    failed = list(_delete_failed(settings, sandboxes, now=now))
    deleted = {delete.sandbox for delete in failed}
    alive = [s for s in sandboxes if s.id not in deleted and s.state is not SandboxState.DRAINING]
    planner = _SandboxPlanner(settings, demands, alive, sandboxes=sandboxes, now=now)
    attaches = planner.place_missing()
    replacements = planner.place_replacements()
    actions: tuple[Action, ...] = (
        *attaches,
        *planner.plan_creates(),
        *replacements,
        *planner.detaches,
        *planner.budget.evictions,
        *failed,
        *planner.plan_idle_deletes(),
    )
    return SandboxPlan(
        actions,
        unschedulable=tuple(planner.unschedulable),
        waiting_for_memory=tuple(planner.budget.waiting_functions),
        evicted_elsewhere=tuple(planner.budget.evicted_elsewhere),
        claims=tuple(planner.budget.claims),
    )


def _delete_failed(
    settings: FleetSettings, sandboxes: Sequence[ObservedSandbox], *, now: float
) -> Iterator[Delete]:
    for sandbox in sandboxes:
        is_late = now - sandbox.created_at > settings.start_deadline_s
        if sandbox.state is SandboxState.FAILED:
            yield Delete(sandbox.id, ActionReason.FAILED)
        elif sandbox.state is SandboxState.STARTING and is_late:
            yield Delete(sandbox.id, ActionReason.START_TIMED_OUT)


class _SandboxPlanner:
    """Working state of one plan: the free capacity of each sandbox while replicas are placed."""

    def __init__(
        self,
        settings: FleetSettings,
        demands: Sequence[FunctionDemand],
        alive: Sequence[ObservedSandbox],
        *,
        sandboxes: Sequence[ObservedSandbox],
        now: float,
    ) -> None:
        self._settings = settings
        self._demands = {demand.function: demand for demand in demands}
        desired = {demand.function: demand.replicas for demand in demands}
        live = live_replicas(alive)
        self.detaches = surplus_detaches(live, desired, template_hash=settings.template_hash)
        detaching = {(detach.sandbox, detach.function) for detach in self.detaches}
        self._live: Mapping[str, list[Replica]] = {
            function: [replica for replica in replicas if replica.key not in detaching]
            for function, replicas in live.items()
        }
        self.budget = MemoryBudget(
            settings, sandboxes=sandboxes, retained=self._live, demands=self._demands, now=now
        )
        self._bins = [
            Bin.from_sandbox(sandbox, settings.shape, detaching=detaching) for sandbox in alive
        ]
        self._new_sandboxes: list[FreeCapacity] = []
        self._n_new_sandboxes: dict[ActionReason, int] = {}
        self._n_attached: Counter[str] = Counter()
        self.unschedulable: dict[str, None] = {}
        """Desired functions that fit in no sandbox."""

    def place_missing(self) -> list[Attach]:
        """Place the missing replicas; return the attaches that are possible now."""
        return self._place(self._missing(), self._bins, reason=ActionReason.DEMAND)

    def place_replacements(self) -> list[Attach]:
        """Place replacements of outdated replicas; return the attaches that are possible now."""
        reason = ActionReason.TEMPLATE_CHANGED
        return self._place(self._replaceable(), self._current_bins(), reason=reason)

    def plan_creates(self) -> list[Create]:
        """Return the sandboxes to create, for demand, the warm pool and replacements, in order."""
        n_generic = sum(candidate.is_generic for candidate in self._current_bins())
        self._n_new_sandboxes[ActionReason.WARM_POOL] = max(0, self._settings.warm_pool - n_generic)
        n_allowed = self._settings.max_creates
        creates: list[Create] = []
        for reason in (ActionReason.DEMAND, ActionReason.WARM_POOL, ActionReason.TEMPLATE_CHANGED):
            count = min(n_allowed, self._n_new_sandboxes[reason])
            n_allowed -= count
            if count > 0:
                creates.append(Create(count, reason))
        return creates

    def plan_idle_deletes(self) -> list[Delete]:
        """Return the deletes of outdated idle sandboxes and of the newest beyond the warm pool."""
        idle = sorted(
            (candidate for candidate in self._bins if candidate.is_idle),
            key=lambda candidate: candidate.sandbox.age_key,
        )
        current = [candidate.sandbox.id for candidate in idle if self._is_current(candidate)]
        outdated = [candidate.sandbox.id for candidate in idle if not self._is_current(candidate)]
        n_needed = max(0, self._settings.warm_pool - len(current))
        n_deleted = max(0, len(outdated) - n_needed)
        return [
            *(Delete(sandbox, ActionReason.TEMPLATE_CHANGED) for sandbox in outdated[:n_deleted]),
            *(
                Delete(sandbox, ActionReason.IDLE)
                for sandbox in current[self._settings.warm_pool :]
            ),
        ]

    def _place(
        self, demands: Iterable[FunctionDemand], bins: Iterable[Bin], *, reason: ActionReason
    ) -> list[Attach]:
        packer = BinPacker(self._settings, bins, new_sandboxes=self._new_sandboxes)
        placed = [
            (packer.place(demand), demand.function)
            for demand in demands
            if self.budget.admit(demand)
        ]
        attaches = [Attach(s.id, function, reason) for s, function in placed if s is not None]
        self._n_new_sandboxes[reason] = packer.n_new_sandboxes
        self.unschedulable |= packer.unschedulable
        self._n_attached.update(attach.function for attach in attaches)
        return attaches

    def _missing(self) -> list[FunctionDemand]:
        """Return the demand of each missing replica, in the order of placement.

        All first replicas come before all second ones. Where memory is limited, recently used
        functions come first, so that an evicted function does not take its memory back. Then
        anti-affinity keys alternate, so that sandboxes fill up with functions of different keys.
        """
        missing, n_by_key = [], Counter[tuple[int, str]]()
        is_limited = self._settings.is_memory_limited
        for demand in self._demands.values():
            if not self._settings.fits_memory_limit(demand.memory_bytes):
                self.unschedulable |= {demand.function: None} if demand.replicas else {}
                continue
            recency = -demand.last_used if is_limited else 0.0
            for index in range(len(self._live.get(demand.function, ())), demand.replicas):
                key = (index, demand.anti_affinity_key)
                missing.append((index, recency, n_by_key[key], demand))
                n_by_key[key] += bool(demand.anti_affinity_key)
        return [demand for *_, demand in sorted(missing, key=lambda item: item[:3])]

    def _replaceable(self) -> list[FunctionDemand]:
        """Return the functions to place a replacement for now, oldest sandbox first."""
        serving = (r for replicas in self._live.values() for r in replicas if r.is_serving)
        outdated = sorted(
            (replica for replica in serving if not self._is_current(replica)),
            key=lambda replica: (replica.sandbox.age_key, replica.assignment.function),
        )
        functions = dict.fromkeys(replica.assignment.function for replica in outdated)
        demands = [self._demands[f] for f in functions if f in self._demands]
        too_large = (d for d in demands if not self._settings.shape.fits(d.memory_bytes))
        self.unschedulable |= dict.fromkeys(d.function for d in too_large)
        n_in_progress = sum(len(self._live[d.function]) > d.replicas for d in demands)
        eligible = [d for d in demands if self._can_replace_now(d)]
        return eligible[: max(0, self._settings.max_surge - n_in_progress)]

    def _can_replace_now(self, demand: FunctionDemand) -> bool:
        # Fewer: the missing replica comes first. More: a replacement is already in progress.
        n_live = len(self._live[demand.function]) + self._n_attached[demand.function]
        return n_live == demand.replicas and self._settings.shape.fits(demand.memory_bytes)

    def _current_bins(self) -> list[Bin]:
        return [candidate for candidate in self._bins if self._is_current(candidate)]

    def _is_current(self, item: Bin | Replica) -> bool:
        return item.sandbox.template_hash == self._settings.template_hash


def surplus_detaches(
    live: Mapping[str, Sequence[Replica]], desired: Mapping[str, int], *, template_hash: str
) -> list[Detach]:
    """Return the detaches of surplus replicas.

    Only ready replicas in excess of the desired number are detached. A replica that is still being
    attached does not count, whether it is a replacement or itself surplus. Replicas in outdated
    sandboxes go first, then the least recently used.
    """
    detaches: list[Detach] = []
    for function, replicas in live.items():
        n_desired = desired.get(function)
        serving = sorted(
            (replica for replica in replicas if replica.is_serving),
            key=lambda replica: _removal_order(replica, template_hash),
        )
        for replica in serving[: max(0, len(serving) - (n_desired or 0))]:
            is_outdated = replica.sandbox.template_hash != template_hash
            reason = _detach_reason(n_desired, is_outdated=is_outdated)
            detaches.append(Detach(replica.sandbox.id, function, reason))
    return detaches


def _removal_order(replica: Replica, template_hash: str) -> tuple[bool, float, str]:
    is_current = replica.sandbox.template_hash == template_hash
    return (is_current, replica.assignment.last_used, replica.sandbox.id)


def _detach_reason(n_desired: int | None, *, is_outdated: bool) -> ActionReason:
    if n_desired is None:
        return ActionReason.NOT_PLANNED
    if is_outdated and n_desired > 0:
        return ActionReason.TEMPLATE_CHANGED
    return ActionReason.SURPLUS
