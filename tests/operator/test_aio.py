import asyncio

import pytest

from faasmoe_operator.aio import ChangeNotifier, LineReader, gather_limited


def test_gather_limited_keeps_the_order_and_the_limit() -> None:
    running = max_running = 0

    async def call(item: int) -> int:
        nonlocal running, max_running
        running += 1
        max_running = max(max_running, running)
        await asyncio.sleep(0)
        running -= 1
        return -item

    assert asyncio.run(gather_limited(range(10), call, limit=3)) == [-item for item in range(10)]
    assert max_running == 3


def test_gather_limited_cancels_the_rest_when_one_fails() -> None:
    cancelled = []

    async def call(item: int) -> None:
        if item == 1:
            raise ValueError("one")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(ValueError, match="one"):
        asyncio.run(gather_limited([0, 1], call, limit=2))
    assert cancelled == [0]


def test_change_notifier_evaluates_the_condition_at_each_notification() -> None:
    async def scenario() -> None:
        notifier, changes = ChangeNotifier(), list[int]()
        waiting = asyncio.create_task(notifier.wait_for(lambda: len(changes) == 2))
        for change in range(2):
            await asyncio.sleep(0)
            assert not waiting.done()
            changes.append(change)
            notifier.notify()
        await waiting

    asyncio.run(scenario())


def test_lines_are_bounded_until_their_sender_is_known() -> None:
    async def scenario() -> None:
        stream = asyncio.StreamReader(limit=64)
        reader = LineReader(stream, max_bytes=64)
        stream.feed_data(b"hello\n\n" + b"x" * 100_000)
        assert [await reader.readline(), await reader.readline()] == [b"hello\n", b"\n"]
        with pytest.raises(ValueError, match="64"):
            await reader.readline()
        reader.max_bytes = 1 << 20
        stream.feed_data(b"y\nrest")
        stream.feed_eof()
        assert await reader.readline() == b"x" * 100_000 + b"y\n"
        assert [await reader.readline(), await reader.readline()] == [b"rest", b""]

    asyncio.run(scenario())
