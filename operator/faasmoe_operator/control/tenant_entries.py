"""What the gateway's file says of a Tenant; the same for `faasmoe up` and on Kubernetes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from faasmoe_contracts.gateway_file import (
    BudgetEntry,
    LimitsEntry,
    PricesEntry,
    TenantEntry,
    TenantModelEntry,
)
from faasmoe_operator.api.v1alpha1.tenant import PricesSpec, Tenant, TenantLimits, TenantModelSpec


def tenant_entry(
    tenant: Tenant,
    models: Iterable[TenantModelSpec],
    *,
    keys_path: str = "",
    key_digests: Mapping[str, str] | None = None,
) -> TenantEntry:
    """Return a tenant's entry.

    Args:
        tenant: the tenant.
        models: the models that it may use, with the names that they have in the file.
        keys_path: folder of its keys; empty if they are given by their digests.
        key_digests: digests of its keys by name, in hexadecimal.
    """
    spec, limits = tenant.spec, tenant.spec.limits
    return TenantEntry(
        tenant.metadata.name,
        keys_path,
        tuple(_terms(model, limits.max_output_tokens) for model in models),
        {key.name: key.expires_at.timestamp() for key in spec.keys if key.expires_at},
        _limits_entry(limits),
        tuple(BudgetEntry(b.unit, b.period, b.limit, b.soft_percent) for b in spec.budgets),
        None if spec.prices is None else _prices_entry(spec.prices),
        spec.host,
        dict(key_digests or {}),
    )


def _limits_entry(limits: TenantLimits) -> LimitsEntry:
    return LimitsEntry(
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.input_tokens_per_minute,
        limits.output_tokens_per_minute,
    )


def _prices_entry(prices: PricesSpec) -> PricesEntry:
    return PricesEntry(
        prices.currency, prices.input_per_million_tokens, prices.output_per_million_tokens
    )


def _terms(model: TenantModelSpec, max_output_tokens: int | None) -> TenantModelEntry:
    bounds = [n for n in (model.max_output_tokens, max_output_tokens) if n is not None]
    return TenantModelEntry(model.name, model.alias, min(bounds, default=None))
