"""Who asks in a chaos run: tenants of the model, each by its own endpoint and key.

Their limits are in force and never reached: what is counted and what is shared out is what a
platform's tenants would have, and no refusal is to be expected.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_TENANTS = 6
LIMITS = {
    "requestsPerMinute": 100_000,
    "tokensPerMinute": 100_000_000,
    "maxConcurrentRequests": 16,
    "maxQueuedRequests": 256,
}


@dataclass(frozen=True, slots=True)
class ChaosTenant:
    """One tenant.

    Attributes:
        name: stands in its endpoint's path.
        key: its API key.
    """

    name: str
    key: str

    @property
    def path(self) -> str:
        """Its endpoint on the router."""
        return f"/{self.name}/v1"

    @property
    def headers(self) -> dict[str, str]:
        """What its requests carry."""
        return {"Authorization": f"Bearer {self.key}"}


def new_tenants() -> tuple[ChaosTenant, ...]:
    """Return the tenants of a run, with keys that no run had before."""
    return tuple(ChaosTenant(f"tenant-{n}", secrets.token_urlsafe(24)) for n in range(N_TENANTS))


def write_tenant_keys(tenants: Sequence[ChaosTenant], folder: Path) -> list[dict[str, Any]]:
    """Write the tenants' keys below a folder; return `spec.tenants` of a MoEModel file in it."""
    for tenant in tenants:
        keys = folder / "keys" / tenant.name
        keys.mkdir(parents=True, exist_ok=True)
        (keys / "key").write_text(tenant.key)
    return [{"name": t.name, "apiKeysPath": f"keys/{t.name}", "limits": LIMITS} for t in tenants]
