"""Settings of one function's autoscaler, with Knative's names, defaults and bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from faasmoe_operator.errors import FaasmoeError

WINDOW_MIN_S = 6
PERIOD_MAX_S = 3600
TARGET_MIN = 0.01


class ScalingError(FaasmoeError):
    """A scaling setting or a reported load is invalid.

    Attributes:
        field: name of the setting.
    """

    def __init__(self, field: str, *, value: object, expected: str) -> None:
        super().__init__(f"{field}: got {value!r}, expected {expected}")
        self.field = field


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The range of a setting; `is_exclusive` excludes the minimum itself."""

    minimum: float
    maximum: float = math.inf
    is_integer: bool = False
    is_exclusive: bool = False

    def contains(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(
            value, int if self.is_integer else (int, float)
        ):
            return False
        is_above = value > self.minimum if self.is_exclusive else value >= self.minimum
        return is_above and value <= self.maximum and math.isfinite(value)

    def __str__(self) -> str:
        kind = "an integer" if self.is_integer else "a number"
        upper = "" if math.isinf(self.maximum) else f" and at most {self.maximum:g}"
        return f"{kind} {'above' if self.is_exclusive else 'of at least'} {self.minimum:g}{upper}"


_BOUNDS = {
    "min_scale": _Bounds(0, is_integer=True),
    "max_scale": _Bounds(0, is_integer=True),
    "initial_scale": _Bounds(0, is_integer=True),
    "activation_scale": _Bounds(1, is_integer=True),
    "target": _Bounds(TARGET_MIN),
    "target_utilization_percentage": _Bounds(1, 100),
    "window_s": _Bounds(WINDOW_MIN_S, PERIOD_MAX_S),
    "panic_window_percentage": _Bounds(1, 100),
    "panic_threshold_percentage": _Bounds(110, 1000),
    "max_scale_up_rate": _Bounds(1, is_exclusive=True),
    "max_scale_down_rate": _Bounds(1, is_exclusive=True),
    "scale_to_zero_grace_period_s": _Bounds(0, PERIOD_MAX_S),
    "scale_to_zero_pod_retention_period_s": _Bounds(0, PERIOD_MAX_S),
    "scale_down_delay_s": _Bounds(0, PERIOD_MAX_S),
    "progress_deadline_s": _Bounds(0, is_exclusive=True),
}


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """Settings of one function's autoscaler; raises ScalingError if one is out of bounds.

    Attributes:
        min_scale: minimum number of replicas.
        max_scale: maximum number of replicas; 0 for no limit.
        initial_scale: replicas of a new deployment, until they have been ready once.
        activation_scale: minimum number of replicas above zero; 1 has no effect.
        target: maximum calls in flight of one replica.
        target_utilization_percentage: percentage of the target to aim at.
        window_s: length of the stable window in seconds.
        panic_window_percentage: length of the panic window as a percentage of the stable window;
            it must be at least 1 s.
        panic_threshold_percentage: panic begins when the panic window's load needs this percentage
            of the ready replicas.
        max_scale_up_rate: maximum factor by which one decision multiplies the ready replicas.
        max_scale_down_rate: maximum factor by which one decision divides the ready replicas.
        scale_to_zero_grace_period_s: how long the last replica stays after a stable window without
            load.
        scale_to_zero_pod_retention_period_s: the same; the longer of the two applies.
        scale_down_delay_s: how long a lower recommendation must last before it is applied.
        enable_scale_to_zero: whether the last replica of an idle function is removed.
        progress_deadline_s: how long a function may be activating while no request waits for it.
    """

    min_scale: int = 0
    max_scale: int = 0
    initial_scale: int = 1
    activation_scale: int = 1
    target: float = 100.0
    target_utilization_percentage: float = 70.0
    window_s: float = 60.0
    panic_window_percentage: float = 10.0
    panic_threshold_percentage: float = 200.0
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    scale_to_zero_grace_period_s: float = 30.0
    scale_to_zero_pod_retention_period_s: float = 0.0
    scale_down_delay_s: float = 0.0
    enable_scale_to_zero: bool = True
    progress_deadline_s: float = 600.0

    def __post_init__(self) -> None:
        """Validate each setting and their combinations."""
        for field, bounds in _BOUNDS.items():
            value = getattr(self, field)
            if not bounds.contains(value):
                raise ScalingError(field, value=value, expected=str(bounds))
        if not isinstance(self.enable_scale_to_zero, bool):
            raise ScalingError(
                "enable_scale_to_zero", value=self.enable_scale_to_zero, expected="True or False"
            )
        self._check_scales()
        self._check_panic_window()

    @property
    def target_concurrency(self) -> float:
        """Calls in flight to aim at for one replica."""
        return max(TARGET_MIN, self.target * self.target_utilization_percentage / 100)

    @property
    def panic_window_s(self) -> float:
        """Length of the panic window in seconds."""
        return self.window_s * self.panic_window_percentage / 100

    @property
    def panic_threshold(self) -> float:
        """Ratio of needed to ready replicas at which panic begins."""
        return self.panic_threshold_percentage / 100

    @property
    def last_replica_retention_s(self) -> float:
        """How long the last replica stays after a stable window without load."""
        return max(self.scale_to_zero_grace_period_s, self.scale_to_zero_pod_retention_period_s)

    def clamp(self, replicas: int) -> int:
        """Return the number of replicas, limited to the range from `min_scale` to `max_scale`."""
        limited = min(replicas, self.max_scale) if self.max_scale else replicas
        return max(limited, self.min_scale)

    def _check_scales(self) -> None:
        for field in ("min_scale", "initial_scale", "activation_scale"):
            value = getattr(self, field)
            if self.max_scale and value > self.max_scale:
                limit = f"at most max_scale ({self.max_scale})"
                raise ScalingError(field, value=value, expected=limit)

    def _check_panic_window(self) -> None:
        if self.panic_window_s < 1:
            raise ScalingError(
                "panic_window_percentage",
                value=self.panic_window_percentage,
                expected=f"a panic window of at least 1 s (it is {self.panic_window_s:g} s)",
            )
