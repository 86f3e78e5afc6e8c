"""Functions that cannot be had anywhere, and that the router stands in for.

A block that no sandbox can attach (its bytes are wrong on the node that has room) must not make the
whole model unavailable: whoever has waited for it as long as a request may wait is let in, and the
router computes that block from the store, if its own view of the store proves right. Those who come
later do not wait for it again, until it is there.

That is for a part of a model that else works. A model of which little could be started is not
computed here: the router's cores and memory are not sized for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)

MAX_FALLBACK_FRACTION = (
    1 / 8
)  # of the functions; their weights are read from the page cache, not copied
CHECK_TIMEOUT_S = 30.0  # on top of the time that a request is held: a block's bytes are read once


def is_fallback_allowed(n_missing: int, n_functions: int) -> bool:
    """Return whether so many missing functions are a part that the router can stand in for."""
    return n_missing < n_functions and n_missing <= max(1, int(MAX_FALLBACK_FRACTION * n_functions))


class LocalFallback:
    """Which functions the router stands in for. Belongs to the event loop.

    Args:
        routing: tells where each function is.
        check: reads functions' bytes here and raises StoreCorrupted or StoreUnreadable if they
            cannot be computed; called in a thread.
        metrics: counters.

    Attributes:
        complete_below: requests of fewer tokens than this need no function that is missing and
            that nobody stands in for.
    """

    def __init__(
        self,
        routing: Callable[[], RoutingIndex],
        *,
        check: Callable[[Sequence[FunctionSpec]], None],
        metrics: ControlLinkMetrics,
    ) -> None:
        self.activated_below_tokens = 0.0
        self._routing = routing
        self._check = check
        self._metrics = metrics
        self._active: frozenset[str] = frozenset()
        self._checks: dict[frozenset[str], asyncio.Task[None]] = {}

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions that so many tokens need, that are missing and not stood in for."""
        missing = self._routing().missing_for(n_tokens)
        return [name for name in missing if name not in self._active]

    def on_table_changed(self) -> None:
        """Leave off for the functions that are there, and for all when the model is at rest."""
        routing = self._routing()
        is_scaled_to_zero = len(routing.missing) == len(routing.entries)
        self._set_active(
            frozenset() if is_scaled_to_zero else self._active.intersection(routing.missing)
        )

    async def enable_for(self, n_tokens: int) -> bool:
        """Stand in for what so many tokens lack; return whether that can be done.

        Raises:
            StoreCorrupted: bytes that are needed are wrong here too.
        """
        routing = self._routing()
        missing = frozenset(self.missing_for(n_tokens))
        if not is_fallback_allowed(len(self._active | missing), len(routing.entries)):
            return False
        if missing and not await self._is_computable(missing, routing):
            return False
        self._set_active(self._active | missing)
        self.on_table_changed()  # as it may have while the bytes were read
        if n_tokens >= self.activated_below_tokens:
            return False
        if self._routing().missing_for(n_tokens):
            self._metrics.local_fallback_admissions.inc()
        return True

    async def _is_computable(self, names: frozenset[str], routing: RoutingIndex) -> bool:
        """Return whether these functions can be computed here; however many ask, read once."""
        task = self._checks.get(names)
        if task is None:
            specs = [routing.entries[name].spec for name in sorted(names)]
            task = asyncio.create_task(asyncio.to_thread(self._check, specs))
            self._checks[names] = task
            task.add_done_callback(lambda done: self._remove_check(names, done))
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await asyncio.shield(task)
        except StoreCorrupted as error:
            logger.error("Requests are refused: %s", error)
            raise StoreCorrupted(
                "a part of the model that this request needs is corrupted in every copy that was tried"
            ) from error
        except (StoreUnreadable, TimeoutError) as error:
            logger.error("Local fallback is impossible for %d functions: %s", len(names), error)
            return False
        return True

    def _remove_check(self, names: frozenset[str], task: asyncio.Task[None]) -> None:
        del self._checks[names]
        if not task.cancelled():
            task.exception()  # whoever asked may not wait for it any more

    def _set_active(self, names: frozenset[str]) -> None:
        if names - self._active:
            logger.warning("Local fallback is active for %d functions", len(names))
        self._active = names
        self._metrics.local_fallback_functions.set(len(names))
        routing = self._routing()
        needs = [
            routing.activation_thresholds[name] for name in routing.missing if name not in names
        ]
        self.activated_below_tokens = min(needs, default=math.inf)
