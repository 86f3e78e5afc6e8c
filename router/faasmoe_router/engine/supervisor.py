"""How often the engine may be started again before the process had better end.

Has a batcher run: starts one, another in its place when it has died, and gives up in time.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from faasmoe_router.transformers_backend.continuous_batching import ContinuousBatcher

logger = logging.getLogger(__name__)


class RestartBudget:
    """Allows `limit` restarts in any `window_s` seconds; the time is passed in."""

    def __init__(self, *, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._restarted_s: deque[float] = deque()

    def try_acquire(self, now_s: float) -> bool:
        """Use one restart; return whether it was allowed."""
        while self._restarted_s and self._restarted_s[0] <= now_s - self._window_s:
            self._restarted_s.popleft()
        if len(self._restarted_s) >= self._limit:
            return False
        self._restarted_s.append(now_s)
        return True


STOP_TIMEOUT_S = 30.0
RESTART_LIMIT = 3
RESTART_WINDOW_S = 300.0


class BatcherSupervisor:
    """Keeps one batcher; belongs to the event loop.

    Args:
        make: makes a batcher and starts it; is called in a thread, with the event loop that gets
            its outputs.
        on_give_up: is called when no other batcher will be made.

    Attributes:
        batcher: the one that was made last; None before the first and between two.
        stuck: whether a thread was left behind because it did not end in time.
    """

    def __init__(
        self,
        make_batcher: Callable[[asyncio.AbstractEventLoop], ContinuousBatcher],
        *,
        on_give_up: Callable[[], None],
    ) -> None:
        self.batcher: ContinuousBatcher | None = None
        self.is_stuck = False
        self._make_batcher = make_batcher
        self._on_give_up = on_give_up
        self._restart_budget = RestartBudget(limit=RESTART_LIMIT, window_s=RESTART_WINDOW_S)

    async def start(self) -> None:
        """Make a batcher; raises what making it raises."""
        loop = asyncio.get_running_loop()
        make_task = asyncio.create_task(asyncio.to_thread(self._make_batcher, loop))
        try:
            await asyncio.shield(make_task)
        finally:  # if we are stopped meanwhile, too: a thread that nobody knows would never end
            self.batcher = await make_task

    async def stop(self) -> None:
        """End the batcher, if there is one."""
        if self.batcher is None:
            return
        stopping = [self.batcher]
        self.batcher = None

        def stop() -> bool:
            # Let go of with the call: a pool's thread may keep what it ran until much later, and
            # the next batcher's cache needs the memory of this one's.
            return stopping.pop().stop(STOP_TIMEOUT_S)

        self.is_stuck = not await asyncio.to_thread(stop)
        if self.is_stuck:
            logger.error("The engine's thread did not end in %.0f s", STOP_TIMEOUT_S)

    async def restart(self, fatal_reason: str) -> bool:
        """Start again if that may help and the budget allows; return whether a batcher runs.

        Args:
            why_final: why it would not help; empty if it may.
        """
        if fatal_reason:
            logger.critical("The engine gives up: %s", fatal_reason)
            self._on_give_up()
            return False
        if not self._restart_budget.try_acquire(time.monotonic()):
            logger.critical(
                "The engine crashed more than %d times in %.0f s; it gives up",
                *(RESTART_LIMIT, RESTART_WINDOW_S),
            )
            self._on_give_up()
            return False
        try:
            await self.start()
        except Exception:
            logger.exception("The engine could not be started again; it gives up")
            self._on_give_up()
            return False
        logger.warning("The engine was started again")
        return True
