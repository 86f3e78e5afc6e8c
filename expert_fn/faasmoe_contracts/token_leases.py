"""Token buckets that several processes spend from together, by leases of one authority. Pure.

A limit is a bucket of one minute's tokens that refills evenly. Its authority has the bucket; each
holder (a gateway, or a router) asks it for tokens before it spends them and reports what it has.
So all holders together admit what one bucket would, however their requests are spread.

With each grant a holder gets a share of the rate. A holder that has had no grant for
`FALLBACK_AFTER_S` keeps at most its share of a minute, and refills it at that rate. The authority
does not refill at the shares of holders that have not confirmed a grant for as long, and all shares
that any holder may know add up to at most 1. So what is admitted never exceeds the limit, whichever
messages or processes are lost:

- tokens of the authority and of all holders together are at most one minute's worth;
- they grow at the limit's rate at most, wherever they grow.

Times are arguments, in monotonic seconds of the process; the two clocks need not agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MINUTE_S = 60.0
FALLBACK_AFTER_S = 2.0  # without a grant
WITHHELD_AFTER_S = 1.0  # without a confirmed grant; shorter, as clocks may run apart a little
QUIET_S = 3.0  # of a restored authority; longer than holders take to notice that it was away
DEMAND_HALF_LIFE_S = 10.0
IDLE_DEMAND = 0.01  # of the limit; lets an idle holder have a share as well


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a holder asks of the authority, for one bucket.

    A holder has one request under way; it never applies the grant of one that it has given up.

    Attributes:
        sequence: ascending number of the request, from 1 at the holder's start.
        confirmed: number of the last request whose grant it has applied; 0 if there was none.
        held: tokens that it has.
        returned: tokens that it spent and got back since the last applied grant.
        wanted: tokens that it wants in addition.
        spent: tokens spent since the last applied grant.
    """

    sequence: int
    confirmed: int
    held: float
    returned: float
    wanted: float
    spent: float


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What the authority grants.

    Attributes:
        sequence: that of the request.
        tokens: tokens that the holder has in addition.
        share: part of the rate at which it refills by itself when the authority is away.
    """

    sequence: int
    tokens: float
    share: float


@dataclass(slots=True)
class _Holder:
    """What the authority knows of a holder.

    `pending` is the last grant, of which it is unknown whether the holder has it, `sent_s` when it
    was sent, `credited` what was returned since the last confirmed one.
    """

    sequence: int = 0
    held: float = 0.0
    share: float = 0.0
    confirmed_s: float = float("-inf")
    seen_s: float = float("-inf")
    wanted: float = 0.0
    demand: float = 0.0
    pending: LeaseGrant | None = None
    sent_s: float = float("-inf")
    credited: float = 0.0

    @property
    def largest_share(self) -> float:
        """The largest share that the holder may know."""
        return self.share if self.pending is None else max(self.share, self.pending.share)

    @property
    def granted(self) -> float:
        """Tokens on their way to the holder."""
        return 0.0 if self.pending is None else self.pending.tokens

    def settle(self, confirmed: int) -> float:
        """Apply whether the holder has got its last grant; return the tokens that it has not."""
        grant, self.pending = self.pending, None
        if grant is None:
            return 0.0
        if grant.sequence != confirmed:
            return grant.tokens
        self.share, self.confirmed_s, self.credited = grant.share, self.sent_s, 0.0
        return 0.0

    def demand_at(self, now_s: float) -> float:
        """Return the demand, which halves every DEMAND_HALF_LIFE_S."""
        half_lives = max(0.0, now_s - self.seen_s) / DEMAND_HALF_LIFE_S
        return float(self.demand * 0.5**half_lives)


class LeaseAuthority:
    """The one bucket of a limit, leased to its holders.

    Args:
        limit: tokens per minute.
        now_s: current time.
        shares: shares of holders of an earlier authority, which may still use them; None for a new
            limit, whose bucket is full.
    """

    def __init__(
        self, limit: int, now_s: float, *, shares: Mapping[str, float] | None = None
    ) -> None:
        self.limit = limit
        self._level = float(limit) if shares is None else 0.0
        self._quiet_until_s = now_s if shares is None else now_s + QUIET_S
        self._updated_s = self._quiet_until_s
        self._holders = {name: _Holder(share=share) for name, share in (shares or {}).items()}

    @property
    def shares(self) -> dict[str, float]:
        """The largest share that each holder may know; to be saved before a grant is sent."""
        return {name: holder.largest_share for name, holder in self._holders.items()}

    def available(self, now_s: float) -> float:
        """Return the tokens that can be granted."""
        self._refill(now_s)
        return self._level

    def renew(self, name: str, request: LeaseRequest, now_s: float) -> LeaseGrant | None:
        """Grant tokens and a share to a holder; None for a request that a later one has overtaken.

        A holder that has started anew (sequence 1) has lost what it was granted before.
        """
        self._refill(now_s)
        holder = self._holders.get(name)
        if holder is None or request.sequence == 1:
            holder = self._holders[name] = _Holder(confirmed_s=now_s)
        if request.sequence <= holder.sequence:
            return None
        lost = holder.settle(request.confirmed)
        demand = holder.demand_at(now_s) + request.spent + request.wanted
        holder.sequence, holder.held, holder.wanted = request.sequence, request.held, request.wanted
        holder.demand, holder.seen_s = demand, now_s
        returned = max(0.0, request.returned - holder.credited)
        holder.credited = request.returned
        self._level = min(self._capacity(now_s), self._level + lost + returned)
        tokens = self._tokens_for(holder, now_s)
        self._level -= tokens
        grant = LeaseGrant(request.sequence, tokens, self._share_for(name, now_s))
        holder.pending, holder.sent_s = grant, now_s
        return grant

    def forget(self, name: str) -> None:
        """Remove a holder that is known to have ended; what it held is refilled in time."""
        self._holders.pop(name, None)

    def _tokens_for(self, holder: _Holder, now_s: float) -> float:
        if holder.wanted <= 0 or self._level <= 0:
            return 0.0
        others = (h for h in self._holders.values() if now_s - h.seen_s <= WITHHELD_AFTER_S)
        return min(holder.wanted, self._level * holder.wanted / sum(h.wanted for h in others))

    def _share_for(self, name: str, now_s: float) -> float:
        idle = IDLE_DEMAND * self.limit
        demands = {n: h.demand_at(now_s) + idle for n, h in self._holders.items()}
        others = sum(h.largest_share for n, h in self._holders.items() if n != name)
        return max(0.0, min(demands[name] / sum(demands.values()), 1.0 - others))

    def _refill(self, now_s: float) -> None:
        start_s, self._updated_s = self._updated_s, max(self._updated_s, now_s)
        seconds = self._updated_s - start_s
        for holder in self._holders.values():
            withheld_s = self._updated_s - max(start_s, holder.confirmed_s + WITHHELD_AFTER_S)
            seconds -= holder.largest_share * max(0.0, withheld_s)
        refilled = self._level + self.limit / MINUTE_S * max(0.0, seconds)
        self._level = min(self._capacity(self._updated_s), refilled)

    def _capacity(self, now_s: float) -> float:
        """Return the limit without what holders may have."""
        elsewhere = 0.0
        for holder in self._holders.values():
            held = holder.held
            if not holder.sequence and now_s < self._quiet_until_s:
                held = self.limit
            elif now_s > holder.confirmed_s + WITHHELD_AFTER_S:
                held = max(held, holder.largest_share * self.limit)
            elsewhere += held + holder.granted
        return max(0.0, self.limit - elsewhere)


class LeasedBucket:
    """A holder's part of a limit.

    Args:
        limit: tokens per minute over all holders.
        now_s: current time.
        share: part of the limit that it has without an authority: 1 for the only holder, whose
            bucket is full; 0 for one that waits for a grant.

    Attributes:
        limit: tokens per minute over all holders.
        share: part of the rate at which it refills without an authority.
    """

    def __init__(self, limit: int, now_s: float, *, share: float = 0.0) -> None:
        self.limit = limit
        self.share = share
        self._level = share * limit
        self._updated_s = now_s
        self._granted_s = float("-inf") if share else now_s
        self._sequence = 0
        self._confirmed = 0
        self._wanted = 0.0
        self._spent = 0.0
        self._returned = 0.0
        self._reported = (0.0, 0.0)

    def available(self, now_s: float) -> float:
        """Return the tokens that it has; negative while it is in debt."""
        self._refill(now_s)
        return self._level

    def take(self, amount: float, now_s: float) -> bool:
        """Spend tokens; return whether there are as many. If not, they are asked for next."""
        self._refill(now_s)
        if self._level + 1e-6 < amount:
            self._wanted = max(self._wanted, min(amount, self.limit))
            return False
        self._level -= amount
        self._spent += amount
        return True

    def give_back(self, amount: float, now_s: float) -> None:
        """Return tokens that were spent and not needed."""
        self._refill(now_s)
        if self._is_alone(now_s):
            self._level = min(self._level + amount, self.share * self.limit)
        else:
            self._returned += amount

    def owe(self, amount: float, now_s: float) -> None:
        """Spend tokens whether there are as many or not; it is in debt until it has refilled."""
        self._refill(now_s)
        self._level -= amount
        self._spent += amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return about how long it takes until there are tokens; 0 if they are there."""
        missing = min(amount, self.limit) - self.available(now_s)
        return 0.0 if missing <= 1e-6 else missing * MINUTE_S / self.limit / (self.share or 1.0)

    def request(self, now_s: float) -> LeaseRequest:
        """Return what to ask the authority for now; only one request may be under way."""
        self._refill(now_s)
        self._sequence += 1
        self._reported = (self._returned, self._spent)
        return LeaseRequest(
            self._sequence,
            self._confirmed,
            held=max(0.0, self._level),
            returned=self._returned,
            wanted=max(0.0, max(self._wanted, self._spent) - self._level),
            spent=self._spent,
        )

    def apply(self, grant: LeaseGrant, now_s: float) -> None:
        """Take what the authority has granted in response to the last request.

        The grant of an earlier request, which was given up, is ignored.
        """
        self._refill(now_s)
        if grant.sequence != self._sequence:
            return
        returned, spent = self._reported
        self._returned -= returned
        self._spent -= spent
        self._wanted = 0.0
        self._level += grant.tokens
        self.share, self._confirmed, self._granted_s = grant.share, grant.sequence, now_s

    def _is_alone(self, now_s: float) -> bool:
        return now_s > self._granted_s + FALLBACK_AFTER_S

    def _refill(self, now_s: float) -> None:
        start_s, self._updated_s = self._updated_s, max(self._updated_s, now_s)
        alone_s = now_s - max(start_s, self._granted_s + FALLBACK_AFTER_S)
        if alone_s <= 0:
            return
        capacity = self.share * self.limit
        self._level = min(self._level + capacity / MINUTE_S * alone_s, capacity)
