"""The tenants of the gateway's file, and their keys, which may change at any time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from faasmoe_contracts.api_keys import KeyReadError, KeyRing, read_named_digests
from faasmoe_contracts.gateway_file import GatewayFile, ModelEntry, TenantEntry, TenantModelEntry

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 1.0


class TenantDirectory:
    """Who may call what.

    Args:
        file: models and tenants; without tenants everyone may use every model.
        time_s: current time in seconds since the epoch.

    Attributes:
        models: all models by name.
        tenants: all tenants by name.
    """

    def __init__(self, file: GatewayFile, time_s: float) -> None:
        self._digests: dict[str, frozenset[bytes]] = {}
        self._problems: set[str] = set()
        self._keys = KeyRing({})
        self.replace(file, time_s)

    def replace(self, file: GatewayFile, time_s: float) -> None:
        """Take other models and tenants."""
        self._is_closed = file.is_closed
        self.models = {model.name: model for model in file.models}
        self.tenants = {tenant.name: tenant for tenant in file.tenants}
        self._names = {tenant.name: self._names_of(tenant.models) for tenant in file.tenants}
        self._open_names = self._names_of([TenantModelEntry(name) for name in self.models])
        self._hosts = {t.host.lower(): t.name for t in file.tenants if t.host is not None}
        self.refresh(time_s)

    @property
    def is_open(self) -> bool:
        """Whether everyone may call: there are no tenants, and nobody says otherwise."""
        return not self.tenants and not self._is_closed

    def authenticate(self, key: str) -> TenantEntry | None:
        """Return the tenant of a key; None for an unknown or expired one, in constant time."""
        return self.tenants.get(self._keys.find_tenant(key) or "")

    def tenant_of_host(self, host: str) -> str | None:
        """Return the tenant to which a host name belongs; None if it is no tenant's."""
        return self._hosts.get(host.lower())

    def names_for(
        self, tenant: TenantEntry | None
    ) -> Mapping[str, tuple[ModelEntry, TenantModelEntry]]:
        """Return the names that a caller may give in requests, with the models behind them."""
        return self._open_names if tenant is None else self._names[tenant.name]

    def refresh(self, time_s: float) -> None:
        """Read all keys again; a folder that cannot be read keeps its keys."""
        problems, digests = set(), {}
        for tenant in self.tenants.values():
            try:
                digests[tenant.name] = _valid_digests(tenant, time_s)
            except KeyReadError as error:
                digests[tenant.name] = self._digests.get(tenant.name, frozenset())
                problems.add(f"{tenant.name}: {error}; keeping its keys")
            if not digests[tenant.name]:
                where = f" in {tenant.keys_path}" if tenant.keys_path else ""
                problems.add(f"{tenant.name}: no key{where}; it cannot call")
        if digests != self._digests:
            self._digests, self._keys = digests, KeyRing(digests)
        if self._keys.n_shared_keys:
            problems.add(f"{self._keys.n_shared_keys} keys belong to several tenants; ignored")
        for problem in sorted(problems - self._problems):
            logger.error("Tenants: %s", problem)
        self._problems = problems

    def _names_of(
        self, models: tuple[TenantModelEntry, ...] | list[TenantModelEntry]
    ) -> dict[str, tuple[ModelEntry, TenantModelEntry]]:
        names = {}
        for entry in models:
            model = self.models[entry.name]
            for name in (model.served_name, entry.alias):
                if name is not None:
                    names[name] = (model, entry)
        return names


def _valid_digests(tenant: TenantEntry, time_s: float) -> frozenset[bytes]:
    digests = {name: bytes.fromhex(digest) for name, digest in tenant.key_digests.items()}
    if tenant.keys_path:
        digests |= read_named_digests(Path(tenant.keys_path))
    return frozenset(
        digest
        for name, digest in digests.items()
        if time_s < tenant.key_expiry.get(name, float("inf"))
    )
