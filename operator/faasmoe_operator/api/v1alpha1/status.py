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

    type: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=316)] = Field(
        description="Aspect of the state, such as Ready."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that the condition describes."
    )
    last_transition_time: Timestamp = Field(description="When the status last changed.")
    reason: ConditionReason = Field(description="Reason of the status, for programs.")
    message: Annotated[str, Field(max_length=32_768)] = Field(
        description="Reason of the status, for people."
    )


class LayerRunStatus(ApiModel):
    """Consecutive MoE layers with equal shapes."""

    count: Count = Field(description="Number of layers.")
    num_experts: Count = Field(description="Routed experts of a layer.")
    top_k: Count = Field(description="Experts that compute each token.")
    expert_bytes: Bytes = Field(description="Size of one expert.")
    shared_bytes: Bytes = Field(description="Size of what all experts of a layer share.")


class ModelStatus(ApiModel):
    """Summary of the prepared store."""

    digest: Text = Field(description="Digest of the prepared weights.")
    revision: Text | None = Field(
        None, description="The commit that the requested revision resolved to."
    )
    source: Text = Field(description="Source that the store was prepared from.")
    family: Text = Field(description="Family of the model, as transformers names it.")
    architecture: Text = Field(description="Class of the model.")
    dtype: Text = Field(description="Type of the stored weights.")
    experts_quantization: Text | None = Field(None, description="Absent if not quantised.")
    router_quantization: Text | None = Field(None, description="Absent if not quantised.")
    hidden_size: Count = Field(description="Width of hidden states.")
    vocab_size: Count = Field(description="Size of the vocabulary.")
    max_position_embeddings: Count = Field(description="Longest context of the model, in tokens.")
    num_hidden_layers: Count = Field(description="Number of decoder layers.")
    size_bytes: Bytes = Field(description="Size of the store.")
    router_bytes: Bytes = Field(description="Size of the router's weights.")
    router_quantized_bytes: Bytes | None = Field(
        None, description="Part of routerBytes that is quantised; absent if none is."
    )
    layers: Annotated[tuple[LayerRunStatus, ...], Field(max_length=10_000)] = Field(
        description="MoE layers, runs of equal shapes together."
    )


class RouterStatus(ApiModel):
    """Numbers of routers."""

    replicas: Count | None = Field(None, description="Number of router pods.")
    ready_replicas: Count | None = Field(None, description="Number of ready router pods.")
    selector: Text | None = Field(
        None, description="Label selector of the router's pods, for autoscalers."
    )


class FunctionsStatus(ApiModel):
    """Numbers of expert functions."""

    total: Count | None = Field(
        None, description="Functions that the experts are partitioned into."
    )
    active: Count | None = Field(None, description="Functions with at least one ready replica.")
    replicas: Count | None = Field(None, description="Ready replicas of all functions.")


class SandboxesStatus(ApiModel):
    """Numbers of sandboxes."""

    total: Count | None = Field(None, description="Sandboxes that exist.")
    ready: Count | None = Field(None, description="Sandboxes that are ready.")
    generic: Count | None = Field(None, description="Ready sandboxes without functions.")


class TenantStatus(ApiModel):
    """State of one tenant."""

    name: Annotated[str, Field(max_length=63)] = Field(description="Name of the tenant.")
    url: Text | None = Field(None, description="The tenant's OpenAI base URL.")
    keys: Count | None = Field(None, description="Number of API keys that the routers know.")


class MoEModelStatus(ApiModel):
    """Observed state of the model."""

    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that this status describes."
    )
    url: Text | None = Field(None, description="OpenAI base URL.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=32)] = Field(
        (), json_schema_extra=list_type_map("type"), description="Aspects of the state."
    )
    model: ModelStatus | None = None
    router: RouterStatus | None = None
    functions: FunctionsStatus | None = None
    sandboxes: SandboxesStatus | None = None
    tenants: Annotated[tuple[TenantStatus, ...], Field(max_length=MAX_TENANTS)] = Field(
        (), json_schema_extra=list_type_map("name"), description="State of each tenant."
    )
