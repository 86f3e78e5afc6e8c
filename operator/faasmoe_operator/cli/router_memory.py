"""Asks the control process which routers may run within the machine's memory limit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Iterable
from typing import Any, Never

from faasmoe_contracts.router_demand import RouterReport, dump_router_reports
from faasmoe_operator.cli.router_scaling import MachineRouters, ScaledRouters
from faasmoe_operator.control.models_file import ROUTERS_PATH

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
WAITING_INTERVAL_S = 0.05  # while a router waits for memory
MEASURE_INTERVAL_S = 5.0  # reports may follow each other much faster
REQUEST_TIMEOUT_S = 5.0


async def limit_routers(routers: Collection[ScaledRouters], url: str, token: str) -> Never:
    """Report all routers and apply the answers until cancelled.

    While the control process is away, routers that run go on, and no other one starts.

    Args:
        routers: the routers of all models.
        url: base URL of the control API.
        token: its bearer token.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:
        while True:
            machine = MachineRouters(slot for group in routers for slot in group.slots)
            await _measure_one(routers, machine)
            states = [group.state for group in routers]
            reports = [report for group in routers for report in group.reports(machine)]
            may_run = frozenset[str]()
            try:
                body = dump_router_reports(reports)
                async with http.post(f"{url}{ROUTERS_PATH}", json=body) as response:
                    response.raise_for_status()
                    may_run = frozenset((await response.json())["may_run"])
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.debug("the control process is away: %s", error)
            else:
                for group in routers:
                    group.allow(may_run)
            changes = [g.wait_for_change(s) for g, s in zip(routers, states, strict=True)]
            await _first_within(_interval_s(reports, may_run), changes)


async def _measure_one(routers: Collection[ScaledRouters], machine: MachineRouters) -> None:
    """Measure the router that was not for the longest time, if that is due.

    One at a time: all of them would keep the launcher from what starts for half a second.
    """
    due_s = time.monotonic() - MEASURE_INTERVAL_S
    slots = (slot for group in routers for slot in group.slots)
    due = [s for s in slots if s.is_ready and (not s.is_measured or s.measured_s <= due_s)]
    if due:
        slot = min(due, key=lambda slot: slot.measured_s)
        await slot.measure(n_sharing=machine.n_sharing(slot))


def _interval_s(reports: Collection[RouterReport], may_run: frozenset[str]) -> float | None:
    """Return after how long to report again if nothing changes; None for never."""
    if any(r.is_wanted and not r.is_running and r.name not in may_run for r in reports):
        return WAITING_INTERVAL_S
    return INTERVAL_S if any(r.is_wanted or r.is_running for r in reports) else None


async def _first_within(
    timeout_s: float | None, changes: Iterable[Coroutine[Any, Any, None]]
) -> None:
    """Wait for the first change, or until the time is over."""
    waiters = [asyncio.create_task(change) for change in changes]
    try:
        await asyncio.wait(waiters, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
