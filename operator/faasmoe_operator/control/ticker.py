"""The control loop's ticker, which pauses while the model is idle.

A model is idle while no action is in progress and no autoscaler decision would change anything. It
then costs nothing: no decisions and no plans. Load, an activation request, a changed sandbox or the
end of an action resumes the ticks. They stay on a fixed grid, whatever the pauses, so the decisions
are the same as with all ticks.
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
    """Calls a function once a period, except while idle.

    Args:
        period_s: real seconds between two ticks.
        idle_until: called with the current time when a tick is due. Returns the time until which
            ticks may be skipped, infinity to skip them until `notify`, or None to tick.
        clock: current time in seconds; one period is one second of this clock.
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
        """Resume the ticks."""
        self._notified.set()

    async def run(self, on_tick: Callable[[], None]) -> None:
        """Call `on_tick` at each tick until cancelled."""
        loop = asyncio.get_running_loop()
        # In the middle of the clock's seconds, so that jitter does not move a tick to another one.
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
        """Return the first point of the grid after `due_s` that is later than `now_s`."""
        elapsed_s = max(0.0, now_s - due_s)
        return due_s + (math.floor(elapsed_s / self._period_s) + 1) * self._period_s

    async def _wait_while_idle(self) -> bool:
        """Wait until the idle time ends or `notify` is called; return False if not idle."""
        now = self._clock()
        until = self._idle_until(now)
        if until is None or until <= now:
            return False
        timeout_s = None if math.isinf(until) else (until - now) * self._period_s
        try:
            async with asyncio.timeout(timeout_s):
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
    """Return until when the model stays idle unless something happens; None if it is not idle.

    Args:
        now: current time on the controller's clock.
        fleet: sandboxes and assignments in progress.
        autoscalers: the functions' autoscalers.
        load_reports: the routers' load.
        function_stats: activations in progress.
        executor: back-off of sandbox creation.
        start_deadline_s: how long a sandbox may take to become ready.
    """
    if fleet.is_progressing or function_stats.activating() or load_reports.has_load(now):
        return None
    if not autoscalers.is_idle(fleet.ready_replicas(), now=now):
        return None
    return min(fleet.oldest_starting_at() + start_deadline_s, executor.create_allowed_at(now))
