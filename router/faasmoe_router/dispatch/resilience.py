"""How many calls may be made that are more than one for each part. Pure.

Without a bound a machine that is slow as a whole would be made slower by its own hedges.

How long calls take: the quantile that hedging waits for. Pure.

Kept apart by size, because a prompt's frame takes a hundred times as long as one token's. Of each
size the last answers are kept, and the quantile is looked up anew every now and then: a call costs
the hot path one append.

What dispatch remembers of addresses from one layer to the next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Set
from dataclasses import dataclass, field

from faasmoe_router.dispatch.calls import (
    CallError,
    CallTimeout,
    ConnectError,
    EndpointStarting,
    LostHedge,
    StatusError,
)
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.outlier_detection import (
    Fault,
    HealthChecker,
    OutlierDetectionSettings,
    OutlierDetector,
)


class RetryBudget:
    """Allows a share of the calls on top, and a few at once.

    Args:
        share: extra calls for each call, 0 to 1.
        burst: extra calls that may come together.
    """

    def __init__(self, *, ratio: float = 0.05, burst: float = 8.0) -> None:
        self._ratio = ratio
        self._burst = burst
        self._balance = burst

    def deposit(self, n_calls: int) -> None:
        """Count calls that are made anyway."""
        self._balance = min(self._burst, self._balance + n_calls * self._ratio)

    def try_withdraw(self) -> bool:
        """Use one extra call; return whether it is allowed."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


WINDOW_SIZE = 256  # answers of one size
MIN_SAMPLES = 20  # answers of one size before its quantile is known
SAMPLES_PER_REFRESH = 32  # answers after which the quantile is looked up anew


class _LatencyWindow:
    """The last answers to calls of one size."""

    __slots__ = ("n_since", "quantile_s", "times_s")

    def __init__(self) -> None:
        self.times_s: deque[float] = deque(maxlen=WINDOW_SIZE)
        self.n_since = 0
        self.quantile_s = math.inf


class LatencyTracker:
    """The observed quantile of calls' times, by the rows that they carry.

    Args:
        quantile: which one, between 0 and 1.
    """

    def __init__(self, quantile: float = 0.95) -> None:
        self._quantile = quantile
        self._windows: dict[int, _LatencyWindow] = {}

    def record(self, n_rows: int, elapsed_s: float) -> None:
        """Take the time that one call took until its answer was whole."""
        size_class = n_rows.bit_length()
        window = self._windows.get(size_class)
        if window is None:
            window = self._windows[size_class] = _LatencyWindow()
        window.times_s.append(elapsed_s)
        window.n_since += 1
        if window.n_since >= SAMPLES_PER_REFRESH or len(window.times_s) == MIN_SAMPLES:
            window.n_since = 0
            window.quantile_s = self._compute_quantile_s(window.times_s)

    def quantile_s(self, n_rows: int) -> float:
        """Return the quantile for calls of this size; infinity while too little is known."""
        window = self._windows.get(n_rows.bit_length())
        return math.inf if window is None else window.quantile_s

    def _compute_quantile_s(self, times_s: deque[float]) -> float:
        return sorted(times_s)[min(len(times_s) - 1, math.ceil(self._quantile * len(times_s)) - 1)]


OVERLOADED_STATUSES = (429, 503)  # the sandbox has too much to do, or ends: work goes elsewhere
NOT_ATTACHED_STATUS = 404  # the function was detached; the table will say so


@dataclass(frozen=True, slots=True)
class ResilienceSettings:
    """How calls that fail or take long are dealt with.

    Attributes:
        max_attempts: addresses tried for one call, one after the other.
        hedge_quantile: a call is made a second time, at another replica, when it has taken longer
            than this share of the calls of its size.
        hedge_min_s: but not before.
        retry_budget_ratio: hedges, and calls given up for slowness, for each call, at most.
        retry_budget_burst: how many of those may come together.
        abandon_factor: a call is given up when it has taken so many times the quantile.
        abandon_min_s: but not before.
        abandon_default_s: the same while too few calls of its size were seen.
        outlier_detection: when addresses get no calls.
    """

    max_attempts: int = 3
    hedge_quantile: float = 0.95
    hedge_min_s: float = 0.005
    retry_budget_ratio: float = 0.05
    retry_budget_burst: float = 8.0
    abandon_factor: float = 20.0
    abandon_min_s: float = 0.25
    abandon_default_s: float = 2.0
    outlier_detection: OutlierDetectionSettings = field(default_factory=OutlierDetectionSettings)


class EndpointHealth:
    """What is known of addresses. Belongs to the engine's thread.

    Args:
        settings: how faults are dealt with.
        metrics: counters.
        may_start: whether an address that nobody has reached yet may be one that starts.
    """

    def __init__(
        self,
        settings: ResilienceSettings,
        metrics: DispatchMetrics,
        *,
        may_be_starting: bool = True,
    ) -> None:
        self.settings = settings
        self.reachable: set[str] = set()
        """Addresses that have accepted a connection."""
        self.retry_budget = RetryBudget(
            ratio=settings.retry_budget_ratio, burst=settings.retry_budget_burst
        )
        self._latency = LatencyTracker(settings.hedge_quantile)
        self._outlier_detector = OutlierDetector(settings.outlier_detection)
        self._health_checker = HealthChecker()
        self._metrics = metrics
        self._may_be_starting = may_be_starting

    def excluded_addresses(self, addresses: Collection[str]) -> Set[str]:
        """Return which of a function's addresses get no calls now.

        Where all of them are ejected, those that were merely overtaken are called all the same.
        """
        ejected = self._outlier_detector.ejected
        if not ejected or not all(address in ejected for address in addresses):
            return ejected
        return ejected - self._outlier_detector.last_resort

    def ejected_at_s(self, address: str) -> float | None:
        """Return when an address was ejected, None if it is not."""
        return self._outlier_detector.ejected_at_s(address)

    def latency_thresholds_s(self, n_rows: int) -> tuple[float, float]:
        """Return after how long a call is hedged, and after how long it is too slow."""
        settings, typical_s = self.settings, self._latency.quantile_s(n_rows)
        if typical_s == math.inf:
            return math.inf, settings.abandon_default_s
        abandon_after_s = max(settings.abandon_min_s, settings.abandon_factor * typical_s)
        return max(settings.hedge_min_s, typical_s), abandon_after_s

    def record_response(self, address: str, *, n_rows: int, elapsed_s: float) -> None:
        """Take note of a good answer."""
        self._latency.record(n_rows, elapsed_s)
        self._outlier_detector.record_success(address)
        self.reachable.add(address)

    def record_failure(self, address: str, error: CallError, now_s: float) -> CallError:
        """Take note of a failed call; return what the failure means."""
        if not isinstance(error, ConnectError):
            self.reachable.add(address)
        elif self._may_be_starting and address not in self.reachable:
            return EndpointStarting(str(error))
        if (fault := _classify_fault(error)) is not None:
            self._outlier_detector.record_failure(address, fault, now_s)
            self._update_ejected_gauge()
        return error

    def run_health_checks(self, now_s: float) -> None:
        """Probe the ejected addresses that are due, and let those return that are well."""
        if not self._outlier_detector.ejected:
            return
        for address, is_healthy in self._health_checker.poll_results():
            self._outlier_detector.record_probe(address, is_healthy=is_healthy, now_s=now_s)
            self._update_ejected_gauge()
        self._health_checker.submit(self._outlier_detector.due_for_probe(now_s))

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        self.reachable &= set(addresses)
        self._outlier_detector.retain(addresses)
        self._update_ejected_gauge()

    def close(self) -> None:
        """End what runs beside the engine."""
        self._health_checker.close()

    def _update_ejected_gauge(self) -> None:
        self._metrics.ejected.set(len(self._outlier_detector.ejected))


def _classify_fault(error: CallError) -> Fault | None:
    """Return what a failure says of its address; None if it says nothing."""
    if isinstance(error, StatusError):
        return None if error.status in (*OVERLOADED_STATUSES, NOT_ATTACHED_STATUS) else Fault.ERROR
    if isinstance(error, CallTimeout):
        return Fault.TIMEOUT
    if isinstance(error, LostHedge):
        return Fault.LOST_HEDGE
    return Fault.UNREACHABLE if isinstance(error, ConnectError) else Fault.ERROR
