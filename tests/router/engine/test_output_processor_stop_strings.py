from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.engine.output_processor import StopStringMatcher

TEXT = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def _run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStringMatcher(stops)
    emitted = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        emitted += text
        if stopped:
            return emitted, True
    return emitted + matcher.flush(), False


def _first_complete(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(stops=STOPS, text=TEXT)
def test_ends_before_the_stop_string_that_is_complete_first(stops: list[str], text: str) -> None:
    assert _run(stops, list(text)) == _first_complete(stops, text)


@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 24), max_size=6))
def test_result_does_not_depend_on_how_the_text_is_cut(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert _run(stops, pieces) == _run(stops, list(text))


@given(stops=STOPS, text=TEXT)
def test_holds_back_only_what_may_begin_a_stop_string(stops: list[str], text: str) -> None:
    matcher = StopStringMatcher(stops)
    fed = ""
    emitted = ""
    for character in text:
        fed += character
        piece, stopped = matcher.feed(character)
        emitted += piece
        if stopped:
            return
        held = fed.removeprefix(emitted)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_is_held_without_stop_strings() -> None:
    assert StopStringMatcher([]).feed("anything") == ("anything", False)


def test_refuses_an_empty_stop_string() -> None:
    with pytest.raises(ValueError, match="expected strings that are not empty"):
        StopStringMatcher(["a", ""])
