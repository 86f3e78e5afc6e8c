"""The routed experts: their partitioning into functions, sandboxes and scaling.

Scaling settings have Knative's names, defaults and bounds. They apply to all functions; overrides
change them for some.
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
from faasmoe_operator.api.v1alpha1.router import QUANTIZATION_IMMUTABLE, Device

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
    """Settings of the functions that hold any of these layers and any of these experts.

    Omitted settings keep their general values. If several overrides match, the last one wins.
    """

    model_config = model_validations(
        cel_rule(
            "has(self.layers) || has(self.experts)", "expected layers, experts or both to be given"
        )
    )

    layers: IndexRanges | None = Field(
        None, description='Indices of MoE layers, such as "0-3,7"; all if omitted.'
    )
    experts: IndexRanges | None = Field(
        None, description='Indices of experts, such as "0-19"; all if omitted.'
    )
    min_scale: Scale | None = Field(None, description="Replaces minScale for these functions.")
    max_scale: MaxScale | None = Field(None, description="Replaces maxScale for these functions.")
    initial_scale: Scale | None = Field(
        None, description="Replaces initialScale for these functions."
    )
    activation_scale: MaxScale | None = Field(
        None, description="Replaces activationScale for these functions."
    )
    target: Target | None = Field(None, description="Replaces target for these functions.")
    target_utilization_percentage: Utilization | None = Field(
        None, description="Replaces targetUtilizationPercentage for these functions."
    )
    window_seconds: WindowSeconds | None = Field(
        None, description="Replaces windowSeconds for these functions."
    )
    panic_window_percentage: PanicWindow | None = Field(
        None, description="Replaces panicWindowPercentage for these functions."
    )
    panic_threshold_percentage: PanicThreshold | None = Field(
        None, description="Replaces panicThresholdPercentage for these functions."
    )
    max_scale_up_rate: ScaleUpRate | None = Field(
        None, description="Replaces maxScaleUpRate for these functions."
    )
    max_scale_down_rate: ScaleDownRate | None = Field(
        None, description="Replaces maxScaleDownRate for these functions."
    )
    scale_to_zero_grace_period_seconds: GraceSeconds | None = Field(
        None, description="Replaces scaleToZeroGracePeriodSeconds for these functions."
    )
    scale_to_zero_pod_retention_period_seconds: DelaySeconds | None = Field(
        None, description="Replaces scaleToZeroPodRetentionPeriodSeconds for these functions."
    )
    scale_down_delay_seconds: DelaySeconds | None = Field(
        None, description="Replaces scaleDownDelaySeconds for these functions."
    )

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
        """Return the scaling settings of this override by their Python names."""
        return self.model_dump(exclude_none=True, exclude={"layers", "experts"})


class ScalingSpec(ApiModel):
    """Settings of each function's autoscaler: Knative's KPA on the concurrency metric."""

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

    min_scale: Scale = Field(0, description="Minimum number of replicas.")
    max_scale: MaxScale = Field(8, description="Maximum number of replicas.")
    initial_scale: Scale = Field(
        0,
        description="Replicas of a new deployment. Knative's default is 1; here the first request "
        "activates all functions that it needs at once.",
    )
    activation_scale: MaxScale = Field(1, description="Minimum number of replicas above zero.")
    target: Target = Field(4, description="Target of concurrent calls for one replica.")
    target_utilization_percentage: Utilization = Field(
        70, description="Percentage of the target that the autoscaler aims at."
    )
    window_seconds: WindowSeconds = Field(60, description="Length of the stable window.")
    panic_window_percentage: PanicWindow = Field(
        10, description="Length of the panic window as a percentage of the stable window."
    )
    panic_threshold_percentage: PanicThreshold = Field(
        200,
        description="Load in the panic window, in percent of the capacity, that causes panic.",
    )
    max_scale_up_rate: ScaleUpRate = Field(
        1000, description="Maximum factor by which one decision multiplies the replicas."
    )
    max_scale_down_rate: ScaleDownRate = Field(
        2, description="Maximum factor by which one decision divides the replicas."
    )
    scale_to_zero_grace_period_seconds: GraceSeconds = Field(
        30, description="How long the last replica stays after a stable window without load."
    )
    scale_to_zero_pod_retention_period_seconds: DelaySeconds = Field(
        0, description="Minimum time that the last replica stays, if longer than the grace period."
    )
    scale_down_delay_seconds: DelaySeconds = Field(
        0, description="How long a lower load must last before replicas are removed."
    )
    overrides: tuple[ScalingOverride, ...] = Field(
        (), strict=False, max_length=64, description="Settings of some functions."
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
    """How the experts are partitioned into functions."""

    experts_per_function: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        "auto",
        description="Number of experts of a layer in one function; auto makes about 3 functions "
        "per layer.",
    )
    layers_per_function: int = Field(
        1, ge=1, le=1000, description="Number of layers whose blocks share one function."
    )


class ExpertsSpec(ApiModel):
    """The sandboxes and the scaling of the functions in them."""

    device: Device = Field(
        "auto", description="Compute device; auto selects a CUDA device if there is one."
    )
    quantization: Literal["none", "int8", "int4", "mxfp4"] = Field(
        "none",
        description="Scheme that the experts' weights are stored in. int8 takes about half the "
        "bytes of bfloat16 and is close to lossless; int4 and mxfp4 take a quarter and are lossy.",
        json_schema_extra=QUANTIZATION_IMMUTABLE,
    )
    threads: int = Field(1, ge=1, le=256, description="Number of compute threads of a sandbox.")
    functions_per_sandbox: int = Field(
        1, ge=1, le=10_000, description="Maximum number of functions in a sandbox."
    )
    placement: Literal["auto", "functions"] | None = Field(
        None,
        description="auto, the default, runs colocated functions in the router process where that "
        "was measured to be faster, some of a layer's or all; functions never does.",
        json_schema_extra=PROCESS_ONLY,
    )
    resize: Literal["auto", "none"] = Field(
        "auto",
        description="auto lets the requests of sandboxes' pods follow what is attached to them "
        "where the cluster can resize pods in place (Kubernetes 1.33 or newer); none requests what "
        "a sandbox needs with all its functions from the start.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    warm_pool: int = Field(1, ge=0, le=1000, description="Number of empty sandboxes kept ready.")
    memory: ByteQuantity | None = Field(
        None,
        description="Memory limit of the functions in all sandboxes together, for a device that "
        "cannot hold the whole model; least recently used functions are evicted, and routers "
        "compute those that find no place. No limit if omitted.",
    )
    scaling: ScalingSpec = Field(default_factory=lambda: ScalingSpec.model_validate({}))
    template: PodTemplateSpec = Field(
        default_factory=lambda: PodTemplateSpec.model_validate({}),
        description="Settings of the sandboxes' pods.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def memory_bytes(self) -> int | None:
        """Memory limit of all functions together in bytes; None for no limit."""
        return None if self.memory is None else quantity_to_bytes(self.memory)
