"""Which addresses are ejected: they get no calls until a probe finds them well. Pure.

An address that refuses connections is ejected at once, one that answers wrongly or not in time
after some such calls in a row. It is probed after a while that doubles with each probe that fails.
Slow addresses are ejected only as long as half of all stay: when all are slow, it is not they.

Asks ejected sandboxes whether they are ready, in a thread of its own: they may hang.
"""

from __future__ import annotations

import http.client
import queue
import threading
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What was wrong with a call."""

    UNREACHABLE = "nothing listens at the address"
    ERROR = "the connection broke, or the answer was none"
    TIMEOUT = "it took too long"
    LOST_HEDGE = "another replica, asked later, was faster"


@dataclass(frozen=True, slots=True)
class OutlierDetectionSettings:
    """When addresses are ejected, and for how long.

    Attributes:
        wrong_in_a_row: wrong answers in a row after which an address is ejected.
        slow_in_a_row: the same for calls that took too long.
        overtaken_in_a_row: the same for calls that a hedge was faster than, which happens to one
            call in twenty though nothing is wrong.
        first_s: how long after its ejection an address is probed.
        most_s: the most between two probes.
        forgive_s: how long an address must be well for its next ejection to be a first one.
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
    """The addresses that had faults lately.

    Attributes:
        ejected: those that get no calls now.
        n_ejections: how often one was ejected so far.
    """

    def __init__(self, settings: OutlierDetectionSettings | None = None) -> None:
        self._settings = settings or OutlierDetectionSettings()
        self._states: dict[str, _AddressState] = {}
        self._ejected: set[str] = set()
        self._last_resort: set[str] = set()
        self._n_known = 0
        self.n_ejections = 0

    @property
    def ejected(self) -> Set[str]:
        """Addresses that get no calls now."""
        return self._ejected

    @property
    def last_resort(self) -> Set[str]:
        """Those of the ejected that were only ever overtaken: better than nobody."""
        return self._last_resort

    def ejected_at_s(self, address: str) -> float | None:
        """Return when an address was ejected, None if it is not."""
        state = self._states.get(address)
        return None if state is None else state.ejected_at_s

    def record_success(self, address: str) -> None:
        """Take note of a good answer."""
        state = self._states.get(address)
        if state is not None:
            state.n_errors = state.n_timeouts = state.n_lost_hedges = 0

    def record_failure(self, address: str, fault: Fault, now_s: float) -> None:
        """Take note of a fault; it may eject the address."""
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

    def due_for_probe(self, now_s: float) -> list[str]:
        """Return the ejected addresses to probe now; each is told once until `probed`."""
        due = [a for a in self._ejected if self._is_probe_due(self._states[a], now_s)]
        for address in due:
            self._states[address].is_probing = True
        return due

    def record_probe(self, address: str, *, is_healthy: bool, now_s: float) -> None:
        """Take the outcome of a probe: let the address return, or wait for longer."""
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

    def _uneject(self, address: str) -> None:
        self._ejected.discard(address)
        self._last_resort.discard(address)

    def _should_eject(self, state: _AddressState, fault: Fault) -> bool:
        if fault is Fault.UNREACHABLE:
            return True
        if state.n_errors >= self._settings.consecutive_errors:
            return True
        settings = self._settings
        has_latency_fault = (
            state.n_timeouts >= settings.consecutive_timeouts
            or state.n_lost_hedges >= settings.consecutive_lost_hedges
        )
        return has_latency_fault and len(self._ejected) < max(1, self._n_known // 2)

    def _eject(self, address: str, state: _AddressState, now_s: float) -> None:
        if now_s - state.unejected_at_s >= self._settings.reset_after_s:
            state.n_ejections = 0
        state.ejected_at_s = now_s
        state.next_probe_s = now_s + self._ejection_time_s(state)
        state.n_ejections += 1
        state.is_probing = False
        self._ejected.add(address)
        self.n_ejections += 1

    def _ejection_time_s(self, state: _AddressState) -> float:
        backed_off_s = self._settings.base_ejection_time_s * 2 ** min(state.n_ejections, 16)
        return float(min(self._settings.max_ejection_time_s, backed_off_s))

    def _is_probe_due(self, state: _AddressState, now_s: float) -> bool:
        return not state.is_probing and now_s >= state.next_probe_s


PROBE_TIMEOUT_S = 1.0
READY_PATH = "/readyz"


class HealthChecker:
    """Probes addresses; the thread runs from the first probe on until `close`."""

    def __init__(self, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, addresses: Iterable[str]) -> None:
        """Begin to probe addresses."""
        for address in addresses:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="health-checker", daemon=True
                )
                self._thread.start()
            self._requests.put(address)

    def poll_results(self) -> Iterator[tuple[str, bool]]:
        """Give the addresses probed since, and whether each is ready; does not wait."""
        while True:
            try:
                yield self._results.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """End the thread, after the probe that it is at."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._requests.put(None)
            thread.join()

    def _run(self) -> None:
        while (address := self._requests.get()) is not None:
            self._results.put((address, is_ready(address, timeout_s=self._timeout_s)))


def is_ready(address: str, *, timeout_s: float) -> bool:
    """Return whether a sandbox says that it is ready."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        connection.request("GET", READY_PATH)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
