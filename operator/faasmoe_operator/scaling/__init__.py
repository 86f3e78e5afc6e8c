"""The autoscaler, pure: how many replicas each function should have, given its load and the time.

Knative's KPA per function: `settings` (its knobs), `windows` (averages), `kpa` (the decision above
zero), `activation` (the way to and from zero), `scaler` (one function's composition of them all).
Nothing here reads a clock, logs or does I/O: the time is an argument, in seconds of any clock that
only goes forward.
"""

from faasmoe_operator.scaling.activation import Phase
from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.scaler import FunctionAutoscaler
from faasmoe_operator.scaling.settings import ScalingError, ScalingSettings

__all__ = ["Decision", "FunctionAutoscaler", "Phase", "Reason", "ScalingError", "ScalingSettings"]
