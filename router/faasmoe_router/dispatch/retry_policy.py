"""Retry, hedge and load-balancing decisions for the calls of one batch at one layer.

`RetryHedgePolicy` implements `RetryPolicy` for a fan-out: it picks the replica of each call by
power of two choices, retries at replicas not tried yet, and hedges within the retry budget. State
that outlives the layer is in `EndpointHealth` (endpoint_health.py).
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
from faasmoe_router.dispatch.endpoint_health import EndpointHealth
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.transport import (
    Call,
    CallError,
    EndpointStarting,
    LostHedge,
    NoHealthyEndpoint,
)

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0  # minimum time between two log lines about one address


class RetryHedgePolicy:
    """Picks addresses for the calls of one fan-out; the dispatcher's `RetryPolicy`.

    Args:
        entries: the function of each position, with its addresses.
        n_rows: returns the number of rows that a position carries.
        health: health and latency of addresses.
        metrics: the dispatcher's metrics.
        failure_logger: logs failed calls.
        round_robin_index: increases by one with each batch of the layer.

    Attributes:
        errors: the last error of each position that had one.
        n_calls: number of calls made.
        sent_bytes: total size of their frames.
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
        """Return a position's first call, None if it has no usable address."""
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
        """Return after how many seconds to hedge a call, and after how many to abandon it."""
        return self._health.latency_thresholds_s(self._n_rows(position))

    def hedge(self, position: int, call: Call) -> Call | None:
        """Return the same call for another replica, if there is one and the budget allows it."""
        address = self._pick_address(position)
        if address is None or not self._health.retry_budget.try_withdraw():
            return None
        self._metrics.hedges.inc()
        return self._record_attempt(position, call.with_address(address))

    def abandon_in_s(self, position: int, call: Call, elapsed_s: float) -> float:
        """Return 0 to abandon a call that is far too slow, else the seconds until to ask again.

        Beyond the budget only a call is abandoned whose sandbox seems to hang.
        """
        if self._health.retry_budget.try_withdraw():
            return 0.0
        return max(0.0, self._health.hung_after_s(self._n_rows(position)) - elapsed_s)

    def next_attempt(self, position: int, call: Call, error: CallError) -> Call | None:
        """Return the same call for a replica that was not tried yet, if any."""
        if len(self._tried_addresses[position]) >= self._health.settings.max_attempts:
            return None
        address = self._pick_address(position)
        if address is None:
            return None
        self._metrics.retries.inc()
        return self._record_attempt(position, call.with_address(address))

    def on_response(self, position: int, call: Call, elapsed_s: float) -> None:
        """Record a successful call."""
        self._in_flight[call.address] -= 1
        self._health.record_response(
            call.address, n_rows=self._n_rows(position), elapsed_s=elapsed_s
        )

    def on_failure(self, position: int, call: Call, error: CallError) -> None:
        """Record a call that failed or lost against its hedge."""
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
        tried = self._tried_addresses[position]
        excluded = self._health.excluded_addresses(addresses)
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


def pick_address(
    addresses: Sequence[str],
    *,
    excluded: Container[str],
    tried: Container[str] = (),
    in_flight: Mapping[str, int],
    round_robin_index: int,
    random_fraction: float,
) -> str | None:
    """Return an address for a call by power of two choices, None if no candidate is left.

    Of two different candidates, picks the one with fewer calls in flight. That is close to the
    least loaded of all, and routers with equal figures do not all pick the same one.

    Args:
        addresses: all addresses of the function.
        excluded: ejected addresses.
        tried: addresses that this call was already sent to.
        in_flight: calls in flight at each address.
        round_robin_index: increases by one with each batch; spreads calls at equal load.
        random_fraction: a random number in [0, 1).
    """
    candidates = [a for a in addresses if a not in excluded and a not in tried]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    first = round_robin_index % len(candidates)
    second = (first + 1 + int(random_fraction * (len(candidates) - 1))) % len(candidates)
    if in_flight.get(candidates[second], 0) < in_flight.get(candidates[first], 0):
        return candidates[second]
    return candidates[first]


class RateLimitedLogger:
    """Logs an address's first failure immediately, later ones as a count per interval.

    Without a limit, a sandbox that is gone would flood the log.
    """

    def __init__(self) -> None:
        self._last_logged: dict[str, _LogState] = {}

    def log_failure(self, address: str, error: CallError, now_s: float) -> None:
        """Log a failed call, or count it."""
        last_logged = self._last_logged.get(address)
        if last_logged is not None and now_s - last_logged.logged_at_s < LOG_INTERVAL_S:
            last_logged.n_suppressed += 1
            return
        if last_logged is None or not last_logged.n_suppressed:
            logger.warning("Call to %s failed: %s", address, error)
        else:
            logger.warning(
                "%d more calls to %s failed in %.0f s, most recently: %s",
                *(last_logged.n_suppressed + 1, address, now_s - last_logged.logged_at_s, error),
            )
        self._last_logged[address] = _LogState(now_s)

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        for address in self._last_logged.keys() - addresses:
            del self._last_logged[address]


@dataclass(slots=True)
class _LogState:
    logged_at_s: float
    n_suppressed: int = 0
