"""The beat of a control core: once a period while something goes on, and not at all at rest.

Beats keep to a grid, whatever was rested between, so that what is decided at them is the same as if
none had been left out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Pulse:
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
        rests_until: Callable[[float], float | None],
        clock: Callable[[], float],
    ) -> None:
        self._period_s = period_s
        self._rests_until = rests_until
        self._clock = clock
        self._roused = asyncio.Event()

    def rouse(self) -> None:
        """End the rest at the next beat: something has happened."""
        self._roused.set()

    async def run(self, beat: Callable[[], None]) -> None:
        """Call `beat` at each beat."""
        loop = asyncio.get_running_loop()
        # In the middle of the clock's seconds: a beat that is early or late stays in its own.
        till_middle = (0.5 - self._clock()) % 1.0
        due_s = loop.time() + (till_middle - 1.0) * self._period_s
        while True:
            due_s = self._next(due_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            self._roused.clear()
            if await self._rested():
                due_s = self._next(due_s, loop.time())
                await asyncio.sleep(due_s - loop.time())
            beat()

    def _next(self, due_s: float, now_s: float) -> float:
        """Return the next point of the grid; the next but one if that one is past or too near."""
        passed = max(0.0, now_s - due_s)
        return due_s + (math.floor(passed / self._period_s) + 1) * self._period_s

    async def _rested(self) -> bool:
        """Rest if that is allowed; return whether it was."""
        now = self._clock()
        until = self._rests_until(now)
        if until is None or until <= now:
            return False
        left_s = None if math.isinf(until) else (until - now) * self._period_s
        try:
            async with asyncio.timeout(left_s):
                await self._roused.wait()
        except TimeoutError:
            pass
        return True
