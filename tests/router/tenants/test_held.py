from __future__ import annotations

from contextlib import ExitStack

import pytest

from faasmoe_router.errors import HoldQueueFull
from faasmoe_router.tenants.held import HeldLimits, HeldRequests


def test_each_tenant_has_its_own_part_of_what_may_wait() -> None:
    held = HeldRequests(HeldLimits(max_requests=8, max_bytes=1000))
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(held.holding("flood", 0.25, size_bytes=1))
        with pytest.raises(HoldQueueFull, match="2 of your requests"):
            stack.enter_context(held.holding("flood", 0.25, size_bytes=1))
        stack.enter_context(held.holding("quiet", 0.25, size_bytes=1))


def test_bytes_are_parted_too() -> None:
    held = HeldRequests(HeldLimits(max_requests=8, max_bytes=1000))
    with (
        held.holding("a", 0.5, size_bytes=400),
        pytest.raises(HoldQueueFull, match="400 bytes of yours"),
        held.holding("a", 0.5, size_bytes=101),
    ):
        raise AssertionError("it was let in")


def test_one_request_may_always_wait() -> None:
    held = HeldRequests(HeldLimits(max_requests=2, max_bytes=10))
    with held.holding("a", 0.01, size_bytes=1000):
        pass


def test_what_has_waited_makes_room_however_it_ended() -> None:
    held = HeldRequests(HeldLimits(max_requests=1, max_bytes=100))
    for _ in range(3):
        with pytest.raises(ValueError, match="hung up"), held.holding("a", 1.0, size_bytes=80):
            raise ValueError("hung up")
    with held.holding("a", 1.0, size_bytes=80):
        pass
