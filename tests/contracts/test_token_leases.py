"""Leases of token buckets: all holders together never spend more than one bucket would admit."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from faasmoe_contracts.token_leases import (
    FALLBACK_AFTER_S,
    LeaseAuthority,
    LeasedBucket,
    LeaseGrant,
    LeaseRequest,
)

LIMIT = 600  # 10 a second


def renew(authority: LeaseAuthority, name: str, bucket: LeasedBucket, now_s: float) -> None:
    grant = authority.renew(name, bucket.request(now_s), now_s)
    assert grant is not None
    bucket.apply(grant, now_s)


def test_only_holder_is_a_plain_bucket() -> None:
    bucket = LeasedBucket(LIMIT, 0.0, share=1.0)
    assert bucket.take(LIMIT, 0.0)
    assert not bucket.take(1, 0.0)
    assert bucket.wait_s(50, 0.0) == pytest.approx(5.0)
    assert bucket.take(50, 5.0)
    bucket.give_back(20, 5.0)
    assert bucket.available(5.0) == pytest.approx(20)
    assert bucket.available(1e6) == LIMIT


def test_holder_without_a_grant_has_nothing_and_asks_for_what_it_lacks() -> None:
    bucket = LeasedBucket(LIMIT, 0.0)
    assert not bucket.take(30, 0.0)
    assert bucket.request(0.0).wanted == 30


def test_one_busy_holder_of_four_gets_the_whole_limit() -> None:
    authority = LeaseAuthority(LIMIT, 0.0)
    buckets = {f"g{index}": LeasedBucket(LIMIT, 0.0) for index in range(4)}
    spent = 0
    for step in range(6000):  # ten minutes, ten steps a second
        now_s = step / 10
        while buckets["g0"].take(5, now_s):
            spent += 5
        for name, bucket in buckets.items():
            renew(authority, name, bucket, now_s)
    assert 0.99 * 11 * LIMIT <= spent <= 11 * LIMIT
    assert buckets["g0"].share > 0.9


def test_demand_moves_shares_without_their_sum_exceeding_one() -> None:
    authority = LeaseAuthority(LIMIT, 0.0)
    first, second = LeasedBucket(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    for step in range(1200):
        now_s = step / 10
        busy = first if step < 600 else second
        busy.take(5, now_s)
        renew(authority, "first", first, now_s)
        renew(authority, "second", second, now_s)
        assert first.share + second.share <= 1 + 1e-9
    assert second.share > 0.9


def test_holder_without_its_authority_goes_on_at_its_share() -> None:
    authority = LeaseAuthority(LIMIT, 0.0)
    bucket, other = LeasedBucket(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    for step in range(300):
        for name, holder in (("a", bucket), ("b", other)):
            holder.take(1, step / 10)
            renew(authority, name, holder, step / 10)
    assert bucket.share == pytest.approx(0.5, abs=0.05)
    start_s = 29.9 + FALLBACK_AFTER_S
    while bucket.take(1, start_s):
        pass
    assert bucket.available(start_s + 6) == pytest.approx(bucket.share * 60, abs=1.0)


def test_authority_withholds_the_share_of_a_holder_that_does_not_confirm() -> None:
    authority = LeaseAuthority(LIMIT, 0.0)
    lost, alive = LeasedBucket(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    for step in range(300):
        for name, holder in (("lost", lost), ("alive", alive)):
            holder.take(1, step / 10)
            renew(authority, name, holder, step / 10)
    spent = 0
    for step in range(600, 6600):
        while alive.take(1, step / 10):
            spent += 1
        renew(authority, "alive", alive, step / 10)
    assert spent <= LIMIT + (1 - lost.share) * 10 * LIMIT
    authority.forget("lost")
    authority_before = spent
    for step in range(6600, 12600):
        while alive.take(1, step / 10):
            spent += 1
        renew(authority, "alive", alive, step / 10)
    assert spent - authority_before >= 0.98 * 10 * LIMIT


def test_restarted_authority_begins_empty_and_withholds_known_shares() -> None:
    authority = LeaseAuthority(LIMIT, 0.0, shares={"a": 0.6, "b": 0.4})
    assert authority.available(30.0) == 0.0
    renewed = LeasedBucket(LIMIT, 0.0)
    renew(authority, "a", renewed, 30.0)  # sequence 1: a new process
    assert authority.available(30.5) == pytest.approx(0.6 * 5)


def test_restarted_authority_waits_until_what_holders_had_is_known() -> None:
    authority, bucket = LeaseAuthority(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    bucket.take(LIMIT, 0.0)
    renew(authority, "a", bucket, 0.0)
    renew(authority, "b", LeasedBucket(LIMIT, 0.0), 0.0)
    restarted = LeaseAuthority(LIMIT, 1.0, shares={"a": 0.3, "b": 0.3})
    assert restarted.available(3.9) == 0
    assert restarted.available(5.0) == pytest.approx(0.4 * 10)


def test_overtaken_request_gets_nothing() -> None:
    authority, bucket = LeaseAuthority(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    late = bucket.request(0.0)
    renew(authority, "a", bucket, 0.0)
    assert authority.renew("a", late, 0.1) is not None  # sequence 1 is a new holder
    assert authority.renew("a", LeaseRequest(1, 0, 0, 0, 0, 0), 0.2) is not None
    newest = LeaseRequest(5, 0, 0, 0, 10, 0)
    assert authority.renew("a", newest, 0.3) is not None
    assert authority.renew("a", LeaseRequest(4, 0, 0, 0, 10, 0), 0.4) is None


def test_grant_of_a_request_that_was_given_up_is_ignored() -> None:
    bucket = LeasedBucket(LIMIT, 0.0)
    first = bucket.request(0.0)
    bucket.request(0.1)
    bucket.apply(LeaseGrant(first.sequence, 100, 1.0), 0.2)
    assert bucket.available(0.2) == 0
    assert bucket.share == 0


def test_tokens_of_a_lost_grant_come_back() -> None:
    authority, bucket = LeaseAuthority(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    bucket.take(LIMIT, 0.0)
    authority.renew("a", bucket.request(0.0), 0.0)
    renew(authority, "a", bucket, 0.0)
    assert bucket.available(0.0) == LIMIT


def test_what_is_given_back_counts_once_even_if_grants_are_lost() -> None:
    authority, bucket = LeaseAuthority(LIMIT, 0.0), LeasedBucket(LIMIT, 0.0)
    bucket.take(LIMIT, 0.0)
    renew(authority, "a", bucket, 0.0)
    assert bucket.take(LIMIT, 0.0)
    bucket.give_back(100, 0.0)
    authority.renew("a", bucket.request(0.0), 0.0)
    authority.renew("a", bucket.request(0.0), 0.0)
    renew(authority, "a", bucket, 0.0)
    assert bucket.available(0.0) + authority.available(0.0) == pytest.approx(100)


AMOUNT = st.integers(1, LIMIT)


class Leases(RuleBasedStateMachine):
    """Three holders, an authority that is killed and restored, and messages that are lost."""

    @initialize()
    def start(self) -> None:
        self.now_s = 0.0
        self.authority = LeaseAuthority(LIMIT, 0.0)
        self.saved: dict[str, float] = {}
        self.names = ["a", "b", "c"]
        self.buckets = {name: LeasedBucket(LIMIT, 0.0) for name in self.names}
        self.spends: list[tuple[float, float]] = []

    @rule(seconds=st.floats(0.01, 100.0) | st.floats(0.01, 4.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(index=st.integers(0, 2), amount=AMOUNT)
    def take(self, index: int, amount: int) -> None:
        if self.buckets[self.names[index]].take(amount, self.now_s):
            self.spends.append((self.now_s, float(amount)))

    @rule(index=st.integers(0, 2))
    def drain(self, index: int) -> None:
        bucket = self.buckets[self.names[index]]
        amount = bucket.available(self.now_s)
        if amount > 0 and bucket.take(amount, self.now_s):
            self.spends.append((self.now_s, amount))

    @rule(index=st.integers(0, 2), fate=st.sampled_from(("arrives", "request", "response")))
    def renew(self, index: int, fate: str) -> None:
        name = self.names[index]
        request = self.buckets[name].request(self.now_s)
        if fate == "request":
            return
        grant = self.authority.renew(name, request, self.now_s)
        self.saved = self.authority.shares
        if fate == "arrives" and grant is not None:
            self.buckets[name].apply(grant, self.now_s)

    @rule()
    def restart_authority(self) -> None:
        self.authority = LeaseAuthority(LIMIT, self.now_s, shares=self.saved)

    @rule(index=st.integers(0, 2))
    def restart_holder(self, index: int) -> None:
        self.buckets[self.names[index]] = LeasedBucket(LIMIT, self.now_s)

    @invariant()
    def shares_are_at_most_one(self) -> None:
        assert sum(bucket.share for bucket in self.buckets.values()) <= 1 + 1e-9

    @invariant()
    def spends_no_more_than_one_bucket_admits(self) -> None:
        for index, (start_s, _) in enumerate(self.spends):
            spent = sum(amount for _, amount in self.spends[index:])
            admitted = LIMIT + LIMIT / 60 * (self.now_s - start_s)
            assert spent <= admitted + 1e-3, (spent, admitted)


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
