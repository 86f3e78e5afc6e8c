"""Whose turn it is: a virtual token counter for each tenant, ahead of the continuous batch. Pure.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
each tenant's counter grows with the service that it gets, in tokens by their price, over its
weight; a free slot goes to the tenant with the lowest counter; and who comes back from idle is
lifted to the lowest counter of those that wait, so that nobody saves up. Of two tenants that both
have requests waiting, neither gets ahead of the other by more than what can be in the batch at
once, however much either sends.

Two things are added. Priorities are strict: a tenant of a higher one goes first, always. And since
a batch's requests run for long, a tenant that finds every slot taken gets one at once if others
hold more than their share: the youngest request of the one that is furthest beyond its share goes
back to the head of its tenant's line and is continued later from the tokens that it has.

The queue decides and counts; who owns it starts, parks and ends what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from faasmoe_router.errors import TenantQueueFull

MAX_PREEMPTIONS = 3  # of one sequence: what it computes is computed again each time


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is entitled to.

    Attributes:
        weight: its part of the service, relative to the others'.
        priority: higher ones go first, whatever the weights.
        max_running: sequences that may run at once; None for as many as there are slots.
        max_queued: sequences that may wait; None for its part of the whole queue.
    """

    weight: float = 1.0
    priority: int = 0
    max_running: int | None = None
    max_queued: int | None = None


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """What a token costs; generated ones cost more, as in the paper."""

    prompt: float = 1.0
    generated: float = 2.0


@dataclass(slots=True)
class _QueuedSequence:
    """One sequence, from its arrival to its end."""

    tenant: str
    arrival_number: int
    n_prompt_tokens: int
    n_generated_tokens: int = 0
    n_preemptions: int = 0
    is_prompt_charged: bool = False

    @property
    def n_tokens(self) -> int:
        return self.n_prompt_tokens + self.n_generated_tokens


@dataclass(slots=True)
class _TenantBacklog:
    """One tenant's sequences, by id, the waiting ones in their order."""

    virtual_counter: float = 0.0
    drained_at_dispatch: float = float("-inf")
    waiting: dict[str, _QueuedSequence] = field(default_factory=dict)
    running: dict[str, _QueuedSequence] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running


class FairQueue:
    """Sequences that wait for a slot of the batch, by tenant, and those that have one.

    Args:
        slots: sequences that may run at once.
        max_queued: sequences that may wait, all together.
        price: what tokens cost.
    """

    def __init__(self, *, slots: int, max_queued: int, price: TokenPrice | None = None) -> None:
        self._slots = slots
        self._max_queued = max_queued
        self._price = price or TokenPrice()
        self._shares: Mapping[str, Share] = {}
        self._backlogs: dict[str, _TenantBacklog] = {}
        self._sequences: dict[str, _QueuedSequence] = {}
        self._last_drained_tenant: dict[
            int, str
        ] = {}  # by priority: the tenant that last ceased to wait
        self._n_arrivals = 0
        self._n_dispatched = 0
        self._n_running = 0

    @property
    def n_running(self) -> int:
        """Sequences that have a slot."""
        return self._n_running

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._sequences) - self._n_running

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return how many sequences of a tenant run, and how many wait."""
        backlog = self._backlogs.get(tenant)
        return (0, 0) if backlog is None else (len(backlog.running), len(backlog.waiting))

    def virtual_counter(self, tenant: str) -> float:
        """Return the service that a tenant has had: priced tokens over its weight, with lifts."""
        backlog = self._backlogs.get(tenant)
        return 0.0 if backlog is None else backlog.virtual_counter

    def is_running(self, sequence_id: str) -> bool:
        """Return whether a sequence has a slot."""
        sequence = self._sequences.get(sequence_id)
        return sequence is not None and sequence_id in self._backlogs[sequence.tenant].running

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Take the tenants' shares; lines that are idle and not among them are forgotten."""
        self._shares = dict(shares)
        for name in [n for n, line in self._backlogs.items() if line.is_idle and n not in shares]:
            del self._backlogs[name]

    def check_capacity(self, tenant: str, n_sequences: int) -> None:
        """Raise TenantQueueFull if so many more of a tenant can neither run nor wait."""
        running, waiting = self.sequence_counts(tenant)
        startable = 0
        if not waiting:
            limit = min(self._slots, self._share(tenant).max_running or self._slots)
            startable = max(0, min(self._slots - self._n_running, limit - running))
        capacity = self._queue_capacity(tenant)
        if waiting + n_sequences - startable > capacity:
            raise TenantQueueFull(
                f"{waiting} of your requests are queued already; at most {capacity} may, and each choice of "
                "a request counts"
            )

    def push(self, tenant: str, sequence_id: str, *, n_prompt_tokens: int) -> None:
        """Let a sequence wait at the end of its tenant's line; see `check_room`."""
        backlog = self._backlogs.setdefault(tenant, _TenantBacklog())
        if not backlog.waiting:
            self._lift_counter(tenant, backlog)
        self._n_arrivals += 1
        sequence = _QueuedSequence(tenant, self._n_arrivals, n_prompt_tokens)
        backlog.waiting[sequence_id] = self._sequences[sequence_id] = sequence

    def pop(self) -> str | None:
        """Give a free slot to whose turn it is; None if there is none, or nobody to take it."""
        tenant = self._next_tenant() if self._n_running < self._slots else None
        return None if tenant is None else self._start(tenant)

    def preempt(self) -> str | None:
        """Take a slot from who is beyond its share, for who waits within its own; None if nobody.

        The sequence is put back at the head of its tenant's line. Its slot is free: `pop` gives it.
        """
        tenant = self._next_tenant() if self._n_running >= self._slots else None
        if tenant is None or len(self._backlogs[tenant].running) + 1 > self._fair_slots(tenant):
            return None
        victim = self._select_victim(tenant)
        if victim is not None:
            backlog = self._backlogs[self._sequences[victim].tenant]
            sequence = backlog.running.pop(victim)
            sequence.n_preemptions += 1
            backlog.waiting = {victim: sequence, **backlog.waiting}
            self._n_running -= 1
        return victim

    def charge(self, sequence_id: str, n_generated_tokens: int) -> None:
        """Charge a sequence's tenant for tokens that were generated; unknown ones are free."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.n_generated_tokens += n_generated_tokens
            self._charge_tenant(sequence.tenant, self._price.generated * n_generated_tokens)

    def remove(self, sequence_id: str) -> None:
        """Forget a sequence, wherever it is; its slot, if it had one, is free."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        tenant, backlog = sequence.tenant, self._backlogs[sequence.tenant]
        if backlog.waiting.pop(sequence_id, None) is not None:
            self._record_drained(tenant, backlog)
        else:
            was_at_limit = backlog.waiting and not self._may_start(tenant, backlog)
            del backlog.running[sequence_id]
            self._n_running -= 1
            if was_at_limit:
                self._lift_counter(tenant, backlog)
        if backlog.is_idle and self._shares and tenant not in self._shares:
            del self._backlogs[tenant]

    def _share(self, tenant: str) -> Share:
        return self._shares.get(tenant, _DEFAULT_SHARE)

    def _queue_capacity(self, tenant: str) -> int:
        """Return how many may wait: each tenant has its own part, which no other can fill."""
        share = self._share(tenant)
        others = sum(s.weight for name, s in self._shares.items() if name != tenant)
        tenant_part = int(self._max_queued * share.weight / (share.weight + others))
        capacity = max(min(1, self._max_queued), tenant_part)
        return capacity if share.max_queued is None else min(capacity, share.max_queued)

    def _may_start(self, tenant: str, backlog: _TenantBacklog) -> bool:
        """Return whether a tenant could take a slot; one at its own limit counts as not waiting."""
        limit = self._share(tenant).max_running
        return bool(backlog.waiting) and (limit is None or len(backlog.running) < limit)

    def _lift_counter(self, tenant: str, backlog: _TenantBacklog) -> None:
        """Bring who comes back level with those that wait, so that idleness saves nothing up.

        Who sends one request after another does not come back: it waited until lately.
        """
        if self._n_dispatched - backlog.drained_at_dispatch <= self._slots:
            return
        priority = self._share(tenant).priority
        peers = {n: x for n, x in self._backlogs.items() if self._share(n).priority == priority}
        waiting = [
            x.virtual_counter
            for n, x in peers.items()
            if x is not backlog and self._may_start(n, x)
        ]
        last_drained = peers.get(self._last_drained_tenant.get(priority, ""))
        if waiting:
            level = min(waiting)
        elif last_drained is not None:
            level = last_drained.virtual_counter
        else:
            level = max(x.virtual_counter for x in peers.values())
        backlog.virtual_counter = max(backlog.virtual_counter, level)

    def _next_tenant(self) -> str | None:
        """Return the tenant whose turn it is: of the highest priority, the lowest counter."""
        candidates = [
            (name, line) for name, line in self._backlogs.items() if self._may_start(name, line)
        ]
        return min(candidates, key=lambda item: self._order_key(*item))[0] if candidates else None

    def _order_key(self, tenant: str, backlog: _TenantBacklog) -> tuple[float, float, float, int]:
        share = self._share(tenant)
        # Of equal counters, who holds less; then who has waited longer.
        weighted_running = len(backlog.running) / share.weight
        return (
            -share.priority,
            backlog.virtual_counter,
            weighted_running,
            next(iter(backlog.waiting.values())).arrival_number,
        )

    def _start(self, tenant: str) -> str:
        backlog = self._backlogs[tenant]
        sequence_id, sequence = next(iter(backlog.waiting.items()))
        backlog.running[sequence_id] = backlog.waiting.pop(sequence_id)
        self._n_running += 1
        self._n_dispatched += 1
        if not sequence.is_prompt_charged:
            sequence.is_prompt_charged = True
            self._charge_tenant(tenant, self._price.prompt * sequence.n_prompt_tokens)
        self._record_drained(tenant, backlog)
        return sequence_id

    def _charge_tenant(self, tenant: str, cost: float) -> None:
        self._backlogs[tenant].virtual_counter += cost / self._share(tenant).weight

    def _record_drained(self, tenant: str, backlog: _TenantBacklog) -> None:
        if not backlog.waiting:
            backlog.drained_at_dispatch = self._n_dispatched
            self._last_drained_tenant[self._share(tenant).priority] = tenant

    def _fair_slots(self, tenant: str) -> float:
        """Return a tenant's part of the slots among those of its priority that want any."""
        share = self._share(tenant)
        active = [self._share(n) for n, line in self._backlogs.items() if not line.is_idle]
        total_weight = sum(other.weight for other in active if other.priority == share.priority)
        return max(1.0, self._slots * share.weight / total_weight)

    def _select_victim(self, preemptor: str) -> str | None:
        """Return the sequence that gives way: the youngest of who is furthest beyond its share."""
        victims = [name for name in self._backlogs if self._is_preemptible_by(name, preemptor)]
        ranked = [
            (share.priority, -len(line.running) / share.weight, sequence.n_tokens, sequence_id)
            for share, line in ((self._share(name), self._backlogs[name]) for name in victims)
            for sequence_id, sequence in line.running.items()
            if sequence.n_preemptions < MAX_PREEMPTIONS
        ]
        return min(ranked)[-1] if ranked else None

    def _is_preemptible_by(self, tenant: str, preemptor: str) -> bool:
        own_priority, other_priority = self._share(preemptor).priority, self._share(tenant).priority
        if tenant == preemptor or other_priority != own_priority:
            return other_priority < own_priority
        backlog = self._backlogs[tenant]
        is_ahead = backlog.virtual_counter >= self._backlogs[preemptor].virtual_counter
        return is_ahead and len(backlog.running) - 1 >= self._fair_slots(tenant)


_DEFAULT_SHARE = Share()
