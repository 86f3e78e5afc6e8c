from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.scaling.settings import ScalingError, ScalingSettings


def test_defaults_equal_knatives() -> None:
    settings = ScalingSettings()
    assert (settings.min_scale, settings.max_scale, settings.initial_scale) == (0, 0, 1)
    assert (settings.target, settings.target_utilization_percentage) == (100, 70)
    assert (settings.window_s, settings.panic_window_percentage) == (60, 10)
    assert settings.panic_threshold_percentage == 200
    assert (settings.max_scale_up_rate, settings.max_scale_down_rate) == (1000, 2)
    assert settings.scale_to_zero_grace_period_s == 30
    assert settings.scale_to_zero_pod_retention_period_s == 0
    assert settings.scale_down_delay_s == 0
    assert settings.enable_scale_to_zero
    assert settings.activation_scale == 1


def test_derived_values() -> None:
    settings = ScalingSettings(target=4, scale_to_zero_pod_retention_period_s=45)
    assert settings.target_concurrency == pytest.approx(2.8)  # 4 * 70 %
    assert settings.panic_window_s == 6  # 60 s * 10 %
    assert settings.panic_threshold == 2
    assert settings.last_replica_retention_s == 45  # the longer of 30 and 45


def test_target_concurrency_is_at_least_knatives_minimum() -> None:
    assert ScalingSettings(target=0.01, target_utilization_percentage=1).target_concurrency == 0.01


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        pytest.param(0, 2, id="below"),
        pytest.param(3, 3, id="within"),
        pytest.param(9, 5, id="above"),
    ],
)
def test_clamp(replicas: int, expected: int) -> None:
    assert ScalingSettings(min_scale=2, max_scale=5).clamp(replicas) == expected


def test_max_scale_of_zero_is_no_limit() -> None:
    assert ScalingSettings(max_scale=0).clamp(10**6) == 10**6


INVALID: list[tuple[str, Any, str]] = [
    ("min_scale", -1, "at least 0"),
    ("min_scale", 1.5, "an integer"),
    ("min_scale", True, "an integer"),
    ("max_scale", -1, "at least 0"),
    ("initial_scale", -1, "at least 0"),
    ("activation_scale", 0, "at least 1"),
    ("target", 0, "at least 0.01"),
    ("target", math.nan, "at least 0.01"),
    ("target", math.inf, "at least 0.01"),
    ("target", "4", "a number"),
    ("target_utilization_percentage", 0.5, "at least 1 and at most 100"),
    ("target_utilization_percentage", 101, "at most 100"),
    ("window_s", 5.9, "at least 6 and at most 3600"),
    ("window_s", 3601, "at most 3600"),
    ("panic_window_percentage", 0, "at least 1"),
    ("panic_window_percentage", 101, "at most 100"),
    ("panic_window_percentage", 1, "a panic window of at least 1 s (it is 0.6 s)"),
    ("panic_threshold_percentage", 109, "at least 110"),
    ("panic_threshold_percentage", 1001, "at most 1000"),
    ("max_scale_up_rate", 1, "above 1"),
    ("max_scale_down_rate", 1, "above 1"),
    ("scale_to_zero_grace_period_s", -1, "at least 0"),
    ("scale_to_zero_pod_retention_period_s", 3601, "at most 3600"),
    ("scale_down_delay_s", -0.1, "at least 0"),
    ("enable_scale_to_zero", 1, "True or False"),
    ("progress_deadline_s", 0, "above 0"),
]


@pytest.mark.parametrize(("field", "value", "expected"), INVALID)
def test_rejects_values_out_of_bounds_and_names_the_field(
    field: str, value: Any, expected: str
) -> None:
    with pytest.raises(ScalingError) as caught:
        replace(ScalingSettings(), **{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: got {value!r}, expected ")
    assert expected in str(caught.value)
    assert isinstance(caught.value, FaasmoeError)


@pytest.mark.parametrize("field", ["min_scale", "initial_scale", "activation_scale"])
def test_rejects_scales_above_max_scale(field: str) -> None:
    scales: dict[str, Any] = {"max_scale": 3, field: 4}
    with pytest.raises(ScalingError, match=rf"{field}: got 4, expected at most max_scale \(3\)"):
        ScalingSettings(**scales)
