"""The autoscalers of all functions: wakes and loads go in, wanted replicas come out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.scaling import Decision, FunctionAutoscaler, Phase, Reason
from faasmoe_operator.scaling.windows import NoData


@dataclass(frozen=True, slots=True)
class ObservedReplicas:
    """Replicas of a function that a starting control found.

    Attributes:
        assigned: in whatever state.
        ready: those that serve.
    """

    assigned: int = 0
    ready: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaChange:
    """A decision that changed a function's wanted replicas.

    Attributes:
        function: its id.
        before: the replicas wanted until now.
        decision: what is wanted from now on.
    """

    function: str
    previous: int
    decision: Decision


class FunctionAutoscalers:
    """One autoscaler for each function.

    Args:
        functions: every function of the model.
        found: replicas that were found; None for a new deployment, which gets its initial scale.
        now: the time.
    """

    def __init__(
        self,
        functions: Sequence[ManagedFunction],
        *,
        observed: Mapping[str, ObservedReplicas] | None,
        now: float,
    ) -> None:
        self._autoscalers = {f.id: _make_autoscaler(f, observed, now=now) for f in functions}
        self._last_observed_second = math.floor(now) - 1  # the last second whose load is known here

    def desired(self, function: str) -> int:
        """Return the replicas that were decided last."""
        return self._autoscalers[function].desired

    def phase(self, function: str) -> Phase:
        """Return where the function is on its way to zero and back."""
        return self._autoscalers[function].phase

    def concurrency(self, function: str, *, now: float) -> float | None:
        """Return the stable average of the calls in flight; None if nobody reported."""
        load = self._autoscalers[function].load(now)
        return None if isinstance(load, NoData) else load.stable

    def activate(self, functions: Iterable[str], *, now: float) -> list[ReplicaChange]:
        """Take a wake; return the functions that it brings up from zero."""
        changes = []
        for function in dict.fromkeys(functions):
            decision = self._autoscalers[function].activate(now)
            if decision.reason is Reason.ACTIVATED:
                changes.append(ReplicaChange(function, 0, decision))
        return changes

    def observe(self, loads: Mapping[str, float] | None, *, now: float) -> None:
        """Take a second's load of all functions, once a second; None when nothing is known."""
        second = math.floor(now)
        if loads is None or second <= self._last_observed_second:
            return
        for function, scaler in self._autoscalers.items():
            scaler.observe(now, loads.get(function, 0.0))
        self._last_observed_second = second

    def has_unobserved_seconds(self, now: float) -> bool:
        """Return whether nobody has told of a second that is over."""
        return self._last_observed_second + 1 < math.floor(now)

    def backfill(self, loads: Mapping[str, float] | None, *, now: float) -> None:
        """Take that these were the loads of all seconds that are over and that nobody told of.

        Windows would take such a second for one without load, and replicas would go.
        """
        seconds = range(self._last_observed_second + 1, math.floor(now))
        self._last_observed_second = max(self._last_observed_second, math.floor(now) - 1)
        if loads is not None:
            for function, scaler in self._autoscalers.items():
                scaler.backfill(seconds, loads.get(function, 0.0))

    def is_idle(self, ready: Mapping[str, int], *, now: float) -> bool:
        """Return whether no decision changes anything until there is load, a wake or a loss.

        Args:
            ready: replicas of each function that serve.
            now: the time.
        """
        return all(
            scaler.is_idle(now, ready=ready.get(function, 0))
            for function, scaler in self._autoscalers.items()
        )

    def decide(self, ready: Mapping[str, int], *, now: float) -> list[ReplicaChange]:
        """Decide for every function; return what changed.

        Args:
            ready: replicas of each function that serve.
            now: the time.
        """
        changes = []
        for function, scaler in self._autoscalers.items():
            before = scaler.desired
            decision = scaler.decide(now, ready=ready.get(function, 0))
            if decision.desired != before:
                changes.append(ReplicaChange(function, before, decision))
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
