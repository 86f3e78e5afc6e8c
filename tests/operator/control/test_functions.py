from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.api.v1alpha1.experts import ScalingSpec
from faasmoe_operator.control.functions import managed_functions, scaling_settings
from faasmoe_operator.scaling import ScalingSettings


class Layer:
    index = 0
    num_experts = 8
    top_k = 2
    expert_bytes = 10
    shared_bytes = 3


def scaling(**values: Any) -> ScalingSpec:
    return ScalingSpec.model_validate(values)


def test_scaling_settings_include_every_field() -> None:
    values = {
        "minScale": 2,
        "maxScale": 9,
        "initialScale": 3,
        "activationScale": 4,
        "target": 5.5,
        "targetUtilizationPercentage": 60.0,
        "windowSeconds": 30.0,
        "panicWindowPercentage": 20.0,
        "panicThresholdPercentage": 300.0,
        "maxScaleUpRate": 10.0,
        "maxScaleDownRate": 3.0,
        "scaleToZeroGracePeriodSeconds": 7.0,
        "scaleToZeroPodRetentionPeriodSeconds": 8.0,
        "scaleDownDelaySeconds": 9.0,
    }
    assert scaling_settings(scaling(**values)) == ScalingSettings(
        min_scale=2,
        max_scale=9,
        initial_scale=3,
        activation_scale=4,
        target=5.5,
        target_utilization_percentage=60.0,
        window_s=30.0,
        panic_window_percentage=20.0,
        panic_threshold_percentage=300.0,
        max_scale_up_rate=10.0,
        max_scale_down_rate=3.0,
        scale_to_zero_grace_period_s=7.0,
        scale_to_zero_pod_retention_period_s=8.0,
        scale_down_delay_s=9.0,
    )


def test_scaling_settings_use_the_moemodels_defaults() -> None:
    settings = scaling_settings(scaling())
    assert (settings.initial_scale, settings.max_scale, settings.target) == (0, 8, 4)


def test_functions_have_their_sizes_and_overridden_settings() -> None:
    specs = [FunctionSpec("a", (0,), (0, 1, 2)), FunctionSpec("b", (0,), (3,))]
    functions = managed_functions(
        specs, [Layer()], scaling=scaling(overrides=[{"experts": "3", "minScale": 1}])
    )
    assert [function.size_bytes for function in functions] == [33, 13]
    assert [function.scaling.min_scale for function in functions] == [0, 1]


def test_stable_key_does_not_depend_on_the_id() -> None:
    one, other = (
        managed_functions([FunctionSpec(name, (0,), (0, 2))], [Layer()], scaling=scaling())[0]
        for name in ("a", "b")
    )
    assert one.stable_key == other.stable_key == "0:0,2"
    assert one.anti_affinity_key == "0"
