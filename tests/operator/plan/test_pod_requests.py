"""Requests grow with what is attached, up to a full sandbox."""

import pytest

from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy

MIB = 1 << 20
POLICY = ResizePolicy(PodRequests(50, 512 * MIB), PodRequests(4000, 812 * MIB))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([], PodRequests(50, 512 * MIB), id="generic"),
        pytest.param([100 * MIB], PodRequests(4000, 612 * MIB), id="one"),
        pytest.param([100 * MIB, 50 * MIB], PodRequests(4000, 662 * MIB), id="two"),
        pytest.param([100 * MIB] * 3, PodRequests(4000, 812 * MIB), id="full"),
        pytest.param([100 * MIB] * 4, PodRequests(4000, 812 * MIB), id="never-more"),
    ],
)
def test_requests_follow_what_is_attached(sizes: list[int], expected: PodRequests) -> None:
    assert POLICY.requests(sizes) == expected
