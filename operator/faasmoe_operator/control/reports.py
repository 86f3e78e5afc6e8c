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

ROUTER_LOST_S = 10.0
SILENCE_S = 30.0
CUT_OFF_S = 3600.0  # how long a router that fell silent under load may be thought to go on
MAX_ROUTERS = 256


@dataclass(frozen=True, slots=True)
class FunctionLoad:
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
    functions: Mapping[str, FunctionLoad] = field(default_factory=dict)
    held: int = 0
    local: int = 0
    tenants: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_busy(self) -> bool:
        """Whether it tells of any load."""
        return self.held > 0 or any(load.concurrency > 0 for load in self.functions.values())


class Reports:
    """The latest report of each router."""

    def __init__(self, *, now: float) -> None:
        self._latest: dict[str, tuple[float, LoadReport]] = {}
        self._begun = now
        self._heard = False
        self._lost: dict[str, float] = {}

    def is_full(self, router: str) -> bool:
        """Return whether there are too many routers for this one to be another."""
        return router not in self._latest and len(self._latest) >= MAX_ROUTERS

    def take(self, report: LoadReport, *, now: float) -> bool:
        """Keep a report in place of the router's last one; return whether tenants' keys changed."""
        _, before = self._latest.get(report.router, (now, LoadReport(report.router)))
        self._latest[report.router] = (now, report)
        self._lost.pop(report.router, None)
        self._heard = True
        return before.tenants != report.tenants

    def sample(self, now: float) -> Mapping[str, float] | None:
        """Return each function's calls in flight; None while nothing is known.

        Functions without load are left out.
        """
        self._forget(now)
        if not self._latest and not self._heard and now - self._begun < SILENCE_S:
            return None
        loads: dict[str, float] = {}
        for _, report in self._latest.values():
            for function, load in report.functions.items():
                loads[function] = loads.get(function, 0.0) + load.concurrency
        return loads

    def was_busy(self) -> bool:
        """Return whether any router had load when it was heard last."""
        return any(report.is_busy for _, report in self._latest.values())

    def bridge(self, since: float, now: float) -> None:
        """Leave out a time in which nobody could be heard, as this process did not run."""
        self._latest = {n: (at + now - since, said) for n, (at, said) in self._latest.items()}

    def has_lost_one(self, now: float) -> bool:
        """Return whether a router fell silent while it had load: it may be dead, or cut off."""
        self._forget(now)
        self._lost = {name: at for name, at in self._lost.items() if now - at < CUT_OFF_S}
        return bool(self._lost)

    def held(self, now: float) -> int:
        """Return how many calls and requests wait in routers."""
        self._forget(now)
        return sum(report.held for _, report in self._latest.values())

    def is_busy(self, now: float) -> bool:
        """Return whether any router has load."""
        self._forget(now)
        return any(report.is_busy for _, report in self._latest.values())

    def tenants(self, now: float) -> Mapping[str, int] | None:
        """Return how many API keys each tenant has; None before a router has said so.

        Where routers differ, one has not read a change yet: the smaller number counts.
        """
        self._forget(now)
        told = [report.tenants for _, report in self._latest.values() if report.tenants]
        names = {name for tenants in told for name in tenants}
        least = {name: min(tenants[name] for tenants in told if name in tenants) for name in names}
        return least if told else None

    def _forget(self, now: float) -> None:
        lost = [name for name, (at, _) in self._latest.items() if now - at > ROUTER_LOST_S]
        for name in lost:
            _, said = self._latest.pop(name)
            if said.is_busy:
                self._lost[name] = now
