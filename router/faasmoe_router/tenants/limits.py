"""What a tenant may ask for in a minute: requests and tokens, by token buckets. Pure.

A bucket holds a minute's worth and fills evenly (RFC 3290, appendix A); what OpenAI's reset
headers tell, the time until it is full, is a bucket's figure too. Tokens are reserved when a
request is let in, its prompt and the most that it may generate, and what it did not use is given
back at its end.

With several routers each has its part of the limit: a bucket of limit/routers, filled at that rate,
so that together they let through what one would. A request that is larger than a part, though not
than the whole, is let through by a full bucket, which then is in debt for as long as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from faasmoe_router.tenants.errors import NeverFits, RateLimited

MINUTE_S = 60.0
MAX_RETRY_AFTER_S = 120.0  # clients do not retry what asks them to wait longer
_SLACK = 1e-6  # what rounding loses


class Bucket:
    """An allowance that fills evenly, a minute from empty to full; times are monotonic seconds."""

    def __init__(self, limit: int, now_s: float, *, n_routers: int = 1) -> None:
        self.limit = limit
        self.size = max(1.0, limit / n_routers)
        self._rate = limit / n_routers / MINUTE_S
        self._n_routers = n_routers
        self._level = self.size
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """Return what is left; negative while in debt."""
        grown = self._level + self._rate * max(0.0, now_s - self._at_s)
        return min(self.size, grown)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return how long until so much may be taken; 0 if now."""
        lacking = min(amount, self.size) - self.level(now_s)
        return 0.0 if lacking <= _SLACK else lacking / self._rate

    def take(self, amount: float, now_s: float) -> None:
        """Take so much, whether there or not; give it back if negative."""
        self._level = min(self.size, self.level(now_s) - amount)
        self._at_s = max(self._at_s, now_s)

    def remaining(self, now_s: float) -> int:
        """Return what is left of the whole limit, if the other routers have spent as much."""
        return max(0, math.floor(self.level(now_s) * min(self._n_routers, self.limit) + _SLACK))

    def reset_s(self, now_s: float) -> float:
        """Return how long until it is full."""
        return (self.size - self.level(now_s)) / self._rate


@dataclass(slots=True)
class Reservation:
    """Tokens that a request may still use; `settle` it when it has ended."""

    n_tokens: int
    bucket: Bucket | None

    def settle(self, n_used: int, now_s: float) -> None:
        """Give back what was not used; does nothing a second time."""
        if self.bucket is not None:
            self.bucket.take(min(0, n_used - self.n_tokens), now_s)
            self.bucket = None


class RateLimits:
    """One tenant's requests and tokens per minute; None is no limit."""

    def __init__(
        self,
        *,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        now_s: float,
        n_routers: int = 1,
    ) -> None:
        def bucket(limit: int | None) -> Bucket | None:
            return None if limit is None else Bucket(limit, now_s, n_routers=n_routers)

        self._requests = bucket(requests_per_minute)
        self._tokens = bucket(tokens_per_minute)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request may reserve, if there is a limit."""
        return None if self._tokens is None else self._tokens.limit

    def admit(self, n_tokens: int, now_s: float) -> Reservation:
        """Count a request and reserve its tokens, or do neither.

        Raises:
            NeverFits: it asks for more than a minute's tokens.
            RateLimited: it has to wait.
        """
        if self._tokens is not None and n_tokens > self._tokens.limit:
            raise NeverFits(
                f"this request may take {n_tokens} tokens, prompt and output together; your limit "
                f"is {self._tokens.limit} tokens per minute. Ask for a shorter output"
            )
        self._check("requests", self._requests, 1, now_s)
        self._check("tokens", self._tokens, n_tokens, now_s)
        if self._requests is not None:
            self._requests.take(1, now_s)
        if self._tokens is not None:
            self._tokens.take(n_tokens, now_s)
        return Reservation(n_tokens, self._tokens)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return OpenAI's x-ratelimit-* headers for the limits that there are."""
        return {
            **_headers("requests", self._requests, now_s),
            **_headers("tokens", self._tokens, now_s),
        }

    def _check(self, what: str, bucket: Bucket | None, amount: int, now_s: float) -> None:
        wait_s = 0.0 if bucket is None else bucket.wait_s(amount, now_s)
        if bucket is None or not wait_s:
            return
        raise RateLimited(
            f"Rate limit reached on {what} per minute: limit {bucket.limit}, requested {amount}. "
            f"Please try again in {duration(wait_s)}.",
            retry_after_s=min(wait_s, MAX_RETRY_AFTER_S),
            headers=self.headers(now_s),
        )


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers write it: 17ms, 1.2s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{rest:.3g}s" if minutes else f"{rest:.3g}s"


def _headers(what: str, bucket: Bucket | None, now_s: float) -> Mapping[str, str]:
    if bucket is None:
        return {}
    return {
        f"x-ratelimit-limit-{what}": str(bucket.limit),
        f"x-ratelimit-remaining-{what}": str(bucket.remaining(now_s)),
        f"x-ratelimit-reset-{what}": duration(bucket.reset_s(now_s)),
    }
