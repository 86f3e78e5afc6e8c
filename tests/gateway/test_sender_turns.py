"""Turns of senders: in order for each, and never held up by another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_gateway.credentials import MAX_KNOWN_CREDENTIALS, KnownCredentials, shown_key
from faasmoe_gateway.sender_turns import SenderTurns

N_STEPS = 5  # of the event loop, for each request


async def work_in_steps(name: str, finished: list[str]) -> None:
    for _ in range(N_STEPS):
        await asyncio.sleep(0)
    finished.append(name)


def order_of(run: Callable[[str, str, list[str]], Coroutine[Any, Any, None]]) -> list[str]:
    """Return the order in which 20 requests of one sender and then one of another finish."""

    async def everything() -> list[str]:
        finished: list[str] = []
        flood = [asyncio.create_task(run("flood", f"flood {n}", finished)) for n in range(20)]
        quiet = asyncio.create_task(run("quiet", "quiet", finished))
        await asyncio.gather(*flood, quiet)
        return finished

    return asyncio.run(everything())


def test_a_sender_of_many_delays_only_its_own() -> None:
    turns = SenderTurns()

    async def in_turn(sender: str, name: str, finished: list[str]) -> None:
        turn = await turns.take(sender)
        await work_in_steps(name, finished)
        turn.release()

    async def at_once(sender: str, name: str, finished: list[str]) -> None:
        await work_in_steps(name, finished)

    order = order_of(in_turn)
    assert order.index("quiet") <= 1
    assert [name for name in order if name != "quiet"] == [f"flood {n}" for n in range(20)]
    assert order_of(at_once).index("quiet") == 20


def test_a_wait_that_is_cancelled_takes_no_turn() -> None:
    async def work() -> None:
        turns = SenderTurns()
        first = await turns.take("a")
        waiting = [asyncio.create_task(turns.take("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        first.release()  # the turn is the second one's, which is cancelled just now
        waiting[1].cancel()
        turn = await waiting[2]
        turn.release()
        turn.release()  # idempotent
        assert turns.ask("a").done()
        assert all(task.cancelled() for task in waiting[:2])

    asyncio.run(work())


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(("ask", "end", "give up")))),
)
def test_turns_are_bounded_and_never_lost(n_per_sender: int, steps: list[tuple[str, str]]) -> None:
    async def work() -> None:
        turns = SenderTurns(n_per_sender=n_per_sender)
        asked = {sender: [turns.ask(sender)] for sender in "abc"}
        for sender, step in steps:
            futures = asked[sender]
            if step == "ask" or not futures:
                futures.append(turns.ask(sender))
            elif step == "end" and futures[0].done():
                futures.pop(0).result().release()
            elif step == "give up":
                turns.give_up(futures.pop())
            held = [future for future in futures if future.done()]
            assert held == futures[:n_per_sender]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (b"authorization", b"Bearer  key ", "key"),
        (b"authorization", b"bearer key", "key"),
        (b"authorization", b"Basic key", ""),
        (b"x-api-key", b" key", "key"),
        (b"x-other", b"key", ""),
    ],
)
def test_a_key_is_the_same_however_it_is_shown(name: bytes, value: bytes, expected: str) -> None:
    assert shown_key({"headers": [(name, value)]}) == expected


def test_keys_that_were_never_valid_are_of_one_sender() -> None:
    known = KnownCredentials()
    known.add("key")
    assert known.sender("key") == "key"
    assert known.sender("guess") == known.sender("another") == ""
    for number in range(MAX_KNOWN_CREDENTIALS):
        known.add(str(number))
    assert known.sender("key") == ""
