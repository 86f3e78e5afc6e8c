"""Has a batcher run: starts one, another in its place when it has died, and gives up in time."""

import asyncio
import logging
import time
from collections.abc import Callable

from faasmoe_router.engine.batching import Batcher
from faasmoe_router.engine.restarts import RestartBudget

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
RESTART_LIMIT = 3
RESTART_WINDOW_S = 300.0


class BatcherKeeper:
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
        make: Callable[[asyncio.AbstractEventLoop], Batcher],
        *,
        on_give_up: Callable[[], None],
    ) -> None:
        self.batcher: Batcher | None = None
        self.stuck = False
        self._make = make
        self._on_give_up = on_give_up
        self._restarts = RestartBudget(limit=RESTART_LIMIT, window_s=RESTART_WINDOW_S)

    async def start(self) -> None:
        """Make a batcher; raises what making it raises."""
        loop = asyncio.get_running_loop()
        making = asyncio.create_task(asyncio.to_thread(self._make, loop))
        try:
            await asyncio.shield(making)
        finally:  # if we are stopped meanwhile, too: a thread that nobody knows would never end
            self.batcher = await making

    async def stop(self) -> None:
        """End the batcher, if there is one."""
        if self.batcher is None:
            return
        ending = [self.batcher]
        self.batcher = None

        def stop() -> bool:
            # Let go of with the call: a pool's thread may keep what it ran until much later, and
            # the next batcher's cache needs the memory of this one's.
            return ending.pop().stop(STOP_TIMEOUT_S)

        self.stuck = not await asyncio.to_thread(stop)
        if self.stuck:
            logger.error("The engine's thread did not end in %.0f s", STOP_TIMEOUT_S)

    async def restart(self, why_final: str) -> bool:
        """Start again if that may help and the budget allows; return whether a batcher runs.

        Args:
            why_final: why it would not help; empty if it may.
        """
        if why_final:
            logger.critical("The engine gives up: %s", why_final)
            self._on_give_up()
            return False
        if not self._restarts.take(time.monotonic()):
            logger.critical(
                "The engine died more than %d times in %.0f s; it gives up",
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
