"""Limits of tenants per minute, over all models; pure.

A request is counted before anything is done for it. Its tokens are held before it is sent: of its
prompt the most that its bytes may be, and the most that it may generate. The hold is corrected once
the router has counted the prompt, and settled with what was generated. So what is admitted never
exceeds the limit, and what was not needed is free again.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from faasmoe_contracts.gateway_file import LimitsEntry
from faasmoe_contracts.token_leases import LeasedBucket
from faasmoe_gateway.refusal import RATE_LIMIT_EXCEEDED, Refusal

MINUTE_S = 60.0
MAX_RETRY_AFTER_S = 120.0  # OpenAI's clients do not retry after a longer wait
_TOKEN_LIMITS = (  # name, whether prompts count, whether what is generated counts
    ("tokens", True, True),
    ("input_tokens", True, False),
    ("output_tokens", False, True),
)


@dataclass(slots=True)
class _Held:
    """Tokens of one bucket that are held for a request."""

    bucket: LeasedBucket
    counts_input: bool
    counts_output: bool
    n_tokens: int = 0

    def amount(self, input_tokens: int, output_tokens: int) -> int:
        return input_tokens * self.counts_input + output_tokens * self.counts_output


class Hold:
    """What is held of a tenant's buckets for one request."""

    def __init__(self, held: list[_Held]) -> None:
        self._held = held

    def correct(self, input_tokens: int, output_tokens: int, now_s: float) -> None:
        """Hold another number of tokens: more precise ones, or those that were used."""
        for held in self._held:
            amount = held.amount(input_tokens, output_tokens)
            if amount < held.n_tokens:
                held.bucket.give_back(held.n_tokens - amount, now_s)
            elif amount > held.n_tokens:
                held.bucket.owe(amount - held.n_tokens, now_s)
            held.n_tokens = amount


class TenantLimiter:
    """The buckets of one tenant.

    Args:
        limits: the limits per minute.
        now_s: current time; all times are monotonic seconds.
        share: part of each limit that this gateway has without an authority.

    Attributes:
        limits: as given.
        buckets: the buckets by the name of their limit.
        used_s: when a request last wanted tokens.
        elsewhere: tokens that the authority has left, by the name of their limit.
    """

    def __init__(self, limits: LimitsEntry, now_s: float, *, share: float = 1.0) -> None:
        self.used_s = float("-inf")
        self.elsewhere: dict[str, float] = {}
        self.buckets: dict[str, LeasedBucket] = {}
        self._share = share
        self.replace_limits(limits, now_s)

    def replace_limits(self, limits: LimitsEntry, now_s: float) -> None:
        """Take other limits; the buckets of those that have not changed stay."""
        self.limits = limits
        known, self.buckets = self.buckets, {}
        for name, limit in asdict(limits).items():
            if limit is None:
                continue
            bucket = known.get(name)
            if bucket is None or bucket.limit != limit:
                bucket = LeasedBucket(limit, now_s, share=self._share)
                self.elsewhere.pop(name, None)
            self.buckets[name] = bucket

    def count_request(self, now_s: float) -> None:
        """Count a request; raises Refusal if the limit does not admit it now."""
        self._take("requests", 1, now_s)

    def hold(self, input_tokens: int, output_tokens: int, now_s: float) -> Hold:
        """Hold tokens for a counted request.

        Args:
            input_tokens: the most that its prompts may have.
            output_tokens: the most that it may generate.
            now_s: current time.

        Raises:
            Refusal: a limit does not admit it now, or ever.
        """
        self._check_size(output_tokens)
        taken: list[_Held] = []
        for name, counts_input, counts_output in _TOKEN_LIMITS:
            if (bucket := self.buckets.get(name)) is None:
                continue
            held = _Held(bucket, counts_input, counts_output)
            # A full bucket admits a request whose prompt may be shorter than its bytes.
            held.n_tokens = min(held.amount(input_tokens, output_tokens), bucket.limit)
            try:
                self._take(name, held.n_tokens, now_s)
            except Refusal:
                Hold(taken).correct(0, 0, now_s)
                raise
            taken.append(held)
        return Hold(taken)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return OpenAI's x-ratelimit-* headers for the limits that there are."""
        headers = {}
        for name, bucket in self.buckets.items():
            resource = name.replace("_", "-")
            available = max(0.0, bucket.available(now_s)) + self.elsewhere.get(name, 0.0)
            available = min(available, bucket.limit)
            reset_s = (bucket.limit - available) * MINUTE_S / bucket.limit
            headers[f"x-ratelimit-limit-{resource}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{resource}"] = str(math.floor(available + 1e-6))
            headers[f"x-ratelimit-reset-{resource}"] = format_duration(reset_s)
        return headers

    def _check_size(self, output_tokens: int) -> None:
        for name, _, counts_output in _TOKEN_LIMITS:
            bucket = self.buckets.get(name)
            if bucket is not None and counts_output and output_tokens > bucket.limit:
                raise Refusal(
                    f"this request may generate {output_tokens} tokens; your limit is "
                    f"{bucket.limit} {name.replace('_', ' ')} per minute. Ask for a shorter output",
                    status=400,
                    code="invalid_value",
                    param="max_tokens",
                )

    def _take(self, name: str, amount: int, now_s: float) -> None:
        self.used_s = now_s
        bucket = self.buckets.get(name)
        if bucket is None or bucket.take(amount, now_s):
            return
        wait_s = bucket.wait_s(amount, now_s)
        raise Refusal(
            f"Rate limit reached on {name.replace('_', ' ')} per minute: limit {bucket.limit}, "
            f"requested {amount}. Please try again in {format_duration(wait_s)}.",
            status=429,
            code=RATE_LIMIT_EXCEEDED,
            limit=name,
            headers={
                **self.headers(now_s),
                "retry-after": str(math.ceil(min(wait_s, MAX_RETRY_AFTER_S))),
            },
        )


def format_duration(seconds: float) -> str:
    """Return a duration in the format of OpenAI's headers: 17ms, 1.2s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, remainder_s = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{remainder_s:.3g}s" if minutes else f"{remainder_s:.3g}s"
