"""Many calls at the same time, not too many, all ended if one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def for_each(
    items: Iterable[Item], call: Callable[[Item], Awaitable[Result]], *, limit: int
) -> list[Result]:
    """Return the results of a call for each item, in order; the first failure cancels the rest.

    Args:
        items: one argument for each call.
        call: what to do.
        limit: calls at the same time, at most.
    """
    slots = asyncio.Semaphore(limit)

    async def limited(item: Item) -> Result:
        async with slots:
            return await call(item)

    tasks = [asyncio.ensure_future(limited(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
