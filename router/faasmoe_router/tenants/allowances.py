"""The tenants' buckets, made when they are first needed and anew when a limit has changed."""

from __future__ import annotations

from collections.abc import Container

from faasmoe_router.tenants.document import TenantLimits
from faasmoe_router.tenants.limits import RateLimits

_Setting = tuple[int | None, int | None, int]


class Allowances:
    """Each tenant's requests and tokens per minute."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[_Setting, RateLimits]] = {}

    def of(self, tenant: str, limits: TenantLimits, now_s: float, *, n_routers: int) -> RateLimits:
        """Return a tenant's allowance; a full one if it is new or its limits have changed."""
        setting = (limits.requests_per_minute, limits.tokens_per_minute, n_routers)
        kept = self._kept.get(tenant)
        if kept is None or kept[0] != setting:
            allowance = RateLimits(
                requests_per_minute=limits.requests_per_minute,
                tokens_per_minute=limits.tokens_per_minute,
                now_s=now_s,
                n_routers=n_routers,
            )
            kept = self._kept[tenant] = (setting, allowance)
        return kept[1]

    def keep(self, tenants: Container[str]) -> None:
        """Forget who is not among these."""
        self._kept = {name: kept for name, kept in self._kept.items() if name in tenants}
