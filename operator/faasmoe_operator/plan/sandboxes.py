"""Which replicas have to go: those beyond the demand, and functions that nobody plans.

The sandbox plan: wanted replicas and observed sandboxes → create, delete, attach, detach.

The one place that decides what happens to sandboxes; pure, and run anew whenever something changed.
In each round:

1. Sandboxes that failed, or were not ready by their deadline, are deleted and count no more.
2. Replicas beyond the demand and functions that nobody plans are detached (`surplus`).
3. Missing replicas are placed, a function's first before another's second: attached where there is
   room now, else a place is kept where there soon will be, else a sandbox is created. Where all
   sandboxes together may take no more memory, others make room or the missing one waits (`budget`).
4. Replicas in sandboxes of an old template get a replacement in one of the current template, a few
   at a time; the old one is surplus, and goes, only when the new one serves.
5. The pool is filled to its size, counting only generic sandboxes that nothing was placed into.
   Those beyond it are deleted, and those of an old template as soon as the pool can do without.
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
    ObservedSandbox,
    Replica,
    SandboxState,
    live_replicas,
)
from faasmoe_operator.plan.memory_budget import MemoryBudget


def surplus_detaches(
    live: Mapping[str, Sequence[Replica]], desired: Mapping[str, int], *, template_hash: str
) -> list[Detach]:
    """Return the replicas to detach; as many as are wanted go on serving.

    Only replicas that serve can go, and only as many as serve beyond what is wanted: one that is
    still being attached is waited for, be it the replacement of the one to go or itself surplus.
    Those of an old template go first, then the least recently used.
    """
    detaches: list[Detach] = []
    for function, replicas in live.items():
        n_desired = desired.get(function)
        serving = sorted(
            (replica for replica in replicas if replica.is_serving),
            key=lambda replica: _removal_order(replica, template_hash),
        )
        for replica in serving[: max(0, len(serving) - (n_desired or 0))]:
            outdated = replica.sandbox.template_hash != template_hash
            reason = _detach_reason(n_desired, is_outdated=outdated)
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


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """What is to be done, in this order.

    Attributes:
        actions: attaching first, as callers wait for it; deleting last.
        unplaceable: functions that no sandbox can take, as they are larger than its memory limit.
        waiting: functions that wait for memory, as all that there is is in use.
    """

    actions: tuple[Action, ...]
    unschedulable: tuple[str, ...] = ()
    waiting_for_memory: tuple[str, ...] = ()


def plan_sandboxes(
    settings: FleetSettings,
    demands: Sequence[FunctionDemand],
    *,
    sandboxes: Sequence[ObservedSandbox],
    now: float,
) -> SandboxPlan:
    """Return what is to be done with the sandboxes at `now`.

    Args:
        settings: what the sandboxes should look like.
        demands: the functions of this plan, the most urgent first.
        sandboxes: all there are, as they are observed, actions in flight included.
        now: the time, on the clock of the sandboxes' `created_at`.
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
    )


def _delete_failed(
    settings: FleetSettings, sandboxes: Sequence[ObservedSandbox], *, now: float
) -> Iterator[Delete]:
    for sandbox in sandboxes:
        late = now - sandbox.created_at > settings.start_deadline_s
        if sandbox.state is SandboxState.FAILED:
            yield Delete(sandbox.id, ActionReason.FAILED)
        elif sandbox.state is SandboxState.STARTING and late:
            yield Delete(sandbox.id, ActionReason.START_TIMED_OUT)


class _SandboxPlanner:
    """One round's working state: what each sandbox still takes, as placing goes on."""

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
        """Functions that are wanted and that no sandbox can take."""

    def place_missing(self) -> list[Attach]:
        """Place the replicas that are missing; return those that find room now."""
        return self._place(self._missing(), self._bins, reason=ActionReason.DEMAND)

    def place_replacements(self) -> list[Attach]:
        """Place replacements of replicas in old sandboxes; return those that find room now."""
        reason = ActionReason.TEMPLATE_CHANGED
        return self._place(self._replaceable(), self._current_bins(), reason=reason)

    def plan_creates(self) -> list[Create]:
        """Return the sandboxes to create: for callers that wait, the pool, replacements."""
        n_generic = sum(known.is_generic for known in self._current_bins())
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
        """Return the generic sandboxes to delete: the newest beyond the pool, old templates."""
        idle = sorted(
            (known for known in self._bins if known.is_idle),
            key=lambda known: known.sandbox.age_key,
        )
        current = [known.sandbox.id for known in idle if self._is_current(known)]
        surplus_ids = current[self._settings.warm_pool :]
        outdated = [known.sandbox.id for known in idle if not self._is_current(known)]
        n_needed = max(0, self._settings.warm_pool - len(current))
        n_old = max(0, len(outdated) - n_needed)
        return [
            *(Delete(sandbox, ActionReason.TEMPLATE_CHANGED) for sandbox in outdated[:n_old]),
            *(Delete(sandbox, ActionReason.IDLE) for sandbox in surplus_ids),
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
        """Return each missing replica's demand: all first replicas, then all second ones.

        Of those that are to be kept apart, one of each group comes before another of any: placed in
        turn, sandboxes fill up with functions of different groups. Where memory is limited, those
        used last come first: one that made room does not take it back.
        """
        missing, n_in_group = [], Counter[tuple[int, str]]()
        is_limited = self._settings.memory_limit_bytes is not None
        for demand in self._demands.values():
            if not self._settings.fits_memory_limit(demand.memory_bytes):
                self.unschedulable |= {demand.function: None} if demand.replicas else {}
                continue
            for replica_index in range(len(self._live.get(demand.function, ())), demand.replicas):
                recency = -demand.last_used if is_limited else 0.0
                missing.append(
                    (
                        replica_index,
                        recency,
                        n_in_group[replica_index, demand.anti_affinity_key],
                        demand,
                    )
                )
                n_in_group[replica_index, demand.anti_affinity_key] += bool(
                    demand.anti_affinity_key
                )
        return [demand for *_, demand in sorted(missing, key=lambda item: item[:3])]

    def _replaceable(self) -> list[FunctionDemand]:
        """Return the functions that are to get a replacement now, oldest sandbox first."""
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
        # With fewer the missing one comes first; with more a replacement is under way.
        n_live = len(self._live[demand.function]) + self._n_attached[demand.function]
        return n_live == demand.replicas and self._settings.shape.fits(demand.memory_bytes)

    def _current_bins(self) -> list[Bin]:
        return [known for known in self._bins if self._is_current(known)]

    def _is_current(self, item: Bin | Replica) -> bool:
        return item.sandbox.template_hash == self._settings.template_hash
