"""The authority of all tenants' limits over several gateways, and their usage. No I/O.

One bucket for each limit (`faasmoe_contracts.token_leases`), which gateways lease tokens of. The
shares that they may know are saved before a grant is sent, rounded up, so that a restarted
authority never lets more through than the limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from faasmoe_contracts.gateway_file import TenantEntry
from faasmoe_contracts.json_reader import require_finite
from faasmoe_contracts.lease_messages import LeaseAnswer, LeaseReport, bucket_name
from faasmoe_contracts.token_leases import LeaseAuthority
from faasmoe_operator.control.tenant_ledger import TenantLedger

SHARE_STEPS = 32  # to which saved shares are rounded up

Shares = Mapping[str, Mapping[str, float]]
"""Shares of limits by bucket and gateway."""


class LeaseBook:
    """The buckets of all limits, and the usage that gateways have reported.

    Args:
        tenants: the tenants.
        now_s: current time; all times are monotonic seconds.
        saved: the shares that an earlier authority saved; None if there was none.
        ledger: the tenants' usage.
    """

    def __init__(
        self,
        tenants: Iterable[TenantEntry],
        now_s: float,
        *,
        saved: Shares | None = None,
        ledger: TenantLedger | None = None,
    ) -> None:
        shares = saved or {}
        self._authorities: dict[str, LeaseAuthority] = {}
        self._ledger = ledger or TenantLedger()
        self._saved: dict[str, dict[str, float]] = {n: dict(s) for n, s in shares.items()}
        self._seen_s = {holder: now_s for found in shares.values() for holder in found}
        self.configure(tenants, now_s)

    def configure(self, tenants: Iterable[TenantEntry], now_s: float) -> None:
        """Take other limits. One that has changed begins without tokens, as gateways have some."""
        limits = {name: limit for tenant in tenants for name, limit in _limits(tenant)}
        for name in self._authorities.keys() - limits.keys():
            del self._authorities[name]
        for name, limit in limits.items():
            known = self._authorities.get(name)
            if known is not None and known.limit == limit:
                continue
            shares = self._saved.get(name) if known is None else known.shares
            self._authorities[name] = LeaseAuthority(limit, now_s, shares=shares or None)

    def unseen(self, now_s: float, *, for_s: float) -> list[str]:
        """Return the gateways that have not reported for a time."""
        return [holder for holder, seen_s in self._seen_s.items() if now_s - seen_s > for_s]

    def forget(self, holder: str) -> None:
        """Give the shares of a gateway that is known to have ended to the others."""
        self._seen_s.pop(holder, None)
        for authority in self._authorities.values():
            authority.forget(holder)

    def renew(self, report: LeaseReport, now_s: float) -> LeaseAnswer:
        """Grant what a gateway asks for; limits that do not exist are left out."""
        run = report.run or report.holder
        self._ledger.report(run, report.usage)
        self._seen_s[report.holder] = now_s
        grants, levels = {}, {}
        for name, request in report.requests.items():
            authority = self._authorities.get(name)
            if authority is None:
                continue
            grant = authority.renew(report.holder, request, now_s)
            if grant is not None:
                grants[name] = grant
            levels[name] = max(0.0, authority.available(now_s))
        return LeaseAnswer(grants, levels, self._ledger.without(run))

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

    def mark_unsaved(self) -> None:
        """Note that what `shares_to_save` returned last could not be saved."""
        self._saved = {}


def parse_shares(text: str | bytes) -> Shares:
    """Return saved shares; raises ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict) or not all(isinstance(found, dict) for found in value.values()):
        raise ValueError("got no shares of holders by limit")
    for found in value.values():
        for share in found.values():
            require_finite(share, field="shares")
    shares: Shares = value
    return shares


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
