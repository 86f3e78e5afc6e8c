"""Local fallback: the router computes functions that no sandbox can provide.

A function that no sandbox can attach, because its bytes are corrupted on the node with capacity,
must not make the whole model unavailable. When a request has waited for it until the activation
timeout, the router verifies the function's bytes in its own view of the store, admits the request
and computes the function itself. Later requests do not wait for that function until it has an
address. The fallback covers only a fraction of the functions, for which the router's cores and
memory suffice; a model that failed to start is not computed here.
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

MAX_FALLBACK_FRACTION = 1 / 8
"""Largest fraction of functions to compute locally; their weights stay in the page cache."""
CHECK_TIMEOUT_S = 30.0  # on top of the activation timeout, to read each function's bytes once


def is_fallback_allowed(n_missing: int, n_functions: int) -> bool:
    """Return whether the router may compute `n_missing` of `n_functions` functions."""
    return n_missing < n_functions and n_missing <= max(1, int(MAX_FALLBACK_FRACTION * n_functions))


class LocalFallback:
    """The functions that the router computes itself. Used on the event loop only.

    Args:
        routing: returns the current routing.
        check: reads functions' bytes and raises StoreCorrupted or StoreUnreadable if they cannot be
            computed; called in a thread.
        metrics: metrics of the link.

    Attributes:
        activated_below_tokens: requests of fewer tokens than this need no function that is missing
            and not covered by the fallback.
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
        """Return the missing, uncovered functions that `n_tokens` tokens need."""
        missing = self._routing().missing_for(n_tokens)
        return [name for name in missing if name not in self._active]

    def on_table_changed(self) -> None:
        """Stop computing functions that have an address, or all if the model is scaled to zero."""
        routing = self._routing()
        is_scaled_to_zero = len(routing.missing) == len(routing.entries)
        self._set_active(
            frozenset() if is_scaled_to_zero else self._active.intersection(routing.missing)
        )

    async def enable_for(self, n_tokens: int) -> bool:
        """Cover the missing functions that `n_tokens` tokens need; return whether that is possible.

        Raises:
            StoreCorrupted: a function is corrupted in this router's store too.
        """
        routing = self._routing()
        missing = frozenset(self.missing_for(n_tokens))
        if not is_fallback_allowed(len(self._active | missing), len(routing.entries)):
            return False
        if missing and not await self._is_computable(missing, routing):
            return False
        self._set_active(self._active | missing)
        self.on_table_changed()  # it may have changed during the check
        if n_tokens >= self.activated_below_tokens:
            return False
        if self._routing().missing_for(n_tokens):
            self._metrics.local_fallback_admissions.inc()
        return True

    async def _is_computable(self, names: frozenset[str], routing: RoutingIndex) -> bool:
        """Return whether these functions can be computed; concurrent callers share one check."""
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
            logger.error("Requests are rejected: %s", error)
            raise StoreCorrupted(
                "a part of the model that this request needs is corrupted "
                "in every copy that was tried"
            ) from error
        except (StoreUnreadable, TimeoutError) as error:
            logger.error("Local fallback is impossible for %d functions: %s", len(names), error)
            return False
        return True

    def _remove_check(self, names: frozenset[str], task: asyncio.Task[None]) -> None:
        del self._checks[names]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: its callers may have been cancelled

    def _set_active(self, names: frozenset[str]) -> None:
        if names - self._active:
            logger.warning("Local fallback is active for %d functions", len(names))
        self._active = names
        self._metrics.local_fallback_functions.set(len(names))
        routing = self._routing()
        thresholds = [
            routing.activation_thresholds[name] for name in routing.missing if name not in names
        ]
        self.activated_below_tokens = min(thresholds, default=math.inf)
