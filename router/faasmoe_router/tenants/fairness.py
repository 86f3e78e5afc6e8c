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

from faasmoe_router.tenants.errors import TenantQueueFull

MAX_PARKINGS = 3  # of one sequence: what it computes is computed again each time


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
class _Sequence:
    """One sequence, from its arrival to its end."""

    tenant: str
    place: int
    n_prompt: int
    n_generated: int = 0
    n_parkings: int = 0
    is_paid: bool = False

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_generated


@dataclass(slots=True)
class _Line:
    """One tenant's sequences, by id, the waiting ones in their order."""

    counter: float = 0.0
    emptied_at_turn: float = float("-inf")
    waiting: dict[str, _Sequence] = field(default_factory=dict)
    running: dict[str, _Sequence] = field(default_factory=dict)

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
        self._lines: dict[str, _Line] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._last_left: dict[int, str] = {}  # by priority: the tenant that last ceased to wait
        self._n_arrivals = 0
        self._n_turns = 0
        self._n_running = 0

    @property
    def n_running(self) -> int:
        """Sequences that have a slot."""
        return self._n_running

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._sequences) - self._n_running

    def counts(self, tenant: str) -> tuple[int, int]:
        """Return how many sequences of a tenant run, and how many wait."""
        line = self._lines.get(tenant)
        return (0, 0) if line is None else (len(line.running), len(line.waiting))

    def counter(self, tenant: str) -> float:
        """Return the service that a tenant has had: priced tokens over its weight, with lifts."""
        line = self._lines.get(tenant)
        return 0.0 if line is None else line.counter

    def is_running(self, sequence_id: str) -> bool:
        """Return whether a sequence has a slot."""
        sequence = self._sequences.get(sequence_id)
        return sequence is not None and sequence_id in self._lines[sequence.tenant].running

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Take the tenants' shares; lines that are idle and not among them are forgotten."""
        self._shares = dict(shares)
        for name in [n for n, line in self._lines.items() if line.is_idle and n not in shares]:
            del self._lines[name]

    def check_room(self, tenant: str, n_sequences: int) -> None:
        """Raise TenantQueueFull if so many more of a tenant can neither run nor wait."""
        running, waiting = self.counts(tenant)
        startable = 0
        if not waiting:
            limit = min(self._slots, self._share(tenant).max_running or self._slots)
            startable = max(0, min(self._slots - self._n_running, limit - running))
        room = self._room(tenant)
        if waiting + n_sequences - startable > room:
            raise TenantQueueFull(
                f"{waiting} of your requests wait already; at most {room} may, and each choice of "
                "a request counts"
            )

    def push(self, tenant: str, sequence_id: str, *, n_prompt: int) -> None:
        """Let a sequence wait at the end of its tenant's line; see `check_room`."""
        line = self._lines.setdefault(tenant, _Line())
        if not line.waiting:
            self._lift(tenant, line)
        self._n_arrivals += 1
        sequence = _Sequence(tenant, self._n_arrivals, n_prompt)
        line.waiting[sequence_id] = self._sequences[sequence_id] = sequence

    def pop(self) -> str | None:
        """Give a free slot to whose turn it is; None if there is none, or nobody to take it."""
        name = self._next() if self._n_running < self._slots else None
        return None if name is None else self._start(name)

    def park(self) -> str | None:
        """Take a slot from who is beyond its share, for who waits within its own; None if nobody.

        The sequence is put back at the head of its tenant's line. Its slot is free: `pop` gives it.
        """
        name = self._next() if self._n_running >= self._slots else None
        if name is None or len(self._lines[name].running) + 1 > self._slots_of(name):
            return None
        victim = self._victim(name)
        if victim is not None:
            line = self._lines[self._sequences[victim].tenant]
            sequence = line.running.pop(victim)
            sequence.n_parkings += 1
            line.waiting = {victim: sequence, **line.waiting}
            self._n_running -= 1
        return victim

    def charge(self, sequence_id: str, n_generated: int) -> None:
        """Charge a sequence's tenant for tokens that were generated; unknown ones are free."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.n_generated += n_generated
            self._pay(sequence.tenant, self._price.generated * n_generated)

    def end(self, sequence_id: str) -> None:
        """Forget a sequence, wherever it is; its slot, if it had one, is free."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        name, line = sequence.tenant, self._lines[sequence.tenant]
        if line.waiting.pop(sequence_id, None) is not None:
            self._note_left(name, line)
        else:
            was_held_back = line.waiting and not self._may_start(name, line)
            del line.running[sequence_id]
            self._n_running -= 1
            if was_held_back:
                self._lift(name, line)
        if line.is_idle and self._shares and name not in self._shares:
            del self._lines[name]

    def _share(self, tenant: str) -> Share:
        return self._shares.get(tenant, _DEFAULT_SHARE)

    def _room(self, tenant: str) -> int:
        """Return how many may wait: each tenant has its own part, which no other can fill."""
        share = self._share(tenant)
        others = sum(s.weight for name, s in self._shares.items() if name != tenant)
        part = int(self._max_queued * share.weight / (share.weight + others))
        room = max(min(1, self._max_queued), part)
        return room if share.max_queued is None else min(room, share.max_queued)

    def _may_start(self, name: str, line: _Line) -> bool:
        """Return whether a tenant could take a slot; one at its own limit counts as not waiting."""
        limit = self._share(name).max_running
        return bool(line.waiting) and (limit is None or len(line.running) < limit)

    def _lift(self, name: str, line: _Line) -> None:
        """Bring who comes back level with those that wait, so that idleness saves nothing up.

        Who sends one request after another does not come back: it waited until lately.
        """
        if self._n_turns - line.emptied_at_turn <= self._slots:
            return
        priority = self._share(name).priority
        peers = {n: x for n, x in self._lines.items() if self._share(n).priority == priority}
        waiting = [x.counter for n, x in peers.items() if x is not line and self._may_start(n, x)]
        last_left = peers.get(self._last_left.get(priority, ""))
        if waiting:
            level = min(waiting)
        elif last_left is not None:
            level = last_left.counter
        else:
            level = max(x.counter for x in peers.values())
        line.counter = max(line.counter, level)

    def _next(self) -> str | None:
        """Return the tenant whose turn it is: of the highest priority, the lowest counter."""
        able = [(name, line) for name, line in self._lines.items() if self._may_start(name, line)]
        return min(able, key=lambda item: self._rank(*item))[0] if able else None

    def _rank(self, name: str, line: _Line) -> tuple[float, float, float, int]:
        share = self._share(name)
        # Of equal counters, who holds less; then who has waited longer.
        held = len(line.running) / share.weight
        return -share.priority, line.counter, held, next(iter(line.waiting.values())).place

    def _start(self, name: str) -> str:
        line = self._lines[name]
        sequence_id, sequence = next(iter(line.waiting.items()))
        line.running[sequence_id] = line.waiting.pop(sequence_id)
        self._n_running += 1
        self._n_turns += 1
        if not sequence.is_paid:
            sequence.is_paid = True
            self._pay(name, self._price.prompt * sequence.n_prompt)
        self._note_left(name, line)
        return sequence_id

    def _pay(self, name: str, cost: float) -> None:
        self._lines[name].counter += cost / self._share(name).weight

    def _note_left(self, name: str, line: _Line) -> None:
        if not line.waiting:
            line.emptied_at_turn = self._n_turns
            self._last_left[self._share(name).priority] = name

    def _slots_of(self, name: str) -> float:
        """Return a tenant's part of the slots among those of its priority that want any."""
        share = self._share(name)
        active = [self._share(n) for n, line in self._lines.items() if not line.is_idle]
        whole = sum(other.weight for other in active if other.priority == share.priority)
        return max(1.0, self._slots * share.weight / whole)

    def _victim(self, claimant: str) -> str | None:
        """Return the sequence that gives way: the youngest of who is furthest beyond its share."""
        givers = [name for name in self._lines if self._gives_way(name, claimant)]
        ranked = [
            (share.priority, -len(line.running) / share.weight, sequence.n_tokens, sequence_id)
            for share, line in ((self._share(name), self._lines[name]) for name in givers)
            for sequence_id, sequence in line.running.items()
            if sequence.n_parkings < MAX_PARKINGS
        ]
        return min(ranked)[-1] if ranked else None

    def _gives_way(self, name: str, claimant: str) -> bool:
        mine, other = self._share(claimant).priority, self._share(name).priority
        if name == claimant or other != mine:
            return other < mine
        line = self._lines[name]
        is_ahead = line.counter >= self._lines[claimant].counter
        return is_ahead and len(line.running) - 1 >= self._slots_of(name)


_DEFAULT_SHARE = Share()
