"""The functions of a model as the control core needs them: spec, size and scaling settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.api.v1alpha1.experts import GranularitySpec, ScalingSpec
from faasmoe_operator.plan.functions import LayerShape, Partitioning, function_bytes
from faasmoe_operator.scaling import ScalingSettings

PROGRESS_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class ManagedFunction:
    """One function.

    Attributes:
        spec: its id, layers and experts.
        size_bytes: size of its weights.
        scaling: its autoscaler's settings.
        content: name of what it maps, which other models may map too; empty if that is not known.
    """

    spec: FunctionSpec
    size_bytes: int
    scaling: ScalingSettings
    content: str = ""

    @property
    def id(self) -> str:
        """The function's opaque id."""
        return self.spec.id

    @property
    def stable_key(self) -> str:
        """Layers and experts as text. Unlike the id it is the same in every run."""
        return f"{_join_indices(self.spec.layers)}:{_join_indices(self.spec.experts)}"

    @property
    def anti_affinity_key(self) -> str:
        """The layers as text: functions of the same layers are called at the same time."""
        return _join_indices(self.spec.layers)


def partitioning_of(granularity: GranularitySpec) -> Partitioning:
    """Return the partitioning that a MoEModel's granularity asks for."""
    experts = granularity.experts_per_function
    return Partitioning(None if experts == "auto" else experts, granularity.layers_per_function)


def managed_functions(
    specs: Sequence[FunctionSpec], layers: Sequence[LayerShape], *, scaling: ScalingSpec
) -> tuple[ManagedFunction, ...]:
    """Return the functions with their sizes and scaling settings.

    Args:
        specs: the planned functions.
        layers: the layers of the store's manifest.
        scaling: the MoEModel's scaling settings.
    """
    return tuple(
        ManagedFunction(
            spec,
            function_bytes(spec, layers),
            scaling_settings(scaling.for_function(spec.layers, spec.experts)),
        )
        for spec in specs
    )


def scaling_settings(scaling: ScalingSpec) -> ScalingSettings:
    """Return the autoscaler settings of a MoEModel's `spec.experts.scaling`."""
    return ScalingSettings(
        min_scale=scaling.min_scale,
        max_scale=scaling.max_scale,
        initial_scale=scaling.initial_scale,
        activation_scale=scaling.activation_scale,
        target=scaling.target,
        target_utilization_percentage=scaling.target_utilization_percentage,
        window_s=scaling.window_seconds,
        panic_window_percentage=scaling.panic_window_percentage,
        panic_threshold_percentage=scaling.panic_threshold_percentage,
        max_scale_up_rate=scaling.max_scale_up_rate,
        max_scale_down_rate=scaling.max_scale_down_rate,
        scale_to_zero_grace_period_s=scaling.scale_to_zero_grace_period_seconds,
        scale_to_zero_pod_retention_period_s=scaling.scale_to_zero_pod_retention_period_seconds,
        scale_down_delay_s=scaling.scale_down_delay_seconds,
        progress_deadline_s=PROGRESS_DEADLINE_S,
    )


def _join_indices(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices))
