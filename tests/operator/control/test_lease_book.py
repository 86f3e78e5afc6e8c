"""The authority of limits over several gateways: grants, saved shares, and usage of the others."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given, settings

from faasmoe_contracts.gateway_file import LimitsEntry, TenantEntry
from faasmoe_contracts.lease_messages import LeaseReport, PeriodUsage
from faasmoe_contracts.tenant_usage import Usage
from faasmoe_contracts.token_leases import LeasedBucket
from faasmoe_operator.control.lease_book import LeaseBook, Shares

LIMIT = 60
NAME = "acme/requests"
ACME = TenantEntry("acme", "/keys", (), limits=LimitsEntry(requests=LIMIT))


@dataclass
class Machine:
    """Gateways that lease one limit, and the authority, which may be restarted.

    Attributes:
        n_admitted: requests that were admitted.
    """

    n_gateways: int
    book: LeaseBook | None = field(default_factory=lambda: LeaseBook([ACME], 0.0))
    saved: Shares | None = None
    n_admitted: int = 0
    buckets: dict[str, LeasedBucket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buckets = {str(n): LeasedBucket(LIMIT, 0.0) for n in range(self.n_gateways)}

    def renew(self, gateway: str, now_s: float) -> None:
        request = self.buckets[gateway].request(now_s)
        if self.book is None:
            return
        answer = self.book.renew(LeaseReport(gateway, {NAME: request}), now_s)
        self.saved = self.book.shares_to_save() or self.saved
        if NAME in answer.grants:
            self.buckets[gateway].apply(answer.grants[NAME], now_s)

    def call(self, gateway: str, now_s: float) -> bool:
        """Send a request as the gateway does: with one renewal if there are no tokens."""
        for _ in range(2):
            if self.buckets[gateway].take(1, now_s):
                self.n_admitted += 1
                return True
            self.renew(gateway, now_s)
        if self.buckets[gateway].take(1, now_s):
            self.n_admitted += 1
            return True
        return False

    def restart(self, now_s: float) -> None:
        self.book = LeaseBook([ACME], now_s, saved=self.saved)


def test_one_gateway_gets_the_whole_limit_and_the_others_nothing_more() -> None:
    machine = Machine(3)
    assert all(machine.call("0", 0.0) for _ in range(LIMIT))
    assert not any(machine.call(name, 0.0) for name in "012")


def test_limit_is_reached_by_one_connection_while_others_are_idle() -> None:
    machine = Machine(4)
    while machine.call("1", 0.0):
        pass
    before, now_s = machine.n_admitted, 0.0
    while now_s < 120.0:
        now_s += 0.2
        machine.call("1", now_s)
    assert (machine.n_admitted - before) / (LIMIT * 2) >= 0.95


def test_gateways_go_on_with_their_shares_while_the_authority_is_away() -> None:
    machine = Machine(2)
    for step in range(200):
        for name in "01":
            machine.call(name, step * 0.2)
    machine.book, before = None, machine.n_admitted
    for step in range(600):
        for name in "01":
            machine.call(name, 40.0 + step * 0.2)
    assert 0.5 * LIMIT * 2 < machine.n_admitted - before <= LIMIT * 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["call", "call", "call", "renew", "away", "restart"]),
            st.sampled_from("012"),
            st.sampled_from([0.0, 0.1, 0.3, 1.5, 4.0]),
        ),
        max_size=120,
    )
)
def test_never_more_than_the_limit_whatever_becomes_of_the_authority(
    steps: list[tuple[str, str, float]],
) -> None:
    machine, now_s = Machine(3), 0.0
    for action, gateway, wait_s in steps:
        now_s += wait_s
        match action:
            case "call":
                for _ in range(10):
                    machine.call(gateway, now_s)
            case "renew":
                machine.renew(gateway, now_s)
            case "away":
                machine.book = None
            case "restart":
                machine.restart(now_s)
        assert machine.n_admitted <= LIMIT * (1 + now_s / 60) + 1e-3


def test_shares_are_saved_when_they_grow_and_not_at_each_renewal() -> None:
    machine = Machine(2)
    machine.call("0", 0.0)
    assert machine.saved is not None
    assert set(machine.saved[NAME]) == {"0"}
    machine.renew("0", 0.4)
    assert machine.book is not None
    assert machine.book.shares_to_save() is None
    machine.call("1", 0.5)
    assert set(machine.saved[NAME]) == {"0", "1"}


def usage(n: int, day: str = "2026-11-29") -> PeriodUsage:
    return PeriodUsage(day, Usage(n, n, n, 0.5 * n), Usage(10 * n, n, n, 0.5 * n))


def test_gateways_are_told_what_tenants_used_through_the_others() -> None:
    book = LeaseBook([ACME], 0.0)
    assert book.renew(LeaseReport("0", {}, {"acme": usage(1)}), 0.0).usage == {}
    book.renew(LeaseReport("1", {}, {"acme": usage(2)}), 0.0)
    told = book.renew(LeaseReport("2", {}), 0.0).usage["acme"]
    assert (told.in_day.requests, told.in_month.requests) == (3, 30)
    assert book.renew(LeaseReport("0", {}), 0.0).usage["acme"] == usage(2)


def test_usage_of_an_earlier_day_counts_in_the_month_alone() -> None:
    book = LeaseBook([ACME], 0.0)
    book.renew(LeaseReport("0", {}, {"acme": usage(1, "2026-11-28")}), 0.0)
    book.renew(LeaseReport("1", {}, {"acme": usage(2, "2026-11-29")}), 0.0)
    told = book.renew(LeaseReport("2", {}), 0.0).usage["acme"]
    assert (told.day, told.in_day.requests, told.in_month.requests) == ("2026-11-29", 2, 30)


def test_limits_that_do_not_exist_are_left_out() -> None:
    request = LeasedBucket(LIMIT, 0.0).request(0.0)
    answer = LeaseBook([ACME], 0.0).renew(LeaseReport("0", {"other/tokens": request}), 0.0)
    assert (answer.grants, answer.levels) == ({}, {})
