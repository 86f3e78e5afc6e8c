"""Endpoint health: what dispatch remembers of addresses from one layer to the next.

`EndpointHealth` combines outlier detection, the latency quantiles that hedges wait for
(latency_tracker.py), and the budget that bounds hedges. It knows addresses and errors; it knows
nothing of functions or frames. Which replica a call goes to is decided in retry_policy.py.

Outlier detection ejects faulty addresses from load balancing until a probe succeeds: immediately if
they refuse connections, after several consecutive errors or timeouts otherwise. The delay of the
probe doubles with each failure. Slow addresses are ejected only while at least half of all
addresses remain: when all are slow, the cause lies elsewhere. Unless they hang: a call that took
too long makes all addresses suspects, which are probed at once, and those without an answer are
ejected however many they are. `OutlierDetector` is pure, the caller passes the time;
`HealthChecker` probes in its own threads, because a sandbox may hang.
"""

from __future__ import annotations

import http.client
import math
import queue
import threading
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass, field
from enum import Enum

from faasmoe_contracts.tls import TlsPeer
from faasmoe_router.dispatch.latency_tracker import LatencyTracker
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.transport import (
    CallError,
    CallTimeout,
    ConnectError,
    EndpointStarting,
    LostHedge,
    StatusError,
)

PROBE_TIMEOUT_S = 1.0
MAX_PROBE_THREADS = 8  # so that many that hang are found out together
READY_PATH = "/readyz"


class Fault(Enum):
    """What a failed call reveals about its address."""

    UNREACHABLE = "the address does not accept connections"
    ERROR = "the connection broke, or the response was invalid"
    TIMEOUT = "the call took too long"
    LOST_HEDGE = "another replica, called later, was faster"


@dataclass(frozen=True, slots=True)
class OutlierDetectionSettings:
    """When addresses are ejected, and for how long.

    Attributes:
        consecutive_errors: consecutive errors after which an address is ejected.
        consecutive_timeouts: the same for timeouts.
        consecutive_lost_hedges: the same for lost hedges, which affect one call in twenty of a
            healthy address.
        base_ejection_time_s: delay between the first ejection and its probe.
        max_ejection_time_s: maximum delay between two probes.
        reset_after_s: how long an address must stay healthy for its back-off to be reset.
    """

    consecutive_errors: int = 3
    consecutive_timeouts: int = 2
    consecutive_lost_hedges: int = 4
    base_ejection_time_s: float = 0.5
    max_ejection_time_s: float = 30.0
    reset_after_s: float = 60.0


@dataclass(slots=True)
class _AddressState:
    n_errors: int = 0
    n_timeouts: int = 0
    n_lost_hedges: int = 0
    n_ejections: int = 0
    ejected_at_s: float | None = None
    unejected_at_s: float = 0.0
    next_probe_s: float = 0.0
    is_probing: bool = False


class OutlierDetector:
    """Tracks the addresses with recent faults; times are seconds of one monotonic clock."""

    def __init__(self, settings: OutlierDetectionSettings | None = None) -> None:
        self._settings = settings or OutlierDetectionSettings()
        self._states: dict[str, _AddressState] = {}
        self._ejected: set[str] = set()
        self._last_resort: set[str] = set()
        self._n_known = 0

    @property
    def ejected(self) -> Set[str]:
        """Addresses that must not be called now."""
        return self._ejected

    @property
    def last_resort(self) -> Set[str]:
        """Ejected addresses that only lost hedges; usable if nothing else is left."""
        return self._last_resort

    def ejected_at_s(self, address: str) -> float | None:
        """Return when an address was ejected, None if it is not ejected."""
        state = self._states.get(address)
        return None if state is None else state.ejected_at_s

    def record_success(self, address: str) -> None:
        """Record a successful call, which resets the consecutive faults."""
        state = self._states.get(address)
        if state is not None:
            state.n_errors = state.n_timeouts = state.n_lost_hedges = 0

    def record_failure(self, address: str, fault: Fault, now_s: float) -> None:
        """Record a fault, and eject the address if it exceeds a limit."""
        state = self._states.setdefault(address, _AddressState())
        state.n_errors += fault is Fault.ERROR
        state.n_timeouts += fault is Fault.TIMEOUT
        state.n_lost_hedges += fault is Fault.LOST_HEDGE
        if fault is not Fault.LOST_HEDGE:
            self._last_resort.discard(address)
        if state.ejected_at_s is None and self._should_eject(state, fault):
            self._eject(address, state, now_s)
            if fault is Fault.LOST_HEDGE:
                self._last_resort.add(address)

    def record_hung(self, address: str, now_s: float) -> None:
        """Eject an address that answers nothing, not even a probe."""
        state = self._states.setdefault(address, _AddressState())
        if state.ejected_at_s is None:
            self._eject(address, state, now_s)

    def due_for_probe(self, now_s: float) -> list[str]:
        """Return the ejected addresses to probe now; each once until `record_probe`."""
        due = [a for a in self._ejected if self._is_probe_due(self._states[a], now_s)]
        for address in due:
            self._states[address].is_probing = True
        return due

    def record_probe(self, address: str, *, is_healthy: bool, now_s: float) -> None:
        """Record a probe's result: uneject the address, or double its delay."""
        state = self._states.get(address)
        if state is None or state.ejected_at_s is None:
            return
        state.is_probing = False
        if not is_healthy:
            state.next_probe_s = now_s + self._ejection_time_s(state)
            state.n_ejections += 1
            return
        state.ejected_at_s = None
        state.unejected_at_s = now_s
        state.n_errors = state.n_timeouts = state.n_lost_hedges = 0
        self._uneject(address)

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        self._n_known = len(addresses)
        for address in self._states.keys() - addresses:
            del self._states[address]
            self._uneject(address)

    def _should_eject(self, state: _AddressState, fault: Fault) -> bool:
        settings = self._settings
        if fault is Fault.UNREACHABLE or state.n_errors >= settings.consecutive_errors:
            return True
        is_slow = (
            state.n_timeouts >= settings.consecutive_timeouts
            or state.n_lost_hedges >= settings.consecutive_lost_hedges
        )
        return is_slow and len(self._ejected) < max(1, self._n_known // 2)

    def _eject(self, address: str, state: _AddressState, now_s: float) -> None:
        if now_s - state.unejected_at_s >= self._settings.reset_after_s:
            state.n_ejections = 0
        state.ejected_at_s = now_s
        state.next_probe_s = now_s + self._ejection_time_s(state)
        state.n_ejections += 1
        state.is_probing = False
        self._ejected.add(address)

    def _uneject(self, address: str) -> None:
        self._ejected.discard(address)
        self._last_resort.discard(address)

    def _ejection_time_s(self, state: _AddressState) -> float:
        backed_off_s = self._settings.base_ejection_time_s * 2 ** min(state.n_ejections, 16)
        return float(min(self._settings.max_ejection_time_s, backed_off_s))

    def _is_probe_due(self, state: _AddressState, now_s: float) -> bool:
        return not state.is_probing and now_s >= state.next_probe_s


class HealthChecker:
    """Probes the readiness of addresses in threads that run from the first probes to `close`.

    Args:
        timeout_s: time of each step of a probe.
        tls: how sandboxes are known; None probes them without TLS.
    """

    def __init__(self, timeout_s: float = PROBE_TIMEOUT_S, *, tls: TlsPeer | None = None) -> None:
        self._timeout_s = timeout_s
        self._tls = tls
        self._requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, addresses: Iterable[str]) -> None:
        """Enqueue addresses to probe."""
        for address in addresses:
            self._requests.put(address)
            n_threads = len(self._threads)
            if not n_threads or (n_threads < MAX_PROBE_THREADS and self._requests.qsize()):
                thread = threading.Thread(target=self._run, name="health-checker", daemon=True)
                self._threads.append(thread)
                thread.start()

    def poll_results(self) -> Iterator[tuple[str, bool]]:
        """Yield (address, is ready) of the probes finished since the last call, without waiting."""
        while True:
            try:
                yield self._results.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Stop the thread after its current probe."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._requests.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (address := self._requests.get()) is not None:
            self._results.put(
                (address, is_ready(address, timeout_s=self._timeout_s, tls=self._tls))
            )


def is_ready(address: str, *, timeout_s: float, tls: TlsPeer | None = None) -> bool:
    """Return whether a sandbox reports that it is ready."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        if tls is not None:
            connection.connect()
            connection.sock = tls.context().wrap_socket(connection.sock, server_hostname=tls.name)
        connection.request("GET", READY_PATH)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


OVERLOADED_STATUSES = (429, 503)  # the sandbox is overloaded or shutting down, not faulty
NOT_ATTACHED_STATUS = 404  # the function was detached; the next routing table will say so


@dataclass(frozen=True, slots=True)
class ResilienceSettings:
    """How failed and slow calls are handled.

    Attributes:
        max_attempts: maximum number of addresses tried for one call, one after the other.
        hedge_quantile: a call is hedged at another replica once it takes longer than this fraction
            of the calls of its size.
        hedge_min_s: minimum delay of a hedge.
        retry_budget_ratio: maximum ratio of hedges and abandoned calls to all calls.
        retry_budget_burst: maximum number of hedges and abandoned calls in a burst.
        abandon_factor: a call is abandoned once it takes this many times the quantile.
        abandon_min_s: minimum time after which a call is abandoned.
        abandon_default_s: the same while too few calls of its size were observed; also the least
            time after which a call is abandoned whatever the budget.
        outlier_detection: when addresses are ejected.
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
    """Health and latency of addresses; belongs to the engine's thread.

    Args:
        settings: how faults are handled.
        metrics: the dispatcher's metrics.
        may_be_starting: whether an address that was never reachable may belong to a starting
            sandbox.
        tls: how sandboxes are known; None probes them without TLS.

    Attributes:
        settings: how faults are handled.
        retry_budget: bounds hedges and abandoned calls.
    """

    def __init__(
        self,
        settings: ResilienceSettings,
        metrics: DispatchMetrics,
        *,
        may_be_starting: bool = True,
        tls: TlsPeer | None = None,
    ) -> None:
        self.settings = settings
        self._reachable: set[str] = set()  # addresses that have accepted a connection
        self.retry_budget = RetryBudget(
            ratio=settings.retry_budget_ratio, burst=settings.retry_budget_burst
        )
        self._latency = LatencyTracker(settings.hedge_quantile)
        self._outlier_detector = OutlierDetector(settings.outlier_detection)
        self._health_checker = HealthChecker(tls=tls)
        self._known: Collection[str] = ()
        self._suspects: set[str] = set()  # being probed because a call took too long
        self._metrics = metrics
        self._may_be_starting = may_be_starting

    def excluded_addresses(self, addresses: Collection[str]) -> Set[str]:
        """Return the addresses that calls to a function must avoid now.

        If all of the function's addresses are ejected, those that only lost hedges are used anyway.
        """
        ejected = self._outlier_detector.ejected
        if not ejected or not all(address in ejected for address in addresses):
            return ejected
        return ejected - self._outlier_detector.last_resort

    @property
    def ejected(self) -> Set[str]:
        """Addresses that are ejected now."""
        return self._outlier_detector.ejected

    def ejected_at_s(self, address: str) -> float | None:
        """Return when an address was ejected, None if it is not ejected."""
        return self._outlier_detector.ejected_at_s(address)

    def latency_thresholds_s(self, n_rows: int) -> tuple[float, float]:
        """Return after how many seconds to hedge a call, and after how many to abandon it."""
        settings, typical_s = self.settings, self._latency.quantile_s(n_rows)
        if typical_s == math.inf:
            return math.inf, settings.abandon_default_s
        abandon_after_s = max(settings.abandon_min_s, settings.abandon_factor * typical_s)
        return max(settings.hedge_min_s, typical_s), abandon_after_s

    @property
    def thresholds_version(self) -> int:
        """Changes whenever a threshold does."""
        return self._latency.version

    def hung_after_s(self, n_rows: int) -> float:
        """Return after how many seconds a sandbox without an answer is taken to hang.

        Its calls are then abandoned whatever the budget: it is ejected with the first of them, so
        they are few, and the router computes what other replicas cannot.
        """
        _, abandon_s = self.latency_thresholds_s(n_rows)
        return max(abandon_s, self.settings.abandon_default_s)

    def record_response(self, address: str, *, n_rows: int, elapsed_s: float) -> None:
        """Record a successful call."""
        self._latency.record(n_rows, elapsed_s)
        self._outlier_detector.record_success(address)
        self._reachable.add(address)

    def record_failure(self, address: str, error: CallError, now_s: float) -> CallError:
        """Record a failed call; return its error, as EndpointStarting where that applies."""
        if not isinstance(error, ConnectError):
            self._reachable.add(address)
        elif self._may_be_starting and address not in self._reachable:
            return EndpointStarting(str(error))
        if (fault := _classify_fault(error)) is not None:
            self._outlier_detector.record_failure(address, fault, now_s)
            self._update_ejected_gauge()
        if fault is Fault.TIMEOUT:
            self._probe_all({address, *self._known})
        return error

    def record_stopped(self, address: str, now_s: float) -> None:
        """Eject an address whose process is stopped: it answers nothing until it is continued."""
        self._outlier_detector.record_hung(address, now_s)
        self._update_ejected_gauge()

    def record_exited(self, address: str, now_s: float) -> None:
        """Eject an address whose process has ended: it accepts no connections."""
        self._outlier_detector.record_failure(address, Fault.UNREACHABLE, now_s)
        self._update_ejected_gauge()

    def run_health_checks(self, now_s: float) -> None:
        """Collect finished probes of ejected addresses and submit those that are due."""
        if not self._outlier_detector.ejected and not self._suspects:
            return
        for address, is_healthy in self._health_checker.poll_results():
            if address in self._suspects:
                self._suspects.discard(address)
                if not is_healthy:
                    self._outlier_detector.record_hung(address, now_s)
            else:
                self._outlier_detector.record_probe(address, is_healthy=is_healthy, now_s=now_s)
            self._update_ejected_gauge()
        self._health_checker.submit(self._outlier_detector.due_for_probe(now_s))

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        self._known = tuple(addresses)
        self._suspects &= set(addresses)
        self._reachable &= set(addresses)
        self._outlier_detector.retain(addresses)
        self._update_ejected_gauge()

    def _probe_all(self, addresses: Set[str]) -> None:
        """Find out which of these addresses hang."""
        new_suspects = addresses - self._suspects - self._outlier_detector.ejected
        self._suspects |= new_suspects
        self._health_checker.submit(new_suspects)

    def close(self) -> None:
        """Stop the health checker's threads."""
        self._health_checker.close()

    def _update_ejected_gauge(self) -> None:
        self._metrics.ejected.set(len(self._outlier_detector.ejected))


def _classify_fault(error: CallError) -> Fault | None:
    """Return the address's fault that an error reveals, None if it reveals none."""
    if isinstance(error, StatusError):
        return None if error.status in (*OVERLOADED_STATUSES, NOT_ATTACHED_STATUS) else Fault.ERROR
    if isinstance(error, CallTimeout):
        return Fault.TIMEOUT
    if isinstance(error, LostHedge):
        return Fault.LOST_HEDGE
    return Fault.UNREACHABLE if isinstance(error, ConnectError) else Fault.ERROR


class RetryBudget:
    """Bounds extra calls to a ratio of the regular ones, plus a burst.

    Without a bound, hedges would slow down an overloaded machine even further.

    Args:
        ratio: extra calls earned by each regular call, 0 to 1.
        burst: maximum number of extra calls at once.
    """

    def __init__(self, *, ratio: float = 0.05, burst: float = 8.0) -> None:
        self._ratio = ratio
        self._burst = burst
        self._balance = burst

    @property
    def has_balance(self) -> bool:
        """Whether the budget allows an extra call."""
        return self._balance >= 1

    def deposit(self, n_calls: int) -> None:
        """Credit regular calls."""
        self._balance = min(self._burst, self._balance + n_calls * self._ratio)

    def try_withdraw(self) -> bool:
        """Spend one extra call; return whether the budget allows it."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
