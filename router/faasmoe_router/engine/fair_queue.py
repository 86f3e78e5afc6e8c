"""Fair queueing between tenants ahead of the continuous batch; only decides, without side effects.

Implements the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024): a tenant's counter grows by the price of its tokens over its weight, and a free slot
goes to the lowest counter. A tenant that returns from idle is lifted to the lowest counter of the
waiting ones, so idleness earns no credit. Between two backlogged tenants the difference in service
is bounded by what fits into the batch.

Two extensions: priorities are strict, and a waiting tenant within its share preempts a sequence of
the tenant furthest beyond its share instead of waiting for a slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from faasmoe_router.errors import TenantQueueFull

MAX_PREEMPTIONS = 3  # per sequence: each one recomputes the sequence's KV cache


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's entitlement.

    Attributes:
        weight: share of the service, relative to the other tenants' weights.
        priority: higher priorities are served first, regardless of weights.
        max_running: maximum number of running sequences; None for all slots.
        max_queued: maximum number of waiting sequences; None for the tenant's part, by weight, of
            the whole queue.
    """

    weight: float = 1.0
    priority: int = 0
    max_running: int | None = None
    max_queued: int | None = None


_DEFAULT_SHARE = Share()


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Cost of a prompt token and of a generated token; the default ratio is the paper's."""

    prompt: float = 1.0
    generated: float = 2.0


@dataclass(slots=True)
class _QueuedSequence:
    """One sequence, waiting or running."""

    tenant: str
    arrival_number: int
    n_prompt_tokens: int
    n_generated_tokens: int = 0
    n_preemptions: int = 0
    is_prompt_charged: bool = False
    priority: int = 0

    @property
    def n_tokens(self) -> int:
        return self.n_prompt_tokens + self.n_generated_tokens


@dataclass(slots=True)
class _TenantBacklog:
    """One tenant's sequences by id; the waiting ones in order of service.

    Attributes:
        virtual_counter: service received, in priced tokens over weight, including lifts.
        drained_at_dispatch: the queue's dispatch count when this backlog last became empty.
        waiting: sequences without a slot.
        running: sequences with a slot.
    """

    virtual_counter: float = 0.0
    drained_at_dispatch: float = float("-inf")
    waiting: dict[str, _QueuedSequence] = field(default_factory=dict)
    running: dict[str, _QueuedSequence] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running


class FairQueue:
    """Assigns the slots of a batch to the sequences of tenants.

    Args:
        slots: maximum number of running sequences.
        max_queued: maximum number of waiting sequences of all tenants together.
        price: cost of tokens.
    """

    def __init__(self, *, slots: int, max_queued: int, price: TokenPrice | None = None) -> None:
        self._slots = slots
        self._max_queued = max_queued
        self._price = price or TokenPrice()
        self._shares: Mapping[str, Share] = {}
        self._shares_weight = 0.0
        self._backlogs: dict[str, _TenantBacklog] = {}
        self._active: dict[str, _TenantBacklog] = {}  # those with sequences, waiting or running
        self._sequences: dict[str, _QueuedSequence] = {}
        self._last_drained_tenant: dict[int, str] = {}  # by priority
        self._n_arrivals = 0
        self._n_dispatched = 0
        self._n_running = 0

    @property
    def n_running(self) -> int:
        """Number of sequences that have a slot."""
        return self._n_running

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return len(self._sequences) - self._n_running

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return the number of running and of waiting sequences of a tenant."""
        backlog = self._backlogs.get(tenant)
        return (0, 0) if backlog is None else (len(backlog.running), len(backlog.waiting))

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight; safe from any thread."""
        return self._share(tenant).weight

    def virtual_counter(self, tenant: str) -> float:
        """Return a tenant's service in priced tokens over its weight, including lifts."""
        backlog = self._backlogs.get(tenant)
        return 0.0 if backlog is None else backlog.virtual_counter

    def is_running(self, sequence_id: str) -> bool:
        """Return whether a sequence has a slot; False for unknown ids."""
        sequence = self._sequences.get(sequence_id)
        return sequence is not None and sequence_id in self._backlogs[sequence.tenant].running

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Replace the tenants' shares; drops idle backlogs of tenants without a share."""
        self._shares = dict(shares)
        self._shares_weight = math.fsum(share.weight for share in shares.values())
        self._backlogs = {
            tenant: backlog
            for tenant, backlog in self._backlogs.items()
            if tenant in shares or not backlog.is_idle
        }

    def check_capacity(self, tenant: str, n_sequences: int) -> None:
        """Raise TenantQueueFull unless `n_sequences` more of a tenant can run or wait."""
        running, waiting = self.sequence_counts(tenant)
        startable = 0
        if not waiting:
            limit = min(self._slots, self._share(tenant).max_running or self._slots)
            startable = max(0, min(self._slots - self._n_running, limit - running))
        capacity = self._queue_capacity(tenant)
        if waiting + n_sequences - startable > capacity:
            raise TenantQueueFull(
                f"{waiting} of your requests are queued already, at most {capacity} may be; each "
                "choice of a request counts"
            )

    def max_sequences(self, tenant: str) -> int:
        """Return how many sequences of a tenant can run and wait when no one else's do."""
        running = min(self._slots, self._share(tenant).max_running or self._slots)
        return running + self._queue_capacity(tenant)

    def push(
        self, tenant: str, sequence_id: str, *, n_prompt_tokens: int, priority: int = 0
    ) -> None:
        """Append a sequence to its tenant's backlog; call `check_capacity` first.

        Args:
            tenant: the tenant.
            sequence_id: the sequence.
            n_prompt_tokens: tokens of its prompt.
            priority: its place among the tenant's waiting sequences; lower is served earlier.
        """
        backlog = self._backlogs.setdefault(tenant, _TenantBacklog())
        if not backlog.waiting:
            self._lift_counter(tenant, backlog)
        self._active[tenant] = backlog
        self._n_arrivals += 1
        sequence = _QueuedSequence(tenant, self._n_arrivals, n_prompt_tokens, priority=priority)
        backlog.waiting[sequence_id] = self._sequences[sequence_id] = sequence
        if any(waiting.priority != priority for waiting in backlog.waiting.values()):
            by_priority = sorted(backlog.waiting.items(), key=lambda item: item[1].priority)
            backlog.waiting = dict(by_priority)  # stable: in order of service within each

    def pop(self) -> str | None:
        """Assign a free slot to the next sequence and return its id.

        Returns None if no slot is free or no sequence may start.
        """
        tenant = self._next_tenant() if self._n_running < self._slots else None
        return None if tenant is None else self._start(tenant)

    def preempt(self) -> str | None:
        """Preempt a sequence of a tenant beyond its share for one that waits within its own.

        Returns the id of the preempted sequence, which waits at the head of its tenant's backlog,
        or None if none is to be preempted. The next `pop` assigns the slot.
        """
        tenant = self._next_tenant() if self._n_running >= self._slots else None
        if tenant is None:
            return None
        active_weight = self._active_weight(self._share(tenant).priority)
        if len(self._backlogs[tenant].running) + 1 > self._fair_slots(tenant, active_weight):
            return None
        victim = self._select_victim(tenant, active_weight)
        if victim is not None:
            backlog = self._backlogs[self._sequences[victim].tenant]
            sequence = backlog.running.pop(victim)
            sequence.n_preemptions += 1
            backlog.waiting = {victim: sequence, **backlog.waiting}
            self._n_running -= 1
        return victim

    def charge(self, sequence_id: str, n_generated_tokens: int) -> None:
        """Charge a sequence's tenant for generated tokens; ignores unknown sequences."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.n_generated_tokens += n_generated_tokens
            self._charge_tenant(sequence.tenant, self._price.generated * n_generated_tokens)

    def remove(self, sequence_id: str) -> None:
        """Remove a sequence, waiting or running, and free its slot; ignores unknown sequences."""
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
        if backlog.is_idle:
            del self._active[tenant]
            if self._shares and tenant not in self._shares:
                del self._backlogs[tenant]

    def _share(self, tenant: str) -> Share:
        return self._shares.get(tenant, _DEFAULT_SHARE)

    def _queue_capacity(self, tenant: str) -> int:
        """Return how many sequences of a tenant may wait.

        Each tenant has its own part of the queue, by weight, which others cannot fill.
        """
        share = self._share(tenant)
        weights = self._shares_weight + (0 if tenant in self._shares else share.weight)
        tenant_part = int(self._max_queued * share.weight / weights)
        capacity = max(min(1, self._max_queued), tenant_part)
        return capacity if share.max_queued is None else min(capacity, share.max_queued)

    def _may_start(self, tenant: str, backlog: _TenantBacklog) -> bool:
        """Return whether a tenant has a waiting sequence and is below its own `max_running`."""
        limit = self._share(tenant).max_running
        return bool(backlog.waiting) and (limit is None or len(backlog.running) < limit)

    def _lift_counter(self, tenant: str, backlog: _TenantBacklog) -> None:
        """Raise a returning tenant's counter to the lowest one of the waiting tenants.

        A tenant that drained at most one batch ago has not been idle, such as a client that sends
        one request after the other, and is not lifted.
        """
        if self._n_dispatched - backlog.drained_at_dispatch <= self._slots:
            return
        priority = self._share(tenant).priority
        waiting_counters = [
            peer.virtual_counter
            for name, peer in self._active.items()
            if self._share(name).priority == priority
            and peer is not backlog
            and self._may_start(name, peer)
        ]
        last_drained = self._last_drained_tenant.get(priority, "")
        if waiting_counters:
            level = min(waiting_counters)
        elif last_drained in self._backlogs and self._share(last_drained).priority == priority:
            level = self._backlogs[last_drained].virtual_counter
        else:
            level = max(
                peer.virtual_counter
                for name, peer in self._backlogs.items()
                if self._share(name).priority == priority
            )
        backlog.virtual_counter = max(backlog.virtual_counter, level)

    def _next_tenant(self) -> str | None:
        """Return the tenant to serve next: the lowest counter of the highest priority."""
        candidates = [item for item in self._active.items() if self._may_start(*item)]
        return min(candidates, key=lambda item: self._order_key(*item))[0] if candidates else None

    def _order_key(self, tenant: str, backlog: _TenantBacklog) -> tuple[float, float, float, int]:
        share = self._share(tenant)
        first_waiting = next(iter(backlog.waiting.values()))
        # Ties between counters go to the tenant with fewer slots, then to the earlier arrival.
        return (
            -share.priority,
            backlog.virtual_counter,
            len(backlog.running) / share.weight,
            first_waiting.arrival_number,
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

    def _active_weight(self, priority: int) -> float:
        """Return the sum of the weights of the active tenants of a priority."""
        active = map(self._share, self._active)
        return sum(share.weight for share in active if share.priority == priority)

    def _fair_slots(self, tenant: str, active_weight: float) -> float:
        """Return a tenant's part of the slots, given the active weight of its priority."""
        return max(1.0, self._slots * self._share(tenant).weight / active_weight)

    def _select_victim(self, preemptor: str, active_weight: float) -> str | None:
        """Return the sequence to preempt, or None.

        It is the one with the fewest tokens of the tenant that is furthest beyond its share.
        `active_weight` is that of the preemptor's priority.
        """
        victims = [
            name
            for name, backlog in self._active.items()
            if backlog.running and self._is_preemptible_by(name, preemptor, active_weight)
        ]
        ranked = [
            (share.priority, -len(backlog.running) / share.weight, sequence.n_tokens, sequence_id)
            for share, backlog in ((self._share(name), self._active[name]) for name in victims)
            for sequence_id, sequence in backlog.running.items()
            if sequence.n_preemptions < MAX_PREEMPTIONS
        ]
        return min(ranked)[-1] if ranked else None

    def _is_preemptible_by(self, tenant: str, preemptor: str, active_weight: float) -> bool:
        own_priority, other_priority = self._share(preemptor).priority, self._share(tenant).priority
        if tenant == preemptor or other_priority != own_priority:
            return other_priority < own_priority
        backlog = self._backlogs[tenant]
        is_ahead = backlog.virtual_counter >= self._backlogs[preemptor].virtual_counter
        return is_ahead and len(backlog.running) - 1 >= self._fair_slots(tenant, active_weight)
