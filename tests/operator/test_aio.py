import asyncio

import pytest

from faasmoe_operator.aio import gather_limited


def test_keeps_the_order_and_the_limit() -> None:
    running = most = 0

    async def call(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return -item

    assert asyncio.run(gather_limited(range(10), call, limit=3)) == [-item for item in range(10)]
    assert most == 3


def test_cancels_the_rest_when_one_fails() -> None:
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
