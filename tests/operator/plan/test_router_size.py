"""What routers count for, measured or not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.plan.router_size import PROCESS_BYTES, RouterSize, largest_own_bytes


def test_a_router_that_was_never_measured_counts_its_weights_and_a_process() -> None:
    assert RouterSize(1000, "a").bytes_among(1) == 1000 + PROCESS_BYTES
    assert RouterSize(1000, "a").bytes_among(4) == 250 + PROCESS_BYTES
    assert RouterSize(1000, "a").bytes_among(4, like_it=5) == 255


def test_weights_that_are_no_pages_of_files_count_as_its_own_alone() -> None:
    copied = RouterSize(1000, "a").measured(1200, 10, n_sharing=1)
    assert copied.bytes_among(1) == 1210


def test_a_router_that_shares_with_nobody_counts_its_weights_whole() -> None:
    assert RouterSize(1000).measured(5, 1000, n_sharing=1).bytes_among(7) == 1005


def test_the_largest_of_equal_routers_stands_for_those_that_were_not_measured() -> None:
    sizes = [RouterSize(9, "a").measured(own, 9, n_sharing=1) for own in (3, 7, 5)]
    assert largest_own_bytes([*sizes, RouterSize(9, "b"), RouterSize(9)]) == {"a": 7}


@given(weights=st.integers(0, 1 << 40), own=st.integers(0, 1 << 30), n_sharing=st.integers(1, 100))
def test_parts_add_up_to_the_weights_once(weights: int, own: int, n_sharing: int) -> None:
    size = RouterSize(weights, "a").measured(own, weights // n_sharing + 1, n_sharing=n_sharing)
    total = n_sharing * (size.bytes_among(n_sharing) - own)
    assert 0 <= total - weights < n_sharing
