from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.retry_policy import pick_address

PLACES = ["a:1", "b:1", "c:1", "d:1"]
chances = st.floats(0, 1, exclude_max=True)


@given(
    st.sets(st.sampled_from(PLACES)),
    st.sets(st.sampled_from(PLACES)),
    st.sets(st.sampled_from(PLACES)),
    st.dictionaries(st.sampled_from(PLACES), st.integers(0, 9)),
    st.integers(0, 1000),
    chances,
)
def test_one_that_is_there_and_neither_ejected_nor_tried(
    there: set[str],
    avoid: set[str],
    tried: set[str],
    busy: dict[str, int],
    turn: int,
    chance: float,
) -> None:
    found = pick_address(
        sorted(there),
        excluded=avoid,
        tried=tried,
        in_flight=busy,
        round_robin_index=turn,
        random_fraction=chance,
    )
    fit = there - avoid - tried
    assert found in fit if fit else found is None


@given(st.integers(0, 1000), chances)
def test_never_the_busiest_of_several(turn: int, chance: float) -> None:
    busy = {"a:1": 3, "b:1": 2, "c:1": 0, "d:1": 9}
    assert (
        pick_address(
            PLACES, excluded=(), in_flight=busy, round_robin_index=turn, random_fraction=chance
        )
        != "d:1"
    )


@given(chances)
def test_turns_go_round_when_all_are_equally_busy(chance: float) -> None:
    found = Counter(
        pick_address(
            PLACES, excluded=(), in_flight={}, round_robin_index=turn, random_fraction=chance
        )
        for turn in range(40)
    )
    assert set(found.values()) == {10}


def test_two_calls_of_one_fan_out_go_to_two_replicas() -> None:
    first = pick_address(
        PLACES[:2], excluded=(), in_flight={}, round_robin_index=7, random_fraction=0.3
    )
    assert first is not None
    second = pick_address(
        PLACES[:2], excluded=(), in_flight={first: 1}, round_robin_index=7, random_fraction=0.3
    )
    assert second != first
