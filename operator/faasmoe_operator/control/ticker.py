"""The beat of a control core: once a period while something goes on, and not at all at rest.

Beats keep to a grid, whatever was rested between, so that what is decided at them is the same as if
none had been left out.

When a control core may rest: nothing is under way, and no decision would change anything. Pure.

A model that nobody calls costs nothing then: no decisions, no plans. Whatever happens to it (a
wake, load, a sandbox that changes, the end of an action) rouses its core.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from faasmoe_operator.control.autoscalers import FunctionAutoscalers
from faasmoe_operator.control.executor import ActionExecutor
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.function_stats import FunctionStats
from faasmoe_operator.control.load_reports import LoadReports


class Ticker:
    """Beats until cancelled.

    Args:
        period_s: between two beats.
        rests_until: asked when a beat is due: until when it may be left out, on the clock; None if
            it may not. Infinity is for as long as nobody calls `rouse`.
        clock: the time. A period takes one second of it.
    """

    def __init__(
        self,
        period_s: float,
        *,
        idle_until: Callable[[float], float | None],
        clock: Callable[[], float],
    ) -> None:
        self._period_s = period_s
        self._idle_until = idle_until
        self._clock = clock
        self._notified = asyncio.Event()

    def notify(self) -> None:
        """End the rest at the next beat: something has happened."""
        self._notified.set()

    async def run(self, on_tick: Callable[[], None]) -> None:
        """Call `beat` at each beat."""
        loop = asyncio.get_running_loop()
        # In the middle of the clock's seconds: a beat that is early or late stays in its own.
        to_middle_s = (0.5 - self._clock()) % 1.0
        due_s = loop.time() + (to_middle_s - 1.0) * self._period_s
        while True:
            due_s = self._next_due_s(due_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            self._notified.clear()
            if await self._wait_while_idle():
                due_s = self._next_due_s(due_s, loop.time())
                await asyncio.sleep(due_s - loop.time())
            on_tick()

    def _next_due_s(self, due_s: float, now_s: float) -> float:
        """Return the next point of the grid; the next but one if that one is past or too near."""
        elapsed_s = max(0.0, now_s - due_s)
        return due_s + (math.floor(elapsed_s / self._period_s) + 1) * self._period_s

    async def _wait_while_idle(self) -> bool:
        """Rest if that is allowed; return whether it was."""
        now = self._clock()
        until = self._idle_until(now)
        if until is None or until <= now:
            return False
        left_s = None if math.isinf(until) else (until - now) * self._period_s
        try:
            async with asyncio.timeout(left_s):
                await self._notified.wait()
        except TimeoutError:
            pass
        return True


def idle_until(
    now: float,
    *,
    fleet: Fleet,
    autoscalers: FunctionAutoscalers,
    load_reports: LoadReports,
    function_stats: FunctionStats,
    executor: ActionExecutor,
    start_deadline_s: float,
) -> float | None:
    """Return until when nothing is to be done unless something happens; None if something is.

    Args:
        now: the time.
        fleet: the sandboxes.
        scalers: the autoscalers.
        reports: what routers said.
        records: wakes that wait.
        actuator: actions under way.
        start_deadline_s: how long a sandbox may take to become ready.
    """
    if fleet.is_progressing or function_stats.activating() or load_reports.has_load(now):
        return None
    if not autoscalers.is_idle(fleet.ready_replicas(), now=now):
        return None
    return min(fleet.oldest_starting_at() + start_deadline_s, executor.create_allowed_at(now))
