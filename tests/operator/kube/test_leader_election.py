import asyncio

import pytest
from fake_kube_api import FakeKubeApi

from faasmoe_operator.kube.errors import Unavailable
from faasmoe_operator.kube.leader_election import (
    LEASE_DURATION_S,
    LEASE_NAME,
    LeaderElector,
    LeadershipLost,
    hold_leadership,
)
from faasmoe_operator.kube.types import LEASE, Kind, Object

NAMESPACE = "faasmoe-system"
AWAY = Unavailable("away", status=503)


class Scenario:
    """Two operators and the clock that both go by."""

    def __init__(self, api: FakeKubeApi | None = None) -> None:
        self.api, self.now = api or FakeKubeApi(), 0.0
        self.a, self.b = self.candidate("a"), self.candidate("b")

    def candidate(self, name: str) -> LeaderElector:
        return LeaderElector(
            self.api,
            namespace=NAMESPACE,
            identity=name,
            clock=lambda: self.now,
            wall_clock=lambda: 1_788_000_000.0 + self.now,
        )

    @property
    def lease(self) -> Object:
        spec: Object = self.api.objects[LEASE, NAMESPACE, LEASE_NAME]["spec"]
        return spec


def try_acquire(election: LeaderElector) -> bool:
    return asyncio.run(election.try_acquire_or_renew())


def test_the_first_leads_and_the_other_waits() -> None:
    story = Scenario()
    assert try_acquire(story.a)
    assert not try_acquire(story.b)
    assert story.lease["holderIdentity"] == "a"
    assert story.lease["acquireTime"] == "2026-08-29T10:40:00.000000Z"


def test_a_lease_that_is_renewed_is_kept() -> None:
    story = Scenario()
    for _ in range(5):
        assert try_acquire(story.a)
        assert not try_acquire(story.b)
        story.now += LEASE_DURATION_S - 1
    assert story.lease["acquireTime"] == "2026-08-29T10:40:00.000000Z"
    assert story.lease["renewTime"] == "2026-08-29T10:41:56.000000Z"
    assert story.lease["leaseTransitions"] == 1


def test_a_lease_that_has_run_out_is_taken() -> None:
    story = Scenario()
    try_acquire(story.a)
    try_acquire(story.b)
    story.now += LEASE_DURATION_S
    assert try_acquire(story.b)
    assert not try_acquire(story.a)
    assert story.lease["leaseTransitions"] == 2


def test_a_lease_counts_from_when_it_was_seen_whatever_its_own_clock_says() -> None:
    story = Scenario()
    try_acquire(story.a)
    story.now += 10 * LEASE_DURATION_S
    assert not try_acquire(story.b)
    story.now += LEASE_DURATION_S
    assert try_acquire(story.b)


class RacingKubeApi(FakeKubeApi):
    """Another candidate is quicker between our look and our write."""

    async def apply(self, kind: Kind, obj: Object) -> Object:
        live = self.objects[kind, NAMESPACE, LEASE_NAME]
        self.write({**live, "spec": {**live["spec"], "holderIdentity": "c"}})
        return await super().apply(kind, obj)


def test_of_two_that_take_it_at_once_one_leads() -> None:
    story = Scenario(RacingKubeApi())
    try_acquire(story.a)
    assert not try_acquire(story.a)
    assert story.lease["holderIdentity"] == "c"


@pytest.mark.parametrize("verb", ["get", "create"])
def test_does_not_lead_while_the_api_server_is_away(verb: str) -> None:
    story = Scenario()
    story.api.errors[verb, LEASE] = AWAY
    assert not try_acquire(story.a)


def test_gives_the_lease_back_so_that_the_next_need_not_wait() -> None:
    story = Scenario()

    async def lead() -> None:
        async with hold_leadership(story.a):
            assert not await story.b.try_acquire_or_renew()

    asyncio.run(lead())
    assert try_acquire(story.b)


def test_ends_what_it_does_when_the_lease_cannot_be_renewed() -> None:
    story = Scenario()

    async def lead() -> None:
        async with hold_leadership(story.a, retry_s=0.0, deadline_s=0.0):
            story.api.errors["get", LEASE] = AWAY
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as lost:
        asyncio.run(lead())
    assert isinstance(lost.value.exceptions[0], LeadershipLost)


def test_waits_for_its_turn() -> None:
    story = Scenario()
    try_acquire(story.a)

    async def lead() -> None:
        waiting = asyncio.create_task(_lead(story.b))
        await asyncio.sleep(0)
        await story.a.release()
        await asyncio.wait_for(waiting, 5)

    async def _lead(election: LeaderElector) -> None:
        async with hold_leadership(election, retry_s=0.0):
            assert story.lease["holderIdentity"] == "b"

    asyncio.run(lead())
