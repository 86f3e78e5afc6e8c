"""The autoscaler of one function: Knative's KPA as pure functions of load and time.

`settings` holds its configuration, `windows` the load averages, `kpa` the decision above zero,
`activation` the transitions to and from zero, and `scaler` composes them for one function. Nothing
here reads a clock, logs or does I/O: the time is an argument, in seconds of any monotonic clock.
"""

from faasmoe_operator.scaling.activation import Phase
from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.scaler import FunctionAutoscaler
from faasmoe_operator.scaling.settings import ScalingError, ScalingSettings

__all__ = ["Decision", "FunctionAutoscaler", "Phase", "Reason", "ScalingError", "ScalingSettings"]
