"""Power-of-two-choices load balancing."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.retry_policy import pick_address

ADDRESSES = ["a:1", "b:1", "c:1", "d:1"]
fractions = st.floats(0, 1, exclude_max=True)


@given(
    st.sets(st.sampled_from(ADDRESSES)),
    st.sets(st.sampled_from(ADDRESSES)),
    st.sets(st.sampled_from(ADDRESSES)),
    st.dictionaries(st.sampled_from(ADDRESSES), st.integers(0, 9)),
    st.integers(0, 1000),
    fractions,
)
def test_picks_an_address_that_is_neither_excluded_nor_tried(
    addresses: set[str],
    excluded: set[str],
    tried: set[str],
    in_flight: dict[str, int],
    round_robin_index: int,
    random_fraction: float,
) -> None:
    picked = pick_address(
        sorted(addresses),
        excluded=excluded,
        tried=tried,
        in_flight=in_flight,
        round_robin_index=round_robin_index,
        random_fraction=random_fraction,
    )
    candidates = addresses - excluded - tried
    assert picked in candidates if candidates else picked is None


@given(st.integers(0, 1000), fractions)
def test_never_picks_the_most_loaded_of_several(
    round_robin_index: int, random_fraction: float
) -> None:
    in_flight = {"a:1": 3, "b:1": 2, "c:1": 0, "d:1": 9}
    assert (
        pick_address(
            ADDRESSES,
            excluded=(),
            in_flight=in_flight,
            round_robin_index=round_robin_index,
            random_fraction=random_fraction,
        )
        != "d:1"
    )


@given(fractions)
def test_round_robin_at_equal_load(random_fraction: float) -> None:
    picked = Counter(
        pick_address(
            ADDRESSES,
            excluded=(),
            in_flight={},
            round_robin_index=round_robin_index,
            random_fraction=random_fraction,
        )
        for round_robin_index in range(40)
    )
    assert set(picked.values()) == {10}


def test_two_calls_of_one_fan_out_go_to_different_replicas() -> None:
    first = pick_address(
        ADDRESSES[:2], excluded=(), in_flight={}, round_robin_index=7, random_fraction=0.3
    )
    assert first is not None
    second = pick_address(
        ADDRESSES[:2], excluded=(), in_flight={first: 1}, round_robin_index=7, random_fraction=0.3
    )
    assert second != first
