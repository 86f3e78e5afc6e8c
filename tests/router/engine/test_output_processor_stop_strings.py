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
def test_stops_before_the_stop_string_completed_first(stops: list[str], text: str) -> None:
    assert _run(stops, list(text)) == _first_complete(stops, text)


@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 24), max_size=6))
def test_result_is_independent_of_text_boundaries(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert _run(stops, pieces) == _run(stops, list(text))


@given(stops=STOPS, text=TEXT)
def test_holds_back_only_prefixes_of_stop_strings(stops: list[str], text: str) -> None:
    matcher = StopStringMatcher(stops)
    fed = ""
    emitted = ""
    for character in text:
        fed += character
        piece, stopped = matcher.feed(character)
        emitted += piece
        if stopped:
            return
        held_back = fed.removeprefix(emitted)
        assert not held_back or any(
            stop.startswith(held_back) and stop != held_back for stop in stops
        )


def test_holds_back_nothing_without_stop_strings() -> None:
    assert StopStringMatcher([]).feed("anything") == ("anything", False)


def test_rejects_empty_stop_strings() -> None:
    with pytest.raises(ValueError, match="expected non-empty strings"):
        StopStringMatcher(["a", ""])
