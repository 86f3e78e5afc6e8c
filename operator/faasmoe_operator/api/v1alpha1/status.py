"""What the operator says of a MoEModel: the schema of `status`, all of it made anew when lost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from faasmoe_operator.api.v1alpha1.base import ApiModel, list_type_map
from faasmoe_operator.api.v1alpha1.tenants import MAX_TENANTS

MAX_COUNT = (1 << 31) - 1
MAX_SAFE_INTEGER = (
    1 << 53
)  # bounds are doubles: the API server refuses values near those of 64 bits

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Bytes = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
Generation = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
Text = Annotated[str, Field(max_length=2048)]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
ConditionReason = Annotated[
    str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", min_length=1, max_length=1024)
]


class Condition(ApiModel):
    """One aspect of the model's state, in Kubernetes' form."""

    type: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=316)]
    status: Literal["True", "False", "Unknown"]
    observed_generation: Generation | None = None
    last_transition_time: Timestamp
    reason: ConditionReason
    message: Annotated[str, Field(max_length=32_768)]


class LayerRunStatus(ApiModel):
    """MoE layers that follow each other and are alike."""

    count: Count
    num_experts: Count
    top_k: Count
    expert_bytes: Bytes
    shared_bytes: Bytes


class ModelStatus(ApiModel):
    """What the prepared store holds."""

    digest: Text
    revision: Text | None = Field(None, description="The commit that the hub's name stood for.")
    source: Text
    family: Text
    architecture: Text
    dtype: Text
    hidden_size: Count
    vocab_size: Count
    max_position_embeddings: Count
    num_hidden_layers: Count
    size_bytes: Bytes
    router_bytes: Bytes
    layers: Annotated[tuple[LayerRunStatus, ...], Field(max_length=10_000)]


class RouterStatus(ApiModel):
    """The routers."""

    replicas: Count | None = None
    ready_replicas: Count | None = None
    selector: Text | None = Field(None, description="Selects their pods, for autoscalers.")


class FunctionsStatus(ApiModel):
    """The expert functions."""

    total: Count | None = None
    active: Count | None = Field(None, description="With at least one replica that is ready.")
    replicas: Count | None = None


class SandboxesStatus(ApiModel):
    """The pods that hold functions."""

    total: Count | None = None
    ready: Count | None = None
    generic: Count | None = Field(None, description="Ready, and without a function so far.")


class TenantStatus(ApiModel):
    """One tenant."""

    name: Annotated[str, Field(max_length=63)]
    url: Text | None = None
    keys: Count | None = Field(None, description="API keys that the routers know.")


class MoEModelStatus(ApiModel):
    """What the operator has seen and done."""

    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that all of this is about."
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
