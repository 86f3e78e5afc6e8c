"""What dispatch remembers of addresses from one layer to the next."""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from dataclasses import dataclass, field

from faasmoe_router.dispatch.budget import ExtraCalls
from faasmoe_router.dispatch.errors import (
    CallError,
    CannotConnect,
    NotYetThere,
    Overtaken,
    Refused,
    TooSlow,
)
from faasmoe_router.dispatch.latency import Latency
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.outliers import Ejection, Fault, Outliers
from faasmoe_router.dispatch.prober import Prober

BUSY = (429, 503)  # the sandbox has too much to do, or ends: work goes elsewhere
NOT_HERE = 404  # the function was detached; the table will say so


@dataclass(frozen=True, slots=True)
class Resilience:
    """How calls that fail or take long are dealt with.

    Attributes:
        max_attempts: addresses tried for one call, one after the other.
        hedge_quantile: a call is made a second time, at another replica, when it has taken longer
            than this share of the calls of its size.
        hedge_least_s: but not before.
        extra_share: hedges, and calls given up for slowness, for each call, at most.
        extra_burst: how many of those may come together.
        slow_factor: a call is given up when it has taken so many times the quantile.
        slow_least_s: but not before.
        slow_unknown_s: the same while too few calls of its size were seen.
        ejection: when addresses get no calls.
    """

    max_attempts: int = 3
    hedge_quantile: float = 0.95
    hedge_least_s: float = 0.005
    extra_share: float = 0.05
    extra_burst: float = 8.0
    slow_factor: float = 20.0
    slow_least_s: float = 0.25
    slow_unknown_s: float = 2.0
    ejection: Ejection = field(default_factory=Ejection)


class AddressBook:
    """What is known of addresses. Belongs to the engine's thread.

    Args:
        settings: how faults are dealt with.
        metrics: counters.
        may_start: whether an address that nobody has reached yet may be one that starts.
    """

    def __init__(
        self, settings: Resilience, metrics: DispatchMetrics, *, may_start: bool = True
    ) -> None:
        self.settings = settings
        self.proven: set[str] = set()
        """Addresses that have accepted a connection."""
        self.extra = ExtraCalls(share=settings.extra_share, burst=settings.extra_burst)
        self._latency = Latency(settings.hedge_quantile)
        self._outliers = Outliers(settings.ejection)
        self._prober = Prober()
        self._metrics = metrics
        self._may_start = may_start

    def avoided(self, addresses: Collection[str]) -> Set[str]:
        """Return which of a function's addresses get no calls now.

        Where all of them are ejected, those that were merely overtaken are called all the same.
        """
        ejected = self._outliers.ejected
        if not ejected or not all(address in ejected for address in addresses):
            return ejected
        return ejected - self._outliers.slow

    def ejected_s(self, address: str) -> float | None:
        """Return when an address was ejected, None if it is not."""
        return self._outliers.ejected_s(address)

    def patience_s(self, n_rows: int) -> tuple[float, float]:
        """Return after how long a call is hedged, and after how long it is too slow."""
        settings, usual_s = self.settings, self._latency.after_s(n_rows)
        if usual_s == math.inf:
            return math.inf, settings.slow_unknown_s
        slow_s = max(settings.slow_least_s, settings.slow_factor * usual_s)
        return max(settings.hedge_least_s, usual_s), slow_s

    def answered(self, address: str, *, n_rows: int, took_s: float) -> None:
        """Take note of a good answer."""
        self._latency.note(n_rows, took_s)
        self._outliers.succeeded(address)
        self.proven.add(address)

    def failed(self, address: str, error: CallError, now_s: float) -> CallError:
        """Take note of a failed call; return what the failure means."""
        if not isinstance(error, CannotConnect):
            self.proven.add(address)
        elif self._may_start and address not in self.proven:
            return NotYetThere(str(error))
        if (fault := _fault(error)) is not None:
            self._outliers.failed(address, fault, now_s)
            self._count()
        return error

    def look_after(self, now_s: float) -> None:
        """Probe the ejected addresses that are due, and let those return that are well."""
        if not self._outliers.ejected:
            return
        for address, is_well in self._prober.found():
            self._outliers.probed(address, is_well=is_well, now_s=now_s)
            self._count()
        self._prober.ask(self._outliers.due(now_s))

    def keep(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        self.proven &= set(addresses)
        self._outliers.keep(addresses)
        self._count()

    def close(self) -> None:
        """End what runs beside the engine."""
        self._prober.close()

    def _count(self) -> None:
        self._metrics.ejected.set(len(self._outliers.ejected))


def _fault(error: CallError) -> Fault | None:
    """Return what a failure says of its address; None if it says nothing."""
    if isinstance(error, Refused):
        return None if error.status in (*BUSY, NOT_HERE) else Fault.WRONG
    if isinstance(error, TooSlow):
        return Fault.SLOW
    if isinstance(error, Overtaken):
        return Fault.OVERTAKEN
    return Fault.GONE if isinstance(error, CannotConnect) else Fault.WRONG
