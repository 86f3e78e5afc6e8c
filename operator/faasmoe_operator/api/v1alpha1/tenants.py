"""Tenants of a model: their API keys, limits and shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1 import patterns
from faasmoe_operator.api.v1alpha1.base import (
    KUBERNETES_ONLY,
    LIST_TYPE_SET,
    PROCESS_ONLY,
    ApiModel,
    SchemaExtension,
    cel_rule,
    list_type_map,
    model_validations,
    validate_unique,
    validation_error,
    validations,
)
from faasmoe_operator.api.v1alpha1.field_types import DNSLabel, LocalObjectReference

PerMinuteLimit = Annotated[int, Field(ge=1, le=1_000_000_000)]
MaxConcurrentRequests = Annotated[int, Field(ge=1, le=100_000)]
MaxQueuedRequests = Annotated[int, Field(ge=0, le=1_000_000)]
MaxTokens = Annotated[int, Field(ge=1, le=10_000_000)]
ModelAlias = Annotated[str, Field(pattern=patterns.MODEL_NAME, max_length=256)]


class TenantLimitsSpec(ApiModel):
    """Limits of a tenant; an omitted field is no limit."""

    requests_per_minute: PerMinuteLimit | None = Field(
        None, description="Maximum number of requests per minute."
    )
    tokens_per_minute: PerMinuteLimit | None = Field(
        None, description="Tokens of prompts and completions."
    )
    max_concurrent_requests: MaxConcurrentRequests | None = Field(
        None, description="Maximum number of requests in the batch."
    )
    max_queued_requests: MaxQueuedRequests | None = Field(
        None, description="Maximum number of queued requests; further ones get status 429."
    )
    max_model_len: MaxTokens | None = Field(
        None, description="Maximum tokens of a prompt and its completion."
    )
    max_output_tokens: MaxTokens | None = Field(None, description="Maximum tokens of a completion.")


class TenantSpec(ApiModel):
    """A tenant with its endpoint /NAME/v1 and the API keys of one Secret or folder."""

    model_config = model_validations(
        cel_rule(
            "has(self.apiKeysSecretRef)",
            "expected apiKeysSecretRef: {name: SECRET}, a Secret whose every value is an API key",
            field=".apiKeysSecretRef",
            reason="FieldValueRequired",
        )
    )

    name: DNSLabel = Field(description="Name of the tenant, the first segment of its URL.")
    api_keys_secret_ref: LocalObjectReference | None = Field(
        None,
        description="Secret in the model's namespace; the value of each of its keys is an API key.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    api_keys_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="Folder, relative to the MoEModel file; each file in it is an API key.",
        json_schema_extra=PROCESS_ONLY,
    )
    weight: int = Field(
        1, ge=1, le=1000, description="Relative share of the tokens under contention."
    )
    priority: int = Field(
        0, ge=-10, le=10, description="Tenants of higher priority are served first."
    )
    limits: TenantLimitsSpec = Field(default_factory=lambda: TenantLimitsSpec.model_validate({}))
    model_alias: ModelAlias | None = Field(
        None, description="An additional name of the model for this tenant."
    )
    system_prompt: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        None, description="System prompt that precedes the messages of each chat."
    )
    share_prefix_cache_with: tuple[DNSLabel, ...] = Field(
        (),
        strict=False,
        max_length=16,
        description="Tenants with which it shares cached prefixes, in both directions. Without "
        "any, response times reveal nothing about the prompts of other tenants.",
        json_schema_extra=LIST_TYPE_SET,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.api_keys_secret_ref is None and self.api_keys_path is None:
            expected = "a Secret; for `faasmoe up` a folder in apiKeysPath"
            raise validation_error("apiKeysSecretRef", got=None, expected=expected)
        validate_unique("sharePrefixCacheWith", self.share_prefix_cache_with)
        return self


TENANTS_LIST_TYPE: SchemaExtension = list_type_map("name") | validations(
    cel_rule(
        "self.all(tenant, !has(tenant.sharePrefixCacheWith) || tenant.sharePrefixCacheWith.all("
        "name, name != tenant.name && self.exists(other, other.name == name)))",
        "expected only names of other tenants of this model in sharePrefixCacheWith",
    )
)


def validate_tenants(tenants: Sequence[TenantSpec]) -> None:
    """Raise a validation error for a duplicate name or a reference to an unknown tenant."""
    names = [tenant.name for tenant in tenants]
    validate_unique("tenants", names, key="name")
    for index, tenant in enumerate(tenants):
        for position, name in enumerate(tenant.share_prefix_cache_with):
            if name == tenant.name or name not in names:
                field_path = f"tenants.{index}.sharePrefixCacheWith.{position}"
                expected = "the name of another tenant of this model"
                raise validation_error(field_path, got=name, expected=expected)
