"""How functions scale: Knative's words, defaults and bounds, for all functions and for some."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec.base import Part, rule_broken
from faasmoe_operator.spec.extensions import Extension, cel, checked, rules
from faasmoe_operator.spec.patterns import INDICES
from faasmoe_operator.spec.ranges import parse_ranges

_IN_OVERRIDE = "(has(one.{0}) ? one.{0} : self.{0})"
_RISING = (
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
UpRate = Annotated[float, Field(gt=1, le=10_000)]
DownRate = Annotated[float, Field(gt=1, le=10_000)]
GraceSeconds = Annotated[float, Field(ge=0, le=3600)]
DelaySeconds = Annotated[float, Field(ge=0, le=3600)]
Ranges = Annotated[
    str,
    Field(
        pattern=INDICES,
        max_length=128,
        json_schema_extra=checked(cel(_RISING, "expected each range to rise, such as 0-3")),
    ),
]


def _at_most_max(field: str) -> Extension:
    return cel(f"self.{field} <= self.maxScale", "expected at most maxScale", field=f".{field}")


def _at_most_max_in_overrides(field: str) -> Extension:
    within = f"{_IN_OVERRIDE.format(field)} <= {_IN_OVERRIDE.format('maxScale')}"
    message = f"expected {field} of each override to be at most maxScale, its own or the general"
    rule = f"!has(self.overrides) || self.overrides.all(one, {within})"
    return cel(rule, message, field=".overrides")


_PANIC = "expected a panic window of 1 s or more: windowSeconds * panicWindowPercentage / 100"
_PANIC_S = "{} * {} >= 100.0"
_BOUNDED = ("minScale", "initialScale", "activationScale")


class ScalingOverride(Part):
    """Other settings for the functions that hold any of these layers and any of these experts.

    What is not given stays as it is for all functions. Of several overrides the last one wins.
    """

    model_config = rules(
        cel("has(self.layers) || has(self.experts)", "expected layers, experts or both to be given")
    )

    layers: Ranges | None = Field(None, description='MoE layers, such as "0-3,7"; all if left out.')
    experts: Ranges | None = Field(None, description='Experts, such as "0-19"; all if left out.')
    min_scale: Scale | None = None
    max_scale: MaxScale | None = None
    initial_scale: Scale | None = None
    activation_scale: MaxScale | None = None
    target: Target | None = None
    target_utilization_percentage: Utilization | None = None
    window_seconds: WindowSeconds | None = None
    panic_window_percentage: PanicWindow | None = None
    panic_threshold_percentage: PanicThreshold | None = None
    max_scale_up_rate: UpRate | None = None
    max_scale_down_rate: DownRate | None = None
    scale_to_zero_grace_period_seconds: GraceSeconds | None = None
    scale_to_zero_pod_retention_period_seconds: DelaySeconds | None = None
    scale_down_delay_seconds: DelaySeconds | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("layers", "experts"):
            _check_ranges(field, getattr(self, field))
        if self.layers is None and self.experts is None:
            raise rule_broken("layers", got=None, expected="layers, experts or both to be given")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the scaling settings that this override gives, under their Python names."""
        return self.model_dump(exclude_none=True, exclude={"layers", "experts"})


class Scaling(Part):
    """Knative's pod autoscaler for each function, concurrency as its metric."""

    model_config = rules(
        *map(_at_most_max, _BOUNDED),
        *map(_at_most_max_in_overrides, _BOUNDED),
        cel(
            _PANIC_S.format("self.windowSeconds", "self.panicWindowPercentage"),
            _PANIC,
            field=".panicWindowPercentage",
        ),
        cel(
            "!has(self.overrides) || self.overrides.all(one, "
            + _PANIC_S.format(*map(_IN_OVERRIDE.format, ("windowSeconds", "panicWindowPercentage")))
            + ")",
            f"{_PANIC}, in each override too",
            field=".overrides",
        ),
    )

    min_scale: Scale = Field(0, description="Replicas that are always kept.")
    max_scale: MaxScale = Field(8, description="Replicas at most.")
    initial_scale: Scale = Field(
        0,
        description="Replicas when the model is first deployed. Knative's default is 1; here the "
        "first request wakes all that it needs together.",
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
    max_scale_up_rate: UpRate = Field(1000, description="Replicas up at most by this factor.")
    max_scale_down_rate: DownRate = Field(2, description="Replicas down at most by this factor.")
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
        _check_settings(self, named="")
        for index, override in enumerate(self.overrides):
            merged = self.model_copy(update=override.settings())
            _check_settings(merged, named=f"overrides.{index}.")
        return self

    def for_function(self, layers: tuple[int, ...], experts: tuple[int, ...]) -> Scaling:
        """Return the settings of the function that holds these layers and experts."""
        changes: dict[str, Any] = {}
        for override in self.overrides:
            if _meets(override.layers, layers) and _meets(override.experts, experts):
                changes |= override.settings()
        return self.model_copy(update={**changes, "overrides": ()})


def _meets(ranges: str | None, indices: tuple[int, ...]) -> bool:
    return ranges is None or not parse_ranges(ranges).isdisjoint(indices)


def _check_ranges(field: str, ranges: str | None) -> None:
    try:
        if ranges is not None:
            parse_ranges(ranges)
    except ValueError as error:
        raise rule_broken(field, got=ranges, expected=str(error)) from error


def _check_settings(scaling: Scaling, *, named: str) -> None:
    limit = f"at most maxScale ({scaling.max_scale})"
    for field, value in (
        ("minScale", scaling.min_scale),
        ("initialScale", scaling.initial_scale),
        ("activationScale", scaling.activation_scale),
    ):
        if value > scaling.max_scale:
            raise rule_broken(named + field, got=value, expected=limit)
    panic_s = scaling.window_seconds * scaling.panic_window_percentage / 100
    if panic_s < 1:
        raise rule_broken(
            named + "panicWindowPercentage",
            got=scaling.panic_window_percentage,
            expected=f"a panic window of 1 s or more (it is {panic_s:g} s)",
        )
