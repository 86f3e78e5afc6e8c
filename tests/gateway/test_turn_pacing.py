"""Pauses between a sender's turns, for as long as there are others."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_gateway.sender_turns import SenderTurns
from faasmoe_gateway.turn_pacing import ACTIVE_S, MAX_PAUSE_S, PAUSE_FACTOR, TurnPacing


def test_a_sender_alone_never_pauses() -> None:
    pacing = TurnPacing()
    assert [pacing.pause_after("a", 0.01, now_s) for now_s in (0.0, 0.1, 0.2)] == [0.0] * 3


def test_beside_others_a_sender_pauses_for_a_multiple_of_its_turns() -> None:
    pacing = TurnPacing()
    pacing.pause_after("b", 0.001, 0.0)
    assert pacing.pause_after("a", 0.002, 0.1) == pytest.approx(PAUSE_FACTOR * 0.002)
    assert pacing.pause_after("a", 3600.0, 0.2) == MAX_PAUSE_S
    assert pacing.pause_after("b", 0.001, 0.3) == pytest.approx(PAUSE_FACTOR * 0.001)


def test_others_count_for_a_while_after_their_last_turn() -> None:
    pacing = TurnPacing()
    pacing.pause_after("b", 0.001, 0.0)
    assert pacing.pause_after("a", 0.001, ACTIVE_S - 0.01)
    assert not pacing.pause_after("a", 0.001, ACTIVE_S)


def test_strangers_pause_and_make_nobody_pause() -> None:
    pacing = TurnPacing()
    assert not pacing.pause_after("", 0.001, 0.0)
    assert not pacing.pause_after("a", 0.001, 0.1)
    assert pacing.pause_after("", 0.001, 0.2)


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.floats(0.0, 2.0))))
def test_nothing_is_kept_of_senders_that_have_left(turns: list[tuple[str, float]]) -> None:
    pacing, now_s = TurnPacing(), 0.0
    for sender, later_s in turns:
        now_s += later_s
        assert 0.0 <= pacing.pause_after(sender, 0.001, now_s) <= MAX_PAUSE_S
    assert not pacing.pause_after("last", 0.001, now_s + ACTIVE_S)


class FixedPacing(TurnPacing):
    """Has everyone pause for the same time."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self._pause_s = pause_s

    def pause_after(self, sender: object, elapsed_s: float, now_s: float) -> float:
        assert elapsed_s >= 0
        return self._pause_s


def test_a_turn_that_has_ended_is_passed_on_after_the_pause() -> None:
    async def work() -> None:
        turns = SenderTurns(pacing=FixedPacing(1e-3))
        (await turns.take("a")).release()
        for _ in range(3):
            async with asyncio.timeout(60):
                (await turns.take("a")).release()

    asyncio.run(work())


def test_until_then_nobody_has_it_who_waits_or_comes() -> None:
    async def work() -> None:
        turns = SenderTurns(pacing=FixedPacing(3600.0))
        first, waiting = await turns.take("a"), turns.ask("a")
        first.release()
        assert not waiting.done()
        turns.give_up(waiting)
        assert not turns.ask("a").done()
        assert turns.ask("b").done()

    asyncio.run(work())
