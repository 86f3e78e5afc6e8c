"""The load of each function over all routers, from their latest reports. Pure.

Each router reports once a second; the control samples once a second, so each router counts once.
A router that falls silent is taken as idle after a while: it is gone, and so are its calls, unless
sandboxes say that somebody calls them (`usage.py`). Before
any router has reported to this control, silence means nothing for longer: replicas found at a
restart are kept until routers had time to come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROUTER_TIMEOUT_S = 10.0
STARTUP_GRACE_S = 30.0
PARTITION_GRACE_S = 3600.0  # how long a router that fell silent under load may be thought to go on
MAX_ROUTERS = 256


@dataclass(frozen=True, slots=True)
class ReportedLoad:
    """One function's load in one report.

    Attributes:
        concurrency: time average of the calls in flight, held ones included.
        calls: calls in the interval.
        rows: rows of hidden states in those calls.
    """

    concurrency: float
    calls: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one router says once a second.

    Attributes:
        router: its name.
        functions: the functions with load; those left out have none.
        held: calls and requests that wait for a function at this moment.
        local: blocks that the router computed itself in the interval.
        tenants: API keys of each tenant that the router knows.
    """

    router: str
    functions: Mapping[str, ReportedLoad] = field(default_factory=dict)
    queued: int = 0
    n_local_blocks: int = 0
    tenant_key_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_load(self) -> bool:
        """Whether it tells of any load."""
        return self.queued > 0 or any(load.concurrency > 0 for load in self.functions.values())


class LoadReports:
    """The latest report of each router."""

    def __init__(self, *, now: float) -> None:
        self._latest: dict[str, tuple[float, LoadReport]] = {}
        self._started_at = now
        self._has_any = False
        self._lost_with_load: dict[str, float] = {}

    def is_full(self, router: str) -> bool:
        """Return whether there are too many routers for this one to be another."""
        return router not in self._latest and len(self._latest) >= MAX_ROUTERS

    def add(self, report: LoadReport, *, now: float) -> bool:
        """Keep a report in place of the router's last one; return whether tenants' keys changed."""
        _, previous = self._latest.get(report.router, (now, LoadReport(report.router)))
        self._latest[report.router] = (now, report)
        self._lost_with_load.pop(report.router, None)
        self._has_any = True
        return previous.tenant_key_counts != report.tenant_key_counts

    def concurrency(self, now: float) -> Mapping[str, float] | None:
        """Return each function's calls in flight; None while nothing is known.

        Functions without load are left out.
        """
        self._expire(now)
        if not self._latest and not self._has_any and now - self._started_at < STARTUP_GRACE_S:
            return None
        loads: dict[str, float] = {}
        for _, report in self._latest.values():
            for function, load in report.functions.items():
                loads[function] = loads.get(function, 0.0) + load.concurrency
        return loads

    def had_load(self) -> bool:
        """Return whether any router had load when it was heard last."""
        return any(report.has_load for _, report in self._latest.values())

    def skip_suspension(self, since: float, now: float) -> None:
        """Leave out a time in which nobody could be heard, as this process did not run."""
        self._latest = {n: (at + now - since, report) for n, (at, report) in self._latest.items()}

    def has_lost_router_with_load(self, now: float) -> bool:
        """Return whether a router fell silent while it had load: it may be dead, or cut off."""
        self._expire(now)
        self._lost_with_load = {
            name: at for name, at in self._lost_with_load.items() if now - at < PARTITION_GRACE_S
        }
        return bool(self._lost_with_load)

    def queued(self, now: float) -> int:
        """Return how many calls and requests wait in routers."""
        self._expire(now)
        return sum(report.queued for _, report in self._latest.values())

    def has_load(self, now: float) -> bool:
        """Return whether any router has load."""
        self._expire(now)
        return any(report.has_load for _, report in self._latest.values())

    def tenant_key_counts(self, now: float) -> Mapping[str, int] | None:
        """Return how many API keys each tenant has; None before a router has said so.

        Where routers differ, one has not read a change yet: the smaller number counts.
        """
        self._expire(now)
        reported = [
            report.tenant_key_counts
            for _, report in self._latest.values()
            if report.tenant_key_counts
        ]
        names = {name for tenants in reported for name in tenants}
        counts = {
            name: min(tenants[name] for tenants in reported if name in tenants) for name in names
        }
        return counts if reported else None

    def _expire(self, now: float) -> None:
        lost = [name for name, (at, _) in self._latest.items() if now - at > ROUTER_TIMEOUT_S]
        for name in lost:
            _, report = self._latest.pop(name)
            if report.has_load:
                self._lost_with_load[name] = now
