"""The status of a Tenant. All but the record of usage can be rebuilt by the operator."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from faasmoe_operator.api.v1alpha1.base import LIST_TYPE_SET, ApiModel, list_type_map
from faasmoe_operator.api.v1alpha1.status import Bytes, Condition, Count, Generation
from faasmoe_operator.api.v1alpha1.tenant import MAX_MODELS

MAX_RECORD_CHARS = 64 << 10
ModelName = Annotated[str, Field(max_length=253)]
Cost = Annotated[float, Field(ge=0)]


class UsageStatus(ApiModel):
    """What was used in one period."""

    requests: Bytes = Field(description="Requests that got an answer.")
    input_tokens: Bytes = Field(description="Tokens of prompts.")
    output_tokens: Bytes = Field(description="Generated tokens.")
    cost: Cost = Field(description="Their price, in the currency of spec.prices.")


class TenantUsageStatus(ApiModel):
    """What was used in the current day and month, in UTC."""

    day: Annotated[str, Field(max_length=10)] = Field(description="The day, as 2026-11-29.")
    in_day: UsageStatus = Field(description="Used on that day.")
    in_month: UsageStatus = Field(description="Used in its month.")


class TenantResourceStatus(ApiModel):
    """Observed state of the tenant."""

    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that this status describes."
    )
    conditions: Annotated[tuple[Condition, ...], Field(max_length=32)] = Field(
        (), json_schema_extra=list_type_map("type"), description="Aspects of the state."
    )
    keys: Count | None = Field(None, description="Number of API keys that are accepted.")
    models: Annotated[tuple[ModelName, ...], Field(max_length=MAX_MODELS)] = Field(
        (), json_schema_extra=LIST_TYPE_SET, description="Models that the tenant may use."
    )
    usage: TenantUsageStatus | None = Field(
        None, description="What the tenant has used; updated every few seconds."
    )
    usage_record: Annotated[str, Field(max_length=MAX_RECORD_CHARS)] | None = Field(
        None,
        description="What each gateway has reported, as JSON, so that a restarted operator counts "
        "nothing twice; not for clients.",
    )
