"""Keeps something of a model's pods up to date with its controller, with a short delay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from faasmoe_contracts.backoff import Backoff
from faasmoe_operator.control.controller import Controller

COALESCE_S = 0.5
RETRY_DELAYS_S = (1.0, 5.0, 15.0, 60.0)
MAX_PARALLEL_PATCHES = 4


async def follow_controller(
    controller: Controller, update: Callable[[], Awaitable[bool]], *, coalesce_s: float = COALESCE_S
) -> None:
    """Call `update` after changes of a controller until cancelled; failures are retried later.

    Args:
        controller: the controller.
        update: writes what has changed; returns whether all of it was written.
        coalesce_s: delay that merges changes into one call, in seconds.
    """
    backoff = Backoff(RETRY_DELAYS_S)
    while True:
        revision = controller.revision
        if await update():
            backoff.reset()
            await controller.wait_for_change(revision)
        else:
            await asyncio.sleep(backoff.next_delay_s())
        await asyncio.sleep(coalesce_s)
