"""Limits of requests and tokens per minute, at times passed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.errors import RateLimitExceeded, RequestTooLarge
from faasmoe_router.tenants.quota import (
    MAX_RETRY_AFTER_S,
    RateLimiter,
    Reservation,
    TokenBucket,
    format_duration,
)


def rate_limiter(
    *, requests: int | None = None, tokens: int | None = None, n_routers: int = 1
) -> RateLimiter:
    return RateLimiter(
        requests_per_minute=requests, tokens_per_minute=tokens, now_s=0.0, n_routers=n_routers
    )


def admit(limiter: RateLimiter, n_tokens: int, now_s: float) -> Reservation:
    limiter.count_request(now_s)
    return limiter.reserve_tokens(n_tokens, now_s)


def test_a_burst_of_one_minute_is_admitted_and_then_an_even_rate() -> None:
    tenant = rate_limiter(requests=6)
    for _ in range(6):
        admit(tenant, 1, 0.0)
    with pytest.raises(RateLimitExceeded) as refused:
        admit(tenant, 1, 0.0)
    assert refused.value.retry_after_s == pytest.approx(10)
    admit(tenant, 1, 10.0)
    with pytest.raises(RateLimitExceeded):
        admit(tenant, 1, 19.9)
    admit(tenant, 1, 20.0)


def test_unused_tokens_are_returned() -> None:
    tenant = rate_limiter(tokens=100)
    reservation = admit(tenant, 80, 0.0)
    with pytest.raises(RateLimitExceeded) as refused:
        admit(tenant, 30, 0.0)
    assert refused.value.retry_after_s == pytest.approx(6)  # 10 tokens at 100 a minute
    reservation.release_unused(15, 0.0)
    reservation.release_unused(15, 0.0)
    admit(tenant, 85, 0.0)
    with pytest.raises(RateLimitExceeded):
        admit(tenant, 1, 0.0)


def test_returned_tokens_never_exceed_the_capacity() -> None:
    tenant = rate_limiter(tokens=100)
    reservation = admit(tenant, 80, 0.0)
    reservation.release_unused(0, 30.0)
    admit(tenant, 100, 30.0)
    with pytest.raises(RateLimitExceeded):
        admit(tenant, 1, 30.0)


def test_a_rejected_request_is_counted_and_takes_no_tokens() -> None:
    tenant = rate_limiter(requests=20, tokens=100)
    admit(tenant, 100, 0.0)
    for _ in range(5):
        with pytest.raises(RateLimitExceeded, match="tokens"):
            admit(tenant, 50, 0.0)
    assert tenant.headers(0.0)["x-ratelimit-remaining-requests"] == "14"
    assert tenant.headers(30.0)["x-ratelimit-remaining-tokens"] == "50"


def test_a_request_above_the_limit_is_too_large() -> None:
    with pytest.raises(RequestTooLarge, match=r"101 tokens.*100 tokens per minute"):
        admit(rate_limiter(tokens=100), 101, 0.0)


def test_without_limits_every_request_is_admitted_without_headers() -> None:
    tenant = rate_limiter()
    for _ in range(1000):
        admit(tenant, 10**9, 0.0).release_unused(5, 0.0)
    assert tenant.headers(0.0) == {}
    assert tenant.max_tokens is None


def test_headers_state_the_remaining_amount_and_the_time_to_reset() -> None:
    tenant = rate_limiter(requests=60, tokens=6000)
    admit(tenant, 1500, 0.0)
    assert tenant.headers(0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "4500",
        "x-ratelimit-reset-tokens": "15s",
    }


def test_a_rejection_has_the_headers() -> None:
    tenant = rate_limiter(requests=1)
    admit(tenant, 1, 0.0)
    with pytest.raises(
        RateLimitExceeded, match=r"limit 1, requested 1.*try again in 1m0s"
    ) as refused:
        admit(tenant, 1, 0.0)
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"


def test_several_routers_together_admit_what_one_would() -> None:
    routers = [rate_limiter(requests=10, n_routers=4) for _ in range(4)]

    def count_admitted(now_s: float) -> int:
        count = 0
        for tenant in routers * 10:
            try:
                admit(tenant, 1, now_s)
            except RateLimitExceeded:
                continue
            count += 1
        return count

    assert (
        count_admitted(0.0) == 8
    )  # two of 2.5 each; the remaining halves are complete after six seconds
    assert sum(count_admitted(float(s)) for s in range(1, 61)) == pytest.approx(10, abs=2)


def test_a_request_larger_than_a_router_s_share_is_admitted_by_a_full_bucket() -> None:
    tenant = rate_limiter(tokens=100, n_routers=4)
    admit(tenant, 90, 0.0)  # capacity 25: in debt by 65, refilled by 25 a minute
    with pytest.raises(RateLimitExceeded) as refused:
        admit(tenant, 25, 0.0)
    assert refused.value.retry_after_s == MAX_RETRY_AFTER_S
    with pytest.raises(RateLimitExceeded):
        admit(tenant, 25, 215.0)
    admit(tenant, 25, 216.0)


def test_one_request_a_minute_over_several_routers_is_admitted() -> None:
    tenant = rate_limiter(requests=1, n_routers=3)
    admit(tenant, 1, 0.0)
    with pytest.raises(RateLimitExceeded) as refused:
        admit(tenant, 1, 0.0)
    assert refused.value.retry_after_s == MAX_RETRY_AFTER_S
    admit(tenant, 1, 181.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0165, "17ms"),
        (1, "1s"),
        (1.25, "1.3s"),
        (59.99, "1m0s"),
        (360, "6m0s"),
        (83.4, "1m23.4s"),
    ],
)
def test_durations_have_the_format_of_openai(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(
    limit=st.integers(1, 1000),
    requests=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 30)), max_size=60),
)
def test_no_interval_admits_more_than_a_burst_and_its_refill(
    limit: int, requests: list[tuple[int, float]]
) -> None:
    bucket, now_s, consumed = TokenBucket(limit, 0.0), 0.0, 0
    for amount, pause_s in requests:
        now_s += pause_s
        if amount <= limit and not bucket.wait_s(amount, now_s):
            bucket.consume(amount, now_s)
            consumed += amount
        assert consumed <= limit + limit * now_s / 60 + 1e-3
        assert 0 <= bucket.remaining(now_s) <= limit


@given(limit=st.integers(1, 1000), amount=st.integers(1, 1000), spent=st.integers(0, 1000))
def test_after_the_wait_the_amount_is_available(limit: int, amount: int, spent: int) -> None:
    bucket = TokenBucket(limit, 0.0)
    bucket.consume(min(spent, limit), 0.0)
    assert bucket.wait_s(amount, bucket.wait_s(amount, 0.0) + 1e-3) == 0
