"""The tenants of a chaos run, each with its own endpoint and API key.

Their limits are enforced but never reached, so that accounting and fair queueing run as in
production and no request is rejected.
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
    """A tenant.

    Attributes:
        name: name of the tenant, part of its path.
        key: its API key.
    """

    name: str
    key: str

    @property
    def path(self) -> str:
        """Path of its OpenAI API on the router."""
        return f"/{self.name}/v1"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of its requests."""
        return {"Authorization": f"Bearer {self.key}"}


def new_tenants() -> tuple[ChaosTenant, ...]:
    """Return N_TENANTS tenants with new random keys."""
    return tuple(ChaosTenant(f"tenant-{n}", secrets.token_urlsafe(24)) for n in range(N_TENANTS))


def write_tenant_keys(tenants: Sequence[ChaosTenant], folder: Path) -> list[dict[str, Any]]:
    """Write the API keys to a folder; return `spec.tenants` for a MoEModel file in that folder."""
    for tenant in tenants:
        keys = folder / "keys" / tenant.name
        keys.mkdir(parents=True, exist_ok=True)
        (keys / "key").write_text(tenant.key)
    return [{"name": t.name, "apiKeysPath": f"keys/{t.name}", "limits": LIMITS} for t in tenants]
