"""Requests that wait for functions to be started: each tenant has its own part of what may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from faasmoe_router.errors import HoldQueueFull


@dataclass(frozen=True, slots=True)
class HeldLimits:
    """What may wait, all tenants together.

    Attributes:
        max_requests: requests.
        max_bytes: their bodies' bytes.
    """

    max_requests: int = 1024
    max_bytes: int = 64 << 20


class HeldRequests:
    """Counts what waits, by tenant."""

    def __init__(self, limits: HeldLimits) -> None:
        self._limits = limits
        self._held: dict[str, tuple[int, int]] = {}  # requests, bytes

    @contextmanager
    def holding(self, tenant: str, part: float, *, size_bytes: int) -> Iterator[None]:
        """Count a request while it waits.

        Args:
            tenant: whose it is.
            part: the tenant's part of what may wait, 0 to 1; one request always may.
            size_bytes: of its body.

        Raises:
            HoldQueueFull: the tenant's part is full.
        """
        n_requests, n_bytes = self._held.get(tenant, (0, 0))
        if n_requests and n_requests + 1 > self._limits.max_requests * part:
            raise HoldQueueFull(f"{n_requests} of your requests wait for functions to be started")
        if n_requests and n_bytes + size_bytes > self._limits.max_bytes * part:
            raise HoldQueueFull(f"{n_bytes} bytes of yours wait for functions to be started")
        self._count(tenant, 1, size_bytes)
        try:
            yield
        finally:
            self._count(tenant, -1, -size_bytes)

    def _count(self, tenant: str, n_more: int, n_more_bytes: int) -> None:
        n_requests, n_bytes = self._held.pop(tenant, (0, 0))
        if n_requests + n_more:
            self._held[tenant] = (n_requests + n_more, n_bytes + n_more_bytes)
