"""The routed experts: how they are cut into functions, and the sandboxes that hold these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from faasmoe_operator.spec.base import Part
from faasmoe_operator.spec.extensions import KUBERNETES_ONLY, PROCESS_ONLY
from faasmoe_operator.spec.pod_template import PodTemplate
from faasmoe_operator.spec.quantity import ByteQuantity, to_bytes
from faasmoe_operator.spec.router import Device
from faasmoe_operator.spec.scaling import Scaling


class Granularity(Part):
    """How the experts are cut into functions."""

    experts_per_function: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        "auto", description="Experts of a layer in one function; auto makes about 3 blocks a layer."
    )
    layers_per_function: int = Field(
        1, ge=1, le=1000, description="Layers whose block is in the same function."
    )


class Experts(Part):
    """The sandboxes, and how the functions in them scale."""

    device: Device = Field("auto", description="auto takes a CUDA device if there is one.")
    threads: int = Field(1, ge=1, le=256, description="Compute threads of a sandbox.")
    functions_per_sandbox: int = Field(1, ge=1, le=10_000, description="Capacity of a sandbox.")
    placement: Literal["auto", "functions"] | None = Field(
        None,
        description="auto, as if left out, computes hot functions in the router's own process "
        "where that was measured to take less time, at most half of a layer's; functions never "
        "does.",
        json_schema_extra=PROCESS_ONLY,
    )
    warm_pool: int = Field(1, ge=0, le=1000, description="Generic sandboxes kept ready.")
    memory: ByteQuantity | None = Field(
        None,
        description="What the functions in all sandboxes may take together, for a device that does "
        "not hold the whole model: the least lately used make room. No limit if left out.",
    )
    scaling: Scaling = Field(default_factory=lambda: Scaling.model_validate({}))
    template: PodTemplate = Field(
        default_factory=lambda: PodTemplate.model_validate({}),
        description="What the sandboxes' pods are like.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def memory_bytes(self) -> int | None:
        """What all functions may take together; None for no limit."""
        return None if self.memory is None else to_bytes(self.memory)
