"""How functions scale: Knative's words, defaults and bounds, for all functions and for some.

The routed experts: how they are cut into functions, and the sandboxes that hold these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1.base import (
    KUBERNETES_ONLY,
    PROCESS_ONLY,
    ApiModel,
    SchemaExtension,
    cel_rule,
    model_validations,
    validation_error,
    validations,
)
from faasmoe_operator.api.v1alpha1.field_types import (
    ByteQuantity,
    parse_index_ranges,
    quantity_to_bytes,
)
from faasmoe_operator.api.v1alpha1.patterns import INDEX_RANGES
from faasmoe_operator.api.v1alpha1.pod_template import PodTemplateSpec
from faasmoe_operator.api.v1alpha1.router import Device

_CEL_EFFECTIVE = "(has(one.{0}) ? one.{0} : self.{0})"
_CEL_ASCENDING = (
    "self.split(',').map(part, part.split('-')).all(ends, "
    "ends.size() == 1 || int(ends[0]) <= int(ends[1]))"
)

Scale = Annotated[int, Field(ge=0, le=1000)]
MaxScale = Annotated[int, Field(ge=1, le=1000)]
Target = Annotated[float, Field(ge=0.01, le=10_000)]
Utilization = Annotated[float, Field(ge=1, le=100)]
WindowSeconds = Annotated[float, Field(ge=6, le=3600)]
PanicWindow = Annotated[float, Field(ge=1, le=100)]
PanicThreshold = Annotated[float, Field(ge=110, le=1000)]
ScaleUpRate = Annotated[float, Field(gt=1, le=10_000)]
ScaleDownRate = Annotated[float, Field(gt=1, le=10_000)]
GraceSeconds = Annotated[float, Field(ge=0, le=3600)]
DelaySeconds = Annotated[float, Field(ge=0, le=3600)]
IndexRanges = Annotated[
    str,
    Field(
        pattern=INDEX_RANGES,
        max_length=128,
        json_schema_extra=validations(
            cel_rule(_CEL_ASCENDING, "expected ascending ranges, such as 0-3")
        ),
    ),
]


def _cel_at_most_max_scale(field: str) -> SchemaExtension:
    return cel_rule(
        f"self.{field} <= self.maxScale", "expected at most maxScale", field=f".{field}"
    )


def _cel_override_at_most_max_scale(field: str) -> SchemaExtension:
    condition = f"{_CEL_EFFECTIVE.format(field)} <= {_CEL_EFFECTIVE.format('maxScale')}"
    message = f"expected {field} of each override to be at most maxScale, its own or the general"
    rule = f"!has(self.overrides) || self.overrides.all(one, {condition})"
    return cel_rule(rule, message, field=".overrides")


_PANIC_MESSAGE = (
    "expected a panic window of 1 s or more: windowSeconds * panicWindowPercentage / 100"
)
_CEL_PANIC_WINDOW = "{} * {} >= 100.0"
_BOUNDED_BY_MAX_SCALE = ("minScale", "initialScale", "activationScale")


class ScalingOverride(ApiModel):
    """Other settings for the functions that hold any of these layers and any of these experts.

    What is not given stays as it is for all functions. Of several overrides the last one wins.
    """

    model_config = model_validations(
        cel_rule(
            "has(self.layers) || has(self.experts)", "expected layers, experts or both to be given"
        )
    )

    layers: IndexRanges | None = Field(
        None, description='MoE layers, such as "0-3,7"; all if left out.'
    )
    experts: IndexRanges | None = Field(
        None, description='Experts, such as "0-19"; all if left out.'
    )
    min_scale: Scale | None = None
    max_scale: MaxScale | None = None
    initial_scale: Scale | None = None
    activation_scale: MaxScale | None = None
    target: Target | None = None
    target_utilization_percentage: Utilization | None = None
    window_seconds: WindowSeconds | None = None
    panic_window_percentage: PanicWindow | None = None
    panic_threshold_percentage: PanicThreshold | None = None
    max_scale_up_rate: ScaleUpRate | None = None
    max_scale_down_rate: ScaleDownRate | None = None
    scale_to_zero_grace_period_seconds: GraceSeconds | None = None
    scale_to_zero_pod_retention_period_seconds: DelaySeconds | None = None
    scale_down_delay_seconds: DelaySeconds | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("layers", "experts"):
            _validate_ranges(field, getattr(self, field))
        if self.layers is None and self.experts is None:
            raise validation_error(
                "layers", got=None, expected="layers, experts or both to be given"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """Return the scaling settings that this override gives, under their Python names."""
        return self.model_dump(exclude_none=True, exclude={"layers", "experts"})


class ScalingSpec(ApiModel):
    """Knative's pod autoscaler for each function, concurrency as its metric."""

    model_config = model_validations(
        *map(_cel_at_most_max_scale, _BOUNDED_BY_MAX_SCALE),
        *map(_cel_override_at_most_max_scale, _BOUNDED_BY_MAX_SCALE),
        cel_rule(
            _CEL_PANIC_WINDOW.format("self.windowSeconds", "self.panicWindowPercentage"),
            _PANIC_MESSAGE,
            field=".panicWindowPercentage",
        ),
        cel_rule(
            "!has(self.overrides) || self.overrides.all(one, "
            + _CEL_PANIC_WINDOW.format(
                *map(_CEL_EFFECTIVE.format, ("windowSeconds", "panicWindowPercentage"))
            )
            + ")",
            f"{_PANIC_MESSAGE}, in each override too",
            field=".overrides",
        ),
    )

    min_scale: Scale = Field(0, description="Replicas that are always kept.")
    max_scale: MaxScale = Field(8, description="Replicas at most.")
    initial_scale: Scale = Field(
        0,
        description="Replicas when the model is first deployed. Knative's default is 1; here the "
        "first request activates all functions that it needs at once.",
    )
    activation_scale: MaxScale = Field(1, description="Replicas at least, once above zero.")
    target: Target = Field(4, description="Calls in flight that one replica should have.")
    target_utilization_percentage: Utilization = Field(
        70, description="Share of the target that is aimed at."
    )
    window_seconds: WindowSeconds = Field(60, description="Stable window of the average load.")
    panic_window_percentage: PanicWindow = Field(
        10, description="Panic window as a share of the stable window."
    )
    panic_threshold_percentage: PanicThreshold = Field(
        200, description="Load over capacity in the panic window that starts the panic."
    )
    max_scale_up_rate: ScaleUpRate = Field(1000, description="Replicas up at most by this factor.")
    max_scale_down_rate: ScaleDownRate = Field(
        2, description="Replicas down at most by this factor."
    )
    scale_to_zero_grace_period_seconds: GraceSeconds = Field(
        30, description="How long the last replica stays after the window has passed without load."
    )
    scale_to_zero_pod_retention_period_seconds: DelaySeconds = Field(
        0, description="How long the last replica stays at least, if that is longer."
    )
    scale_down_delay_seconds: DelaySeconds = Field(
        0, description="How long a lower load must last before replicas go."
    )
    overrides: tuple[ScalingOverride, ...] = Field(
        (), strict=False, max_length=64, description="Other settings for some functions."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _validate_settings(self, path_prefix="")
        for index, override in enumerate(self.overrides):
            merged = self.model_copy(update=override.settings())
            _validate_settings(merged, path_prefix=f"overrides.{index}.")
        return self

    def for_function(self, layers: tuple[int, ...], experts: tuple[int, ...]) -> ScalingSpec:
        """Return the settings of the function that holds these layers and experts."""
        changes: dict[str, Any] = {}
        for override in self.overrides:
            if _ranges_intersect(override.layers, layers) and _ranges_intersect(
                override.experts, experts
            ):
                changes |= override.settings()
        return self.model_copy(update={**changes, "overrides": ()})


def _ranges_intersect(ranges: str | None, indices: tuple[int, ...]) -> bool:
    return ranges is None or not parse_index_ranges(ranges).isdisjoint(indices)


def _validate_ranges(field: str, ranges: str | None) -> None:
    try:
        if ranges is not None:
            parse_index_ranges(ranges)
    except ValueError as error:
        raise validation_error(field, got=ranges, expected=str(error)) from error


def _validate_settings(scaling: ScalingSpec, *, path_prefix: str) -> None:
    limit = f"at most maxScale ({scaling.max_scale})"
    for field, value in (
        ("minScale", scaling.min_scale),
        ("initialScale", scaling.initial_scale),
        ("activationScale", scaling.activation_scale),
    ):
        if value > scaling.max_scale:
            raise validation_error(path_prefix + field, got=value, expected=limit)
    panic_s = scaling.window_seconds * scaling.panic_window_percentage / 100
    if panic_s < 1:
        raise validation_error(
            path_prefix + "panicWindowPercentage",
            got=scaling.panic_window_percentage,
            expected=f"a panic window of 1 s or more (it is {panic_s:g} s)",
        )


class GranularitySpec(ApiModel):
    """How the experts are cut into functions."""

    experts_per_function: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        "auto", description="Experts of a layer in one function; auto makes about 3 blocks a layer."
    )
    layers_per_function: int = Field(
        1, ge=1, le=1000, description="Layers whose block is in the same function."
    )


class ExpertsSpec(ApiModel):
    """The sandboxes, and how the functions in them scale."""

    device: Device = Field("auto", description="auto takes a CUDA device if there is one.")
    threads: int = Field(1, ge=1, le=256, description="Compute threads of a sandbox.")
    functions_per_sandbox: int = Field(1, ge=1, le=10_000, description="Capacity of a sandbox.")
    placement: Literal["auto", "functions"] | None = Field(
        None,
        description="auto, as if left out, runs colocated hot functions in the router process "
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
    scaling: ScalingSpec = Field(default_factory=lambda: ScalingSpec.model_validate({}))
    template: PodTemplateSpec = Field(
        default_factory=lambda: PodTemplateSpec.model_validate({}),
        description="What the sandboxes' pods are like.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def memory_bytes(self) -> int | None:
        """What all functions may take together; None for no limit."""
        return None if self.memory is None else quantity_to_bytes(self.memory)
