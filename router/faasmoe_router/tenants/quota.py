"""Tenants' quotas: rate limits by token buckets, and shares of the activation queue. Pure.

A bucket has the capacity of one minute and refills evenly (RFC 3290, appendix A); the time until it
is full is what OpenAI's reset headers state. A request is counted before anything is done for it,
and stays counted. Admission reserves its tokens, its prompt and the most that it may generate, and
returns the unused ones at its end.

With several routers each has a bucket of limit / routers, so that together they admit what one
would. A request larger than this share, but within the limit, is admitted by a full bucket, which
is then in debt until it has refilled.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from faasmoe_router.errors import ActivationQueueFull, RateLimitExceeded, RequestTooLarge
from faasmoe_router.tenants.registry import TenantLimitsConfig

MINUTE_S = 60.0
MAX_RETRY_AFTER_S = 120.0  # OpenAI clients do not retry after a longer wait
_ROUNDING_SLACK = 1e-6  # tolerance for rounding errors


class TokenBucket:
    """A token bucket that refills evenly, in one minute from empty to full.

    Args:
        limit: tokens per minute over all routers.
        now_s: current time; all times are monotonic seconds.
        n_routers: routers that share the limit.

    Attributes:
        limit: tokens per minute over all routers.
        capacity: this router's share of the limit, at least 1.
    """

    def __init__(self, limit: int, now_s: float, *, n_routers: int = 1) -> None:
        self.limit = limit
        self.capacity = max(1.0, limit / n_routers)
        self._rate = limit / n_routers / MINUTE_S
        self._n_routers = n_routers
        self._available = self.capacity
        self._updated_s = now_s

    def available(self, now_s: float) -> float:
        """Return the tokens available; negative while in debt."""
        refilled = self._available + self._rate * max(0.0, now_s - self._updated_s)
        return min(self.capacity, refilled)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the seconds until `amount` tokens may be consumed; 0 if they may be now."""
        missing = min(amount, self.capacity) - self.available(now_s)
        return 0.0 if missing <= _ROUNDING_SLACK else missing / self._rate

    def consume(self, amount: float, now_s: float) -> None:
        """Consume tokens, available or not; a negative amount returns them."""
        self._available = min(self.capacity, self.available(now_s) - amount)
        self._updated_s = max(self._updated_s, now_s)

    def remaining(self, now_s: float) -> int:
        """Return the tokens left over all routers, if the others have consumed as much."""
        return max(
            0,
            math.floor(self.available(now_s) * min(self._n_routers, self.limit) + _ROUNDING_SLACK),
        )

    def reset_s(self, now_s: float) -> float:
        """Return the seconds until the bucket is full."""
        return (self.capacity - self.available(now_s)) / self._rate


@dataclass(slots=True)
class Reservation:
    """Tokens reserved for a request; call `release_unused` at its end.

    Attributes:
        n_tokens: tokens reserved.
        bucket: bucket that they were consumed from; None without a limit.
    """

    n_tokens: int
    bucket: TokenBucket | None

    def release_unused(self, n_used: int, now_s: float) -> None:
        """Return the unused tokens to the bucket; later calls do nothing."""
        if self.bucket is not None:
            self.bucket.consume(min(0, n_used - self.n_tokens), now_s)
            self.bucket = None


class RateLimiter:
    """Limits one tenant's requests and tokens per minute; None means no limit."""

    def __init__(
        self,
        *,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        now_s: float,
        n_routers: int = 1,
    ) -> None:
        def make_bucket(limit: int | None) -> TokenBucket | None:
            return None if limit is None else TokenBucket(limit, now_s, n_routers=n_routers)

        self._request_bucket = make_bucket(requests_per_minute)
        self._token_bucket = make_bucket(tokens_per_minute)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request may reserve; None without a limit."""
        return None if self._token_bucket is None else self._token_bucket.limit

    def count_request(self, now_s: float) -> None:
        """Count a request; raises RateLimitExceeded if the limit does not admit it now."""
        self._check_limit("requests", self._request_bucket, 1, now_s)
        if self._request_bucket is not None:
            self._request_bucket.consume(1, now_s)

    def reserve_tokens(
        self, n_tokens: int, now_s: float, *, is_admitted: bool = False
    ) -> Reservation:
        """Reserve the tokens of a counted request, whatever there is if it `is_admitted` already.

        Raises:
            RequestTooLarge: the request exceeds the tokens of one minute.
            RateLimitExceeded: the limit does not admit the request now.
        """
        if is_admitted:
            if self._token_bucket is not None:
                self._token_bucket.consume(n_tokens, now_s)
            return Reservation(n_tokens, self._token_bucket)
        if self._token_bucket is not None and n_tokens > self._token_bucket.limit:
            raise RequestTooLarge(
                f"this request may take {n_tokens} tokens, prompt and output together; your limit "
                f"is {self._token_bucket.limit} tokens per minute. Ask for a shorter output"
            )
        self._check_limit("tokens", self._token_bucket, n_tokens, now_s)
        if self._token_bucket is not None:
            self._token_bucket.consume(n_tokens, now_s)
        return Reservation(n_tokens, self._token_bucket)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return OpenAI's x-ratelimit-* headers for the configured limits."""
        return {
            **_rate_limit_headers("requests", self._request_bucket, now_s),
            **_rate_limit_headers("tokens", self._token_bucket, now_s),
        }

    def _check_limit(
        self, resource: str, bucket: TokenBucket | None, amount: int, now_s: float
    ) -> None:
        wait_s = 0.0 if bucket is None else bucket.wait_s(amount, now_s)
        if bucket is None or not wait_s:
            return
        raise RateLimitExceeded(
            f"Rate limit reached on {resource} per minute: limit {bucket.limit}, "
            f"requested {amount}. Please try again in {format_duration(wait_s)}.",
            retry_after_s=min(wait_s, MAX_RETRY_AFTER_S),
            headers=self.headers(now_s),
        )


def format_duration(seconds: float) -> str:
    """Return a duration in the format of OpenAI's headers: 17ms, 1.2s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, remainder_s = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{remainder_s:.3g}s" if minutes else f"{remainder_s:.3g}s"


def _rate_limit_headers(
    resource: str, bucket: TokenBucket | None, now_s: float
) -> Mapping[str, str]:
    if bucket is None:
        return {}
    return {
        f"x-ratelimit-limit-{resource}": str(bucket.limit),
        f"x-ratelimit-remaining-{resource}": str(bucket.remaining(now_s)),
        f"x-ratelimit-reset-{resource}": format_duration(bucket.reset_s(now_s)),
    }


_LimitKey = tuple[int | None, int | None, int]


class RateLimiters:
    """Rate limiters by tenant, replaced when a limit changes."""

    def __init__(self) -> None:
        self._limiters: dict[str, tuple[_LimitKey, RateLimiter]] = {}

    def get_or_create(
        self, tenant: str, limits: TenantLimitsConfig, now_s: float, *, n_routers: int
    ) -> RateLimiter:
        """Return a tenant's limiter; a new one with full buckets if its limits have changed."""
        limit_key = (limits.requests_per_minute, limits.tokens_per_minute, n_routers)
        cached = self._limiters.get(tenant)
        if cached is None or cached[0] != limit_key:
            limiter = RateLimiter(
                requests_per_minute=limits.requests_per_minute,
                tokens_per_minute=limits.tokens_per_minute,
                now_s=now_s,
                n_routers=n_routers,
            )
            cached = self._limiters[tenant] = (limit_key, limiter)
        return cached[1]

    def retain(self, tenants: Container[str]) -> None:
        """Drop the limiters of other tenants."""
        self._limiters = {
            name: limiter for name, limiter in self._limiters.items() if name in tenants
        }


@dataclass(frozen=True, slots=True)
class ActivationQueueCapacity:
    """Capacity of the activation queue over all tenants.

    Attributes:
        max_requests: queued requests.
        max_bytes: total size of their bodies, in bytes.
    """

    max_requests: int = 1024
    max_bytes: int = 64 << 20


class TenantQueueQuota:
    """Limits each tenant to its share of the activation queue."""

    def __init__(self, capacity: ActivationQueueCapacity) -> None:
        self._capacity = capacity
        self._queued: dict[str, tuple[int, int]] = {}  # requests, bytes

    @contextmanager
    def reserve(self, tenant: str, share: float, *, size_bytes: int) -> Iterator[None]:
        """Count a request as queued within the context.

        Args:
            tenant: tenant of the request.
            share: the tenant's share of the queue, 0 to 1; it always covers one request.
            size_bytes: size of the request's body.

        Raises:
            ActivationQueueFull: the tenant's share is used up.
        """
        n_requests, n_bytes = self._queued.get(tenant, (0, 0))
        if n_requests and n_requests + 1 > self._capacity.max_requests * share:
            raise ActivationQueueFull(f"{n_requests} of your requests are queued for activation")
        if n_requests and n_bytes + size_bytes > self._capacity.max_bytes * share:
            raise ActivationQueueFull(f"{n_bytes} bytes of your requests are queued for activation")
        self._adjust(tenant, 1, size_bytes)
        try:
            yield
        finally:
            self._adjust(tenant, -1, -size_bytes)

    def _adjust(self, tenant: str, requests_delta: int, bytes_delta: int) -> None:
        n_requests, n_bytes = self._queued.pop(tenant, (0, 0))
        if n_requests + requests_delta:
            self._queued[tenant] = (n_requests + requests_delta, n_bytes + bytes_delta)
