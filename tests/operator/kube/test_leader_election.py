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
UNAVAILABLE = Unavailable("unavailable", status=503)


class Scenario:
    """Two candidates with a common clock."""

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


def try_acquire(elector: LeaderElector) -> bool:
    return asyncio.run(elector.try_acquire_or_renew())


def test_the_first_candidate_leads_and_the_other_waits() -> None:
    scenario = Scenario()
    assert try_acquire(scenario.a)
    assert not try_acquire(scenario.b)
    assert scenario.lease["holderIdentity"] == "a"
    assert scenario.lease["acquireTime"] == "2026-08-29T10:40:00.000000Z"


def test_a_renewed_lease_is_kept() -> None:
    scenario = Scenario()
    for _ in range(5):
        assert try_acquire(scenario.a)
        assert not try_acquire(scenario.b)
        scenario.now += LEASE_DURATION_S - 1
    assert scenario.lease["acquireTime"] == "2026-08-29T10:40:00.000000Z"
    assert scenario.lease["renewTime"] == "2026-08-29T10:41:56.000000Z"
    assert scenario.lease["leaseTransitions"] == 1


def test_an_expired_lease_is_acquired() -> None:
    scenario = Scenario()
    try_acquire(scenario.a)
    try_acquire(scenario.b)
    scenario.now += LEASE_DURATION_S
    assert try_acquire(scenario.b)
    assert not try_acquire(scenario.a)
    assert scenario.lease["leaseTransitions"] == 2


def test_expiry_is_measured_from_the_last_observed_renewal() -> None:
    scenario = Scenario()
    try_acquire(scenario.a)
    scenario.now += 10 * LEASE_DURATION_S
    assert not try_acquire(scenario.b)
    scenario.now += LEASE_DURATION_S
    assert try_acquire(scenario.b)


class RacingKubeApi(FakeKubeApi):
    """Another candidate acquires the lease between our read and our write."""

    async def apply(self, kind: Kind, obj: Object) -> Object:
        live = self.objects[kind, NAMESPACE, LEASE_NAME]
        self.write({**live, "spec": {**live["spec"], "holderIdentity": "c"}})
        return await super().apply(kind, obj)


def test_of_two_concurrent_candidates_one_leads() -> None:
    scenario = Scenario(RacingKubeApi())
    try_acquire(scenario.a)
    assert not try_acquire(scenario.a)
    assert scenario.lease["holderIdentity"] == "c"


@pytest.mark.parametrize("verb", ["get", "create"])
def test_does_not_lead_while_the_api_server_is_unavailable(verb: str) -> None:
    scenario = Scenario()
    scenario.api.errors[verb, LEASE] = UNAVAILABLE
    assert not try_acquire(scenario.a)


def test_releases_the_lease_at_shutdown() -> None:
    scenario = Scenario()

    async def lead() -> None:
        async with hold_leadership(scenario.a):
            assert not await scenario.b.try_acquire_or_renew()

    asyncio.run(lead())
    assert try_acquire(scenario.b)


def test_cancels_the_body_when_the_lease_cannot_be_renewed() -> None:
    scenario = Scenario()

    async def lead() -> None:
        async with hold_leadership(scenario.a, retry_s=0.0, deadline_s=0.0):
            scenario.api.errors["get", LEASE] = UNAVAILABLE
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as lost:
        asyncio.run(lead())
    assert isinstance(lost.value.exceptions[0], LeadershipLost)


def test_waits_for_leadership() -> None:
    scenario = Scenario()
    try_acquire(scenario.a)

    async def lead() -> None:
        waiting = asyncio.create_task(_lead(scenario.b))
        await asyncio.sleep(0)
        await scenario.a.release()
        await asyncio.wait_for(waiting, 5)

    async def _lead(elector: LeaderElector) -> None:
        async with hold_leadership(elector, retry_s=0.0):
            assert scenario.lease["holderIdentity"] == "b"

    asyncio.run(lead())
