"""Supervises the batcher: starts it, replaces it after a crash and gives up within a budget."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from faasmoe_transformers.continuous_batching import ContinuousBatcher

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
RESTART_LIMIT = 3
RESTART_WINDOW_S = 300.0


class RestartBudget:
    """Allows `limit` restarts within any `window_s` seconds; times are passed in."""

    def __init__(self, *, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._restarted_s: deque[float] = deque()

    def try_acquire(self, now_s: float) -> bool:
        """Use one restart at monotonic time `now_s`; return whether it is allowed."""
        while self._restarted_s and self._restarted_s[0] <= now_s - self._window_s:
            self._restarted_s.popleft()
        if len(self._restarted_s) >= self._limit:
            return False
        self._restarted_s.append(now_s)
        return True


class BatcherSupervisor:
    """Keeps one batcher running. Used on the event loop only.

    Args:
        make_batcher: creates and starts a batcher; called on a thread, with the event loop that
            receives its outputs.
        on_give_up: called when no further batcher will be started.

    Attributes:
        batcher: the current batcher; None before the first one and during a replacement.
        is_stuck: whether a thread did not end in time and was abandoned.
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
        """Start a batcher; raises what `make_batcher` raises."""
        loop = asyncio.get_running_loop()
        make_task = asyncio.create_task(asyncio.to_thread(self._make_batcher, loop))
        try:
            await asyncio.shield(make_task)
        finally:  # also when cancelled: a batcher that is not recorded here would never be stopped
            self.batcher = await make_task

    async def stop(self) -> None:
        """Stop the batcher, if there is one."""
        if self.batcher is None:
            return
        stopping = [self.batcher]
        self.batcher = None

        def stop() -> bool:
            # Drop the reference here: an executor thread may keep its last call alive for long, and
            # the next batcher needs the memory of this one's cache.
            return stopping.pop().stop(STOP_TIMEOUT_S)

        self.is_stuck = not await asyncio.to_thread(stop)
        if self.is_stuck:
            logger.error("The engine's thread did not end in %.0f s", STOP_TIMEOUT_S)

    async def restart(self, fatal_reason: str) -> bool:
        """Start a new batcher unless that is futile or over budget; return whether one runs.

        Args:
            fatal_reason: why a new batcher would fail too; empty if it may succeed.
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
            logger.exception("The engine could not be restarted; it gives up")
            self._on_give_up()
            return False
        logger.warning("The engine was restarted")
        return True
