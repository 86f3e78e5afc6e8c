"""The autoscalers of all functions: activations and load in, desired replicas out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.scaling import Decision, FunctionAutoscaler, Phase, Reason
from faasmoe_operator.scaling.windows import NoData


@dataclass(frozen=True, slots=True)
class ObservedReplicas:
    """Replicas of a function that a control process found when it started.

    Attributes:
        assigned: number of replicas in any state.
        ready: number of replicas that can be called.
    """

    assigned: int = 0
    ready: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaChange:
    """A decision that changed a function's desired replicas.

    Attributes:
        function: the function's id.
        previous: desired replicas before the decision.
        decision: desired replicas from now on and the reason.
    """

    function: str
    previous: int
    decision: Decision


class FunctionAutoscalers:
    """One autoscaler for each function.

    Args:
        functions: every function of the model.
        observed: replicas found at startup, by function; None for a new deployment, which starts
            with its initial scale.
        now: current time in seconds.
    """

    def __init__(
        self,
        functions: Sequence[ManagedFunction],
        *,
        observed: Mapping[str, ObservedReplicas] | None,
        now: float,
    ) -> None:
        self._autoscalers = {f.id: _make_autoscaler(f, observed, now=now) for f in functions}
        self._last_observed_second = math.floor(now) - 1  # the last second whose load was recorded

    def desired(self, function: str) -> int:
        """Return the replicas of the last decision."""
        return self._autoscalers[function].desired

    def phase(self, function: str) -> Phase:
        """Return the function's activation phase."""
        return self._autoscalers[function].phase

    def concurrency(self, function: str, *, now: float) -> float | None:
        """Return the average calls in flight over the stable window; None without reports."""
        load = self._autoscalers[function].load(now)
        return None if isinstance(load, NoData) else load.stable

    def activate(self, functions: Iterable[str], *, now: float) -> list[ReplicaChange]:
        """Activate functions; return the changes of those that were at zero."""
        changes = []
        for function in dict.fromkeys(functions):
            decision = self._autoscalers[function].activate(now)
            if decision.reason is Reason.ACTIVATED:
                changes.append(ReplicaChange(function, 0, decision))
        return changes

    def release(self, functions: Iterable[str], *, now: float) -> None:
        """Desire none of these functions before their idle time is over, as others need memory."""
        for function in functions:
            settings = self._autoscalers[function].settings
            self._autoscalers[function] = FunctionAutoscaler.restored(
                settings, replicas=0, ready=0, now=now
            )

    def observe(self, loads: Mapping[str, float] | None, *, now: float) -> None:
        """Record the current second's load of all functions; at most once for each second.

        Args:
            loads: calls in flight by function; None if the load is unknown.
            now: current time in seconds.
        """
        second = math.floor(now)
        if loads is None or second <= self._last_observed_second:
            return
        for function, autoscaler in self._autoscalers.items():
            autoscaler.observe(now, loads.get(function, 0.0))
        self._last_observed_second = second

    def has_unobserved_seconds(self, now: float) -> bool:
        """Return whether the load of a past second was not recorded."""
        return self._last_observed_second + 1 < math.floor(now)

    def backfill(self, loads: Mapping[str, float] | None, *, now: float) -> None:
        """Record these loads for all past seconds whose load was not recorded.

        The windows would count such seconds as idle, and the autoscalers would remove replicas.
        """
        seconds = range(self._last_observed_second + 1, math.floor(now))
        self._last_observed_second = max(self._last_observed_second, math.floor(now) - 1)
        if loads is not None:
            for function, autoscaler in self._autoscalers.items():
                autoscaler.backfill(seconds, loads.get(function, 0.0))

    def is_idle(self, ready: Mapping[str, int], *, now: float) -> bool:
        """Return whether no decision changes without load, an activation or a lost replica.

        Args:
            ready: ready replicas by function.
            now: current time in seconds.
        """
        return all(
            autoscaler.is_idle(now, ready=ready.get(function, 0))
            for function, autoscaler in self._autoscalers.items()
        )

    def decide(self, ready: Mapping[str, int], *, now: float) -> list[ReplicaChange]:
        """Decide for every function; return the changes.

        Args:
            ready: ready replicas by function.
            now: current time in seconds.
        """
        changes = []
        for function, autoscaler in self._autoscalers.items():
            previous = autoscaler.desired
            decision = autoscaler.decide(now, ready=ready.get(function, 0))
            if decision.desired != previous:
                changes.append(ReplicaChange(function, previous, decision))
        return changes


def _make_autoscaler(
    function: ManagedFunction, observed: Mapping[str, ObservedReplicas] | None, *, now: float
) -> FunctionAutoscaler:
    if observed is None:
        return FunctionAutoscaler.for_new_function(function.scaling, now=now)
    replicas = observed.get(function.id, ObservedReplicas())
    return FunctionAutoscaler.restored(
        function.scaling, replicas=replicas.assigned, ready=replicas.ready, now=now
    )
