from __future__ import annotations

from contextlib import ExitStack

import pytest

from faasmoe_router.errors import ActivationQueueFull
from faasmoe_router.tenants.quota import ActivationQueueCapacity, TenantQueueQuota


def test_each_tenant_has_its_own_share_of_the_queue() -> None:
    quota = TenantQueueQuota(ActivationQueueCapacity(max_requests=8, max_bytes=1000))
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(quota.reserve("flood", 0.25, size_bytes=1))
        with pytest.raises(ActivationQueueFull, match="2 of your requests"):
            stack.enter_context(quota.reserve("flood", 0.25, size_bytes=1))
        stack.enter_context(quota.reserve("quiet", 0.25, size_bytes=1))


def test_bytes_are_shared_too() -> None:
    quota = TenantQueueQuota(ActivationQueueCapacity(max_requests=8, max_bytes=1000))
    with (
        quota.reserve("a", 0.5, size_bytes=400),
        pytest.raises(ActivationQueueFull, match="400 bytes of your requests"),
        quota.reserve("a", 0.5, size_bytes=101),
    ):
        raise AssertionError("the request was queued")


def test_one_request_may_always_be_queued() -> None:
    quota = TenantQueueQuota(ActivationQueueCapacity(max_requests=2, max_bytes=10))
    with quota.reserve("a", 0.01, size_bytes=1000):
        pass


def test_a_request_leaves_the_queue_however_it_ends() -> None:
    quota = TenantQueueQuota(ActivationQueueCapacity(max_requests=1, max_bytes=100))
    for _ in range(3):
        with pytest.raises(ValueError, match="hung up"), quota.reserve("a", 1.0, size_bytes=80):
            raise ValueError("hung up")
    with quota.reserve("a", 1.0, size_bytes=80):
        pass
