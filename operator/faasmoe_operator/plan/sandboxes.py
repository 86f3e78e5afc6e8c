"""The sandbox plan: wanted replicas and observed sandboxes → create, delete, attach, detach.

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

from faasmoe_operator.plan.actions import Action, ActionReason, Attach, Create, Delete
from faasmoe_operator.plan.bins import Bin, Placement, Room
from faasmoe_operator.plan.budget import Budget
from faasmoe_operator.plan.fleet import (
    Demand,
    FleetSettings,
    Replica,
    Sandbox,
    SandboxState,
    live_replicas,
)
from faasmoe_operator.plan.surplus import surplus


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """What is to be done, in this order.

    Attributes:
        actions: attaching first, as callers wait for it; deleting last.
        unplaceable: functions that no sandbox can take, as they are larger than its memory limit.
        waiting: functions that wait for memory, as all that there is is in use.
    """

    actions: tuple[Action, ...]
    unplaceable: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


def plan_sandboxes(
    settings: FleetSettings, demands: Sequence[Demand], *, sandboxes: Sequence[Sandbox], now: float
) -> SandboxPlan:
    """Return what is to be done with the sandboxes at `now`.

    Args:
        settings: what the sandboxes should look like.
        demands: the functions of this plan, the most urgent first.
        sandboxes: all there are, as they are observed, actions in flight included.
        now: the time, on the clock of the sandboxes' `created_at`.
    """
    dead = list(_dead(settings, sandboxes, now=now))
    gone = {delete.sandbox for delete in dead}
    alive = [s for s in sandboxes if s.id not in gone and s.state is not SandboxState.DRAINING]
    planning = _Round(settings, demands, alive, sandboxes=sandboxes, now=now)
    urgent = planning.place_missing()
    replacing = planning.place_replacements()
    actions: tuple[Action, ...] = (
        *urgent,
        *planning.creates(),
        *replacing,
        *planning.detaches,
        *planning.budget.detaches,
        *dead,
        *planning.delete_idle(),
    )
    return SandboxPlan(
        actions, unplaceable=tuple(planning.unplaceable), waiting=tuple(planning.budget.waiting)
    )


def _dead(settings: FleetSettings, sandboxes: Sequence[Sandbox], *, now: float) -> Iterator[Delete]:
    for sandbox in sandboxes:
        late = now - sandbox.created_at > settings.start_deadline_s
        if sandbox.state is SandboxState.FAILED:
            yield Delete(sandbox.id, ActionReason.FAILED)
        elif sandbox.state is SandboxState.STARTING and late:
            yield Delete(sandbox.id, ActionReason.START_TIMED_OUT)


class _Round:
    """One round's working state: what each sandbox still takes, as placing goes on."""

    def __init__(
        self,
        settings: FleetSettings,
        demands: Sequence[Demand],
        alive: Sequence[Sandbox],
        *,
        sandboxes: Sequence[Sandbox],
        now: float,
    ) -> None:
        self._settings = settings
        self._demands = {demand.function: demand for demand in demands}
        wanted = {demand.function: demand.replicas for demand in demands}
        live = live_replicas(alive)
        self.detaches = surplus(live, wanted, template_hash=settings.template_hash)
        leaving = {(detach.sandbox, detach.function) for detach in self.detaches}
        self._live: Mapping[str, list[Replica]] = {
            function: [replica for replica in replicas if replica.place not in leaving]
            for function, replicas in live.items()
        }
        self.budget = Budget(
            settings, sandboxes=sandboxes, staying=self._live, demands=self._demands, now=now
        )
        self._bins = [Bin.of(sandbox, settings.shape, leaving=leaving) for sandbox in alive]
        self._new: list[Room] = []
        self._n_new: dict[ActionReason, int] = {}
        self._n_attached: Counter[str] = Counter()
        self.unplaceable: dict[str, None] = {}
        """Functions that are wanted and that no sandbox can take."""

    def place_missing(self) -> list[Attach]:
        """Place the replicas that are missing; return those that find room now."""
        return self._place(self._missing(), self._bins, reason=ActionReason.DEMAND)

    def place_replacements(self) -> list[Attach]:
        """Place replacements of replicas in old sandboxes; return those that find room now."""
        reason = ActionReason.TEMPLATE_CHANGED
        return self._place(self._replaceable(), self._current(), reason=reason)

    def creates(self) -> list[Create]:
        """Return the sandboxes to create: for callers that wait, the pool, replacements."""
        generic = sum(known.generic for known in self._current())
        self._n_new[ActionReason.WARM_POOL] = max(0, self._settings.warm_pool - generic)
        left = self._settings.max_creates
        creates: list[Create] = []
        for reason in (ActionReason.DEMAND, ActionReason.WARM_POOL, ActionReason.TEMPLATE_CHANGED):
            count = min(left, self._n_new[reason])
            left -= count
            if count > 0:
                creates.append(Create(count, reason))
        return creates

    def delete_idle(self) -> list[Delete]:
        """Return the generic sandboxes to delete: the newest beyond the pool, old templates."""
        idle = sorted(
            (known for known in self._bins if known.idle),
            key=lambda known: known.sandbox.age_order,
        )
        current = [known.sandbox.id for known in idle if self._is_current(known)]
        beyond = current[self._settings.warm_pool :]
        outdated = [known.sandbox.id for known in idle if not self._is_current(known)]
        n_needed = max(0, self._settings.warm_pool - len(current))
        n_old = max(0, len(outdated) - n_needed)
        return [
            *(Delete(sandbox, ActionReason.TEMPLATE_CHANGED) for sandbox in outdated[:n_old]),
            *(Delete(sandbox, ActionReason.IDLE) for sandbox in beyond),
        ]

    def _place(
        self, demands: Iterable[Demand], bins: Iterable[Bin], *, reason: ActionReason
    ) -> list[Attach]:
        placement = Placement(self._settings, bins, new=self._new)
        placed = [
            (placement.place(demand), demand.function)
            for demand in demands
            if self.budget.admits(demand)
        ]
        attaches = [Attach(s.id, function, reason) for s, function in placed if s is not None]
        self._n_new[reason] = placement.n_new
        self.unplaceable |= placement.unplaceable
        self._n_attached.update(attach.function for attach in attaches)
        return attaches

    def _missing(self) -> list[Demand]:
        """Return each missing replica's demand: all first replicas, then all second ones.

        Of those that are to be kept apart, one of each group comes before another of any: placed in
        turn, sandboxes fill up with functions of different groups. Where memory is limited, those
        used last come first: one that made room does not take it back.
        """
        missing, in_group = [], Counter[tuple[int, str]]()
        is_limited = self._settings.memory_limit_bytes is not None
        for demand in self._demands.values():
            if not self._settings.affords(demand.memory_bytes):
                self.unplaceable |= {demand.function: None} if demand.replicas else {}
                continue
            for nth in range(len(self._live.get(demand.function, ())), demand.replicas):
                unused = -demand.last_used if is_limited else 0.0
                missing.append((nth, unused, in_group[nth, demand.apart], demand))
                in_group[nth, demand.apart] += bool(demand.apart)
        return [demand for *_, demand in sorted(missing, key=lambda item: item[:3])]

    def _replaceable(self) -> list[Demand]:
        """Return the functions that are to get a replacement now, oldest sandbox first."""
        serving = (r for replicas in self._live.values() for r in replicas if r.serves)
        outdated = sorted(
            (replica for replica in serving if not self._is_current(replica)),
            key=lambda replica: (replica.sandbox.age_order, replica.assignment.function),
        )
        functions = dict.fromkeys(replica.assignment.function for replica in outdated)
        demands = [self._demands[f] for f in functions if f in self._demands]
        too_large = (d for d in demands if not self._settings.shape.takes(d.memory_bytes))
        self.unplaceable |= dict.fromkeys(d.function for d in too_large)
        under_way = sum(len(self._live[d.function]) > d.replicas for d in demands)
        due = [d for d in demands if self._is_due(d)]
        return due[: max(0, self._settings.max_surge - under_way)]

    def _is_due(self, demand: Demand) -> bool:
        # With fewer the missing one comes first; with more a replacement is under way.
        n_live = len(self._live[demand.function]) + self._n_attached[demand.function]
        return n_live == demand.replicas and self._settings.shape.takes(demand.memory_bytes)

    def _current(self) -> list[Bin]:
        return [known for known in self._bins if self._is_current(known)]

    def _is_current(self, place: Bin | Replica) -> bool:
        return place.sandbox.template_hash == self._settings.template_hash
