from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.choice import choose

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
    found = choose(sorted(there), avoid=avoid, tried=tried, busy=busy, turn=turn, chance=chance)
    fit = there - avoid - tried
    assert found in fit if fit else found is None


@given(st.integers(0, 1000), chances)
def test_never_the_busiest_of_several(turn: int, chance: float) -> None:
    busy = {"a:1": 3, "b:1": 2, "c:1": 0, "d:1": 9}
    assert choose(PLACES, avoid=(), busy=busy, turn=turn, chance=chance) != "d:1"


@given(chances)
def test_turns_go_round_when_all_are_equally_busy(chance: float) -> None:
    found = Counter(
        choose(PLACES, avoid=(), busy={}, turn=turn, chance=chance) for turn in range(40)
    )
    assert set(found.values()) == {10}


def test_two_calls_of_one_fan_out_go_to_two_replicas() -> None:
    first = choose(PLACES[:2], avoid=(), busy={}, turn=7, chance=0.3)
    assert first is not None
    second = choose(PLACES[:2], avoid=(), busy={first: 1}, turn=7, chance=0.3)
    assert second != first
