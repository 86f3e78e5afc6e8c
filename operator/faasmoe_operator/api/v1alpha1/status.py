"""The status of a MoEModel; the operator can rebuild all of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from faasmoe_contracts.control_messages import MAX_TENANTS
from faasmoe_operator.api.v1alpha1.base import ApiModel, list_type_map

MAX_COUNT = (1 << 31) - 1
MAX_SAFE_INTEGER = 1 << 53  # bounds are doubles: the API server rejects values near 2**63

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Bytes = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
Generation = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
Text = Annotated[str, Field(max_length=2048)]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
ConditionReason = Annotated[
    str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", min_length=1, max_length=1024)
]


class Condition(ApiModel):
    """One aspect of the model's state, as a Kubernetes condition."""

    type: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=316)]
    status: Literal["True", "False", "Unknown"]
    observed_generation: Generation | None = None
    last_transition_time: Timestamp
    reason: ConditionReason
    message: Annotated[str, Field(max_length=32_768)]


class LayerRunStatus(ApiModel):
    """Consecutive MoE layers with equal shapes."""

    count: Count
    num_experts: Count
    top_k: Count
    expert_bytes: Bytes
    shared_bytes: Bytes


class ModelStatus(ApiModel):
    """Summary of the prepared store."""

    digest: Text
    revision: Text | None = Field(
        None, description="The commit that the requested revision resolved to."
    )
    source: Text
    family: Text
    architecture: Text
    dtype: Text
    experts_quantization: Text | None = Field(None, description="Absent if not quantised.")
    router_quantization: Text | None = Field(None, description="Absent if not quantised.")
    hidden_size: Count
    vocab_size: Count
    max_position_embeddings: Count
    num_hidden_layers: Count
    size_bytes: Bytes
    router_bytes: Bytes
    router_quantized_bytes: Bytes | None = Field(
        None, description="Part of routerBytes that is quantised; absent if none is."
    )
    layers: Annotated[tuple[LayerRunStatus, ...], Field(max_length=10_000)]


class RouterStatus(ApiModel):
    """Numbers of routers."""

    replicas: Count | None = None
    ready_replicas: Count | None = None
    selector: Text | None = Field(
        None, description="Label selector of the router's pods, for autoscalers."
    )


class FunctionsStatus(ApiModel):
    """Numbers of expert functions."""

    total: Count | None = None
    active: Count | None = Field(None, description="Functions with at least one ready replica.")
    replicas: Count | None = None


class SandboxesStatus(ApiModel):
    """Numbers of sandboxes."""

    total: Count | None = None
    ready: Count | None = None
    generic: Count | None = Field(None, description="Ready sandboxes without functions.")


class TenantStatus(ApiModel):
    """State of one tenant."""

    name: Annotated[str, Field(max_length=63)]
    url: Text | None = None
    keys: Count | None = Field(None, description="Number of API keys that the routers know.")


class MoEModelStatus(ApiModel):
    """Observed state of the model."""

    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that this status describes."
    )
    url: Text | None = Field(None, description="OpenAI base URL.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=32)] = Field(
        (), json_schema_extra=list_type_map("type")
    )
    model: ModelStatus | None = None
    router: RouterStatus | None = None
    functions: FunctionsStatus | None = None
    sandboxes: SandboxesStatus | None = None
    tenants: Annotated[tuple[TenantStatus, ...], Field(max_length=MAX_TENANTS)] = Field(
        (), json_schema_extra=list_type_map("name")
    )
