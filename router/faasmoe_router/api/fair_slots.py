"""Fair sharing of a few slots between tenants; only decides, without side effects.

Start-time fair queueing (Goyal et al., SIGCOMM 1996) by the seconds that a tenant's work took, over
its weight: a free slot goes to the waiting tenant with the least. A tenant that returns from idle
is lifted to the least of those that are active, so idleness earns no credit. Where there are
several tenants, none takes all slots: a short request of one never waits for two long ones of
another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from faasmoe_router.errors import TenantQueueFull


@dataclass(slots=True)
class _Tenant:
    weight: float = 1.0
    served_s: float = 0.0  # over its weight, including lifts
    n_running: int = 0
    waiting: deque[Hashable] = field(default_factory=deque)

    @property
    def is_active(self) -> bool:
        return bool(self.waiting) or self.n_running > 0


class FairSlots:
    """Assigns slots to the entries of tenants.

    Args:
        n_slots: entries that run at once.
        max_waiting: entries that may wait; each tenant has its part of them, by weight.
        is_shared: whether there are several tenants; then none may hold every slot.
    """

    def __init__(self, *, n_slots: int, max_waiting: int, is_shared: bool = False) -> None:
        self._n_slots = n_slots
        self._max_waiting = max_waiting
        self._max_per_tenant = max(1, n_slots - 1) if is_shared else n_slots
        self._tenants: dict[str, _Tenant] = {}
        self._level_s = 0.0  # of the tenant that was served last

    @property
    def n_running(self) -> int:
        """Entries that hold a slot."""
        return sum(tenant.n_running for tenant in self._tenants.values())

    def n_waiting(self, name: str) -> int:
        """Return how many entries of a tenant wait."""
        return len(self._tenants[name].waiting) if name in self._tenants else 0

    def push(self, name: str, entry: Hashable, *, weight: float = 1.0) -> None:
        """Append an entry of a tenant; raises TenantQueueFull if its part is full."""
        tenant = self._tenants.get(name)
        n_waiting = 0 if tenant is None else len(tenant.waiting)
        if n_waiting >= self._capacity(name, weight):
            raise TenantQueueFull(
                f"{n_waiting} of your requests wait to be read and tokenized, which is the most "
                "that may"
            )
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
        if not tenant.is_active:
            active = [other.served_s for other in self._tenants.values() if other.is_active]
            tenant.served_s = max(tenant.served_s, min(active, default=self._level_s))
        tenant.weight = weight
        tenant.waiting.append(entry)

    def pop(self) -> tuple[str, Hashable] | None:
        """Give a free slot to the next entry; return its tenant and it, or None."""
        if self.n_running >= self._n_slots:
            return None
        candidates = [
            (tenant.served_s, name)
            for name, tenant in self._tenants.items()
            if tenant.waiting and tenant.n_running < self._max_per_tenant
        ]
        if not candidates:
            return None
        self._level_s, name = min(candidates)
        tenant = self._tenants[name]
        tenant.n_running += 1
        return name, tenant.waiting.popleft()

    def remove(self, name: str, entry: Hashable) -> None:
        """Remove a waiting entry."""
        self._tenants[name].waiting.remove(entry)

    def release(self, name: str, elapsed_s: float) -> None:
        """Free the slot of a tenant's entry that ran for `elapsed_s`."""
        tenant = self._tenants[name]
        tenant.n_running -= 1
        tenant.served_s += elapsed_s / tenant.weight

    def _capacity(self, name: str, weight: float) -> int:
        others = sum(t.weight for n, t in self._tenants.items() if n != name and t.is_active)
        return max(1, int(self._max_waiting * weight / (weight + others)))
