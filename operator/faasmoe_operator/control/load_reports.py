"""The load of each function over all routers, from their latest reports. Pure.

Each router reports once a second and the controller samples once a second, so each router counts
once. A router that stops reporting counts as idle after a timeout, because it and its calls are
gone, unless sandboxes report that they are called (`sandbox_prober.py`). Until any router has
reported to this control process, silence says nothing for a longer time: replicas found at a
restart are retained until routers had time to reconnect.
"""

from __future__ import annotations

from collections.abc import Mapping

from faasmoe_contracts.control_messages import LoadReport

ROUTER_TIMEOUT_S = 10.0
STARTUP_GRACE_S = 30.0
PARTITION_GRACE_S = 3600.0  # how long a router that disappeared under load may still be serving
MAX_ROUTERS = 256


class LoadReports:
    """The latest report of each router; all times are of the controller's clock, in seconds."""

    def __init__(self, *, now: float) -> None:
        self._latest: dict[str, tuple[float, LoadReport]] = {}
        self._started_at = now
        self._has_any = False
        self._lost_with_load: dict[str, float] = {}

    def is_full(self, router: str) -> bool:
        """Return whether this router would be one more than MAX_ROUTERS."""
        return router not in self._latest and len(self._latest) >= MAX_ROUTERS

    def add(self, report: LoadReport, *, now: float) -> bool:
        """Replace a router's report; return whether the tenants' numbers of keys changed."""
        _, previous = self._latest.get(report.router, (now, LoadReport(report.router)))
        self._latest[report.router] = (now, report)
        self._lost_with_load.pop(report.router, None)
        self._has_any = True
        return (previous.tenant_key_counts or {}) != (report.tenant_key_counts or {})

    def concurrency(self, now: float) -> Mapping[str, float] | None:
        """Return the calls in flight of each function with load; None while nothing is known."""
        self._expire(now)
        if not self._latest and not self._has_any and now - self._started_at < STARTUP_GRACE_S:
            return None
        loads: dict[str, float] = {}
        for _, report in self._latest.values():
            for function, load in report.functions.items():
                loads[function] = loads.get(function, 0.0) + load.concurrency
        return loads

    def had_load(self) -> bool:
        """Return whether any router had load in its latest report."""
        return any(report.has_load for _, report in self._latest.values())

    def skip_suspension(self, since: float, now: float) -> None:
        """Do not count a time in which this process was suspended and received no reports."""
        self._latest = {n: (at + now - since, report) for n, (at, report) in self._latest.items()}

    def has_lost_router_with_load(self, now: float) -> bool:
        """Return whether a router stopped reporting under load: it crashed or is partitioned."""
        self._expire(now)
        self._lost_with_load = {
            name: at for name, at in self._lost_with_load.items() if now - at < PARTITION_GRACE_S
        }
        return bool(self._lost_with_load)

    def queued(self, now: float) -> int:
        """Return the number of calls and requests that wait in routers."""
        self._expire(now)
        return sum(report.queued for _, report in self._latest.values())

    def has_load(self, now: float) -> bool:
        """Return whether any router has load."""
        self._expire(now)
        return any(report.has_load for _, report in self._latest.values())

    def tenant_key_counts(self, now: float) -> Mapping[str, int] | None:
        """Return the number of API keys of each tenant; None if no router has reported any.

        Routers differ while some have not reloaded a change: the smaller number counts.
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
