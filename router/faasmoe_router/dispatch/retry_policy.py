"""Which replica gets a call: the less busy one of two. Pure.

What is logged of failed calls: a sandbox that is gone would else fill the log by itself.

The calls of one batch at one layer: where each goes, and what else is tried for it.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass

from faasmoe_contracts.routing_table import FunctionEndpoints
from faasmoe_contracts.wire import Buffer
from faasmoe_router.dispatch.calls import (
    Call,
    CallError,
    EndpointStarting,
    LostHedge,
    NoHealthyEndpoint,
)
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import EndpointHealth

logger = logging.getLogger(__name__)


def pick_address(
    addresses: Sequence[str],
    *,
    excluded: Container[str],
    tried: Container[str] = (),
    in_flight: Mapping[str, int],
    round_robin_index: int,
    random_fraction: float,
) -> str | None:
    """Return an address for a call, None if none is left.

    Two that differ are looked at, and the one with fewer calls in flight is taken: close to the
    least busy of all, and routers that see the same figures do not all run to the same one.

    Args:
        addresses: where the function is.
        avoid: addresses that are ejected.
        tried: addresses that this call was made at before.
        busy: calls in flight at each address.
        turn: goes up by one with each batch; spreads calls that find all equally busy.
        chance: a random number, 0 or more and less than 1.
    """
    candidates = [a for a in addresses if a not in excluded and a not in tried]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    first = round_robin_index % len(candidates)
    second = (first + 1 + int(random_fraction * (len(candidates) - 1))) % len(candidates)
    if in_flight.get(candidates[second], 0) < in_flight.get(candidates[first], 0):
        return candidates[second]
    return candidates[first]


LOG_INTERVAL_S = 10.0  # at most one line for each address in this time


@dataclass(slots=True)
class _LogState:
    """When an address was last told of, and the failures since."""

    logged_at_s: float
    n_suppressed: int = 0


class RateLimitedLogger:
    """Logs an address's first failure, and how many there were since every now and then."""

    def __init__(self) -> None:
        self._last_logged: dict[str, _LogState] = {}

    def log_failure(self, address: str, error: CallError, now_s: float) -> None:
        """Log a failed call, or count it."""
        last_logged = self._last_logged.get(address)
        if last_logged is not None and now_s - last_logged.logged_at_s < LOG_INTERVAL_S:
            last_logged.n_suppressed += 1
            return
        if last_logged is None or not last_logged.n_suppressed:
            logger.warning("a call to %s failed: %s", address, error)
        else:
            logger.warning(
                "%d more calls to %s failed in %.0f s, the last: %s",
                *(last_logged.n_suppressed + 1, address, now_s - last_logged.logged_at_s, error),
            )
        self._last_logged[address] = _LogState(now_s)

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        for address in self._last_logged.keys() - addresses:
            del self._last_logged[address]


class RetryHedgePolicy:
    """Chooses addresses; the `Course` of one round.

    Args:
        entries: the function of each position, with its addresses.
        n_rows: rows that each position carries.
        book: what is known of addresses.
        metrics: counters.
        log: where failures are told.
        turn: goes up by one with each batch of the layer.

    Attributes:
        errors: what each failed position failed with last.
        n_calls: calls made.
        sent_bytes: bytes of their frames.
    """

    def __init__(
        self,
        entries: Mapping[int, FunctionEndpoints],
        n_rows: Callable[[int], int],
        *,
        health: EndpointHealth,
        metrics: DispatchMetrics,
        failure_logger: RateLimitedLogger,
        round_robin_index: int,
    ) -> None:
        self.errors: dict[int, CallError] = {}
        self.n_calls = 0
        self.sent_bytes = 0
        self._entries = entries
        self._n_rows = n_rows
        self._health = health
        self._metrics = metrics
        self._failure_logger = failure_logger
        self._round_robin_index = round_robin_index
        self._in_flight: Counter[str] = Counter()
        self._tried_addresses: defaultdict[int, list[str]] = defaultdict(list)

    def first_attempt(
        self, position: int, encode_frame: Callable[[int], Sequence[Buffer]]
    ) -> Call | None:
        """Return a position's first call, None if there is no address to make it at."""
        entry = self._entries[position]
        address = self._pick_address(position)
        if address is None:
            if entry.addresses:
                self.errors[position] = NoHealthyEndpoint(
                    f"{entry.spec.id}: every address is ejected"
                )
            return None
        return self._record_attempt(position, Call(address, entry.spec.id, encode_frame(position)))

    def latency_thresholds_s(self, position: int, call: Call) -> tuple[float, float]:
        """Return after how many seconds a call is hedged, and after how many it is too slow."""
        return self._health.latency_thresholds_s(self._n_rows(position))

    def hedge(self, position: int, call: Call) -> Call | None:
        """Return the same call for another replica, if there is one and the bound allows it."""
        address = self._pick_address(position)
        if address is None or not self._health.retry_budget.try_withdraw():
            return None
        self._metrics.hedges.inc()
        return self._record_attempt(position, call.with_address(address))

    def should_abandon(self, position: int, call: Call) -> bool:
        """Return whether to give up a call that takes many times as long as others."""
        return self._health.retry_budget.try_withdraw()

    def next_attempt(self, position: int, call: Call, error: CallError) -> Call | None:
        """Return the same call for a replica that was not tried yet."""
        if len(self._tried_addresses[position]) >= self._health.settings.max_attempts:
            return None
        address = self._pick_address(position)
        if address is None:
            return None
        self._metrics.retries.inc()
        return self._record_attempt(position, call.with_address(address))

    def on_response(self, position: int, call: Call, elapsed_s: float) -> None:
        """Take note of a good answer."""
        self._in_flight[call.address] -= 1
        self._health.record_response(
            call.address, n_rows=self._n_rows(position), elapsed_s=elapsed_s
        )

    def on_failure(self, position: int, call: Call, error: CallError) -> None:
        """Take note of a call that failed, or that was overtaken."""
        now_s = time.monotonic()
        self._in_flight[call.address] -= 1
        classified_error = self._health.record_failure(call.address, error, now_s)
        if isinstance(classified_error, LostHedge):
            return
        self._metrics.failed_calls.inc()
        self.errors[position] = classified_error
        if not isinstance(classified_error, EndpointStarting):
            self._failure_logger.log_failure(call.address, classified_error, now_s)

    def _pick_address(self, position: int) -> str | None:
        addresses = self._entries[position].addresses
        tried, excluded = (
            self._tried_addresses[position],
            self._health.excluded_addresses(addresses),
        )
        if len(addresses) == 1:
            only_address = addresses[0]
            return None if only_address in tried or only_address in excluded else only_address
        return pick_address(
            addresses,
            excluded=excluded,
            tried=tried,
            in_flight=self._in_flight,
            round_robin_index=self._round_robin_index,
            random_fraction=random.random(),
        )

    def _record_attempt(self, position: int, call: Call) -> Call:
        self._tried_addresses[position].append(call.address)
        self._in_flight[call.address] += 1
        self.n_calls += 1
        self.sent_bytes += call.size_bytes
        return call
