"""The authority of all tenants' limits over several gateways, and their usage. No I/O.

One bucket for each limit (`faasmoe_contracts.token_leases`), which gateways lease tokens of. The
shares that they may know are saved before a grant is sent, rounded up, so that a restarted
authority never lets more through than the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from faasmoe_contracts.gateway_file import TenantEntry
from faasmoe_contracts.lease_messages import LeaseAnswer, LeaseReport, PeriodUsage, bucket_name
from faasmoe_contracts.tenant_usage import Usage
from faasmoe_contracts.token_leases import LeaseAuthority

SHARE_STEPS = 32  # to which saved shares are rounded up

Shares = Mapping[str, Mapping[str, float]]
"""Shares of limits by bucket and gateway."""


class LeaseBook:
    """The buckets of all limits, and the usage that gateways have reported.

    Args:
        tenants: the tenants.
        now_s: current time; all times are monotonic seconds.
        saved: the shares that an earlier authority saved; None if there was none.
    """

    def __init__(
        self, tenants: Iterable[TenantEntry], now_s: float, *, saved: Shares | None = None
    ) -> None:
        shares = saved or {}
        self._authorities = {
            name: LeaseAuthority(limit, now_s, shares=shares.get(name))
            for tenant in tenants
            for name, limit in _limits(tenant)
        }
        self._usage: dict[str, dict[str, PeriodUsage]] = {}
        self._saved: dict[str, dict[str, float]] = {n: dict(s) for n, s in shares.items()}

    def renew(self, report: LeaseReport, now_s: float) -> LeaseAnswer:
        """Grant what a gateway asks for; limits that do not exist are left out."""
        self._usage.setdefault(report.holder, {}).update(report.usage)
        grants, levels = {}, {}
        for name, request in report.requests.items():
            authority = self._authorities.get(name)
            if authority is None:
                continue
            grant = authority.renew(report.holder, request, now_s)
            if grant is not None:
                grants[name] = grant
            levels[name] = max(0.0, authority.available(now_s))
        return LeaseAnswer(grants, levels, self._usage_of_others(report.holder))

    def shares_to_save(self) -> Shares | None:
        """Return all shares if some exceed what was saved, or are far below; to be saved then."""
        bounds = {
            name: {holder: _rounded_up(share) for holder, share in authority.shares.items()}
            for name, authority in self._authorities.items()
            if authority.shares
        }
        if all(_is_covered(found, self._saved.get(name)) for name, found in bounds.items()):
            return None
        self._saved = bounds
        return bounds

    def _usage_of_others(self, holder: str) -> dict[str, PeriodUsage]:
        """Return what tenants used through other gateways, in the latest day that any has seen."""
        others = [usage for name, usage in self._usage.items() if name != holder]
        totals = {}
        for tenant in {tenant for usage in others for tenant in usage}:
            found = [usage[tenant] for usage in others if tenant in usage]
            day = max(used.day for used in found)
            total = PeriodUsage(day, Usage(), Usage())
            for used in found:
                if used.day == day:
                    total.in_day.add(used.in_day)
                if used.day[:7] == day[:7]:
                    total.in_month.add(used.in_month)
            totals[tenant] = total
        return totals


def _limits(tenant: TenantEntry) -> Iterable[tuple[str, int]]:
    for name, limit in asdict(tenant.limits).items():
        if limit is not None:
            yield bucket_name(tenant.name, name), limit


def _rounded_up(share: float) -> float:
    return min(1.0, math.ceil(share * SHARE_STEPS) / SHARE_STEPS)


def _is_covered(bounds: Mapping[str, float], saved: Mapping[str, float] | None) -> bool:
    """Return whether saved shares are at least those, and not much more."""
    if saved is None or set(saved) != set(bounds):
        return False
    return all(bound <= saved[name] <= bound + 0.25 for name, bound in bounds.items())
