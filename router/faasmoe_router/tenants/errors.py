"""What goes wrong with tenants.

RouterError
├── DocumentError      a tenants file that cannot be used
├── RateLimited        a tenant has spent what it may ask for in a minute
├── TenantQueueFull    too many of a tenant's requests wait already
└── NeverFits          a request that no waiting would let through
"""

from __future__ import annotations

from collections.abc import Mapping

from faasmoe_router.errors import RouterError


class DocumentError(RouterError):
    """A tenants file that cannot be used; the message names the field."""


class RateLimited(RouterError):
    """A tenant has spent what it may ask for in a minute.

    Attributes:
        retry_after_s: when the request would be let through if nobody else asked.
        headers: the x-ratelimit-* headers that say what is left.
    """

    def __init__(
        self, message: str, *, retry_after_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


class TenantQueueFull(RouterError):
    """Too many of a tenant's requests wait already."""


class NeverFits(RouterError):
    """A request that asks for more than its tenant may have at once; waiting does not help."""
