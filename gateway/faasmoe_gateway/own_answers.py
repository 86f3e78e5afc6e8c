"""What the gateway itself answers: the models that a caller may use, and what a tenant has used."""

from __future__ import annotations

import json
from typing import Any

from faasmoe_contracts.gateway_file import ModelEntry, TenantEntry
from faasmoe_contracts.tenant_usage import PERIODS
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.refusal import model_not_found, unknown_path
from faasmoe_gateway.tenant_directory import TenantDirectory


class OwnAnswers:
    """Answers requests that need no router.

    Args:
        directory: models and tenants.
        accounts: the tenants' usage.
        created_s: what models say of when they were created, in seconds since the epoch.
    """

    def __init__(self, directory: TenantDirectory, accounts: Accounts, *, created_s: int) -> None:
        self._directory = directory
        self._accounts = accounts
        self._created_s = created_s

    def answer(self, path: str, tenant: TenantEntry | None, time_s: float) -> bytes:
        """Return the answer to a GET; raises Refusal.

        Args:
            path: its path, without a tenant's name.
            tenant: who calls; None for anybody.
            time_s: current time in seconds since the epoch.
        """
        names = self._directory.names_for(tenant)
        if path == "/v1/models":
            cards = [self._card(name, model) for name, (model, _) in names.items()]
            return json.dumps({"object": "list", "data": cards}).encode()
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            if name not in names:
                raise model_not_found(name)
            return json.dumps(self._card(name, names[name][0])).encode()
        if path == "/v1/usage" and tenant is not None:
            return json.dumps(self._usage(tenant, time_s)).encode()
        raise unknown_path(path)

    def _card(self, name: str, model: ModelEntry) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "faasmoe",
            "root": model.served_name,
            "parent": None,
            "max_model_len": model.max_model_len,
        }

    def _usage(self, tenant: TenantEntry, time_s: float) -> dict[str, Any]:
        account = self._accounts.of(tenant.name)
        periods = {period: account.in_period(time_s, period) for period in PERIODS}
        return {
            "object": "usage",
            "tenant": tenant.name,
            **{
                period: {
                    "requests": used.requests,
                    "input_tokens": used.input_tokens,
                    "output_tokens": used.output_tokens,
                    "cost": used.money,
                }
                for period, used in periods.items()
            },
        }
