"""Knative's pod autoscaler for one function above zero.

`decide` applies these rules in order:

1. Each window recommends its load divided by the target, limited by the rates and at least the
   activation scale.
2. Panic: if the panic window asks for at least `panic_threshold` times the ready replicas, the
   function scales up immediately and never down until a stable window passes without another panic.
3. The scale-down delay: the highest recommendation of that period wins.
4. The minimum and maximum scale.

Scaling from and to zero is in `activation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingSettings
from faasmoe_operator.scaling.windows import LoadAverages, NoData


@dataclass(frozen=True, slots=True)
class ScalingObservation:
    """Input of a decision.

    Attributes:
        load: the averages of both windows, or NoData.
        ready: number of ready replicas.
        desired: replicas of the last decision.
    """

    load: LoadAverages | NoData
    ready: int
    desired: int


@dataclass(frozen=True, slots=True)
class KpaState:
    """State between two decisions.

    Attributes:
        panic_since: last time at which the load reached the panic threshold; None outside panic.
        panic_replicas: maximum of the replicas decided during this panic.
        recommendations: (time, replicas) within the scale-down delay, without those that a later
            one reaches or exceeds: replicas strictly decrease.
    """

    panic_since: float | None = None
    panic_replicas: int = 0
    recommendations: tuple[tuple[float, int], ...] = ()

    @classmethod
    def restored(cls, replicas: int, *, now: float) -> KpaState:
        """Return the state after a restart.

        It panics if there is more than one replica: as the load history is lost, nothing is scaled
        down for a stable window.
        """
        return cls(panic_since=now, panic_replicas=replicas) if replicas > 1 else cls()

    @property
    def is_panicking(self) -> bool:
        """Whether the function is in panic and only scales up."""
        return self.panic_since is not None


@dataclass(frozen=True, slots=True)
class _Recommendations:
    """Recommendations of both windows, and whether the panic threshold is reached."""

    stable: Decision
    panic: Decision
    is_over_threshold: bool


def decide(
    settings: ScalingSettings, state: KpaState, *, observation: ScalingObservation, now: float
) -> tuple[Decision, KpaState]:
    """Return the desired replicas at `now` and the next state.

    Args:
        settings: the function's settings.
        state: state of the last decision.
        observation: load and replicas.
        now: current time in seconds.
    """
    if isinstance(observation.load, NoData):
        return _apply_bounds(settings, Decision(observation.desired, Reason.NO_DATA)), state
    recommended = _recommend(settings, observation.load, ready=max(1, observation.ready))
    state = _update_panic(settings, state, is_over_threshold=recommended.is_over_threshold, now=now)
    decision, state = _apply_panic(state, recommended)
    decision, state = _apply_scale_down_delay(settings, state, decision=decision, now=now)
    return _apply_bounds(settings, decision), state


def _recommend(settings: ScalingSettings, load: LoadAverages, *, ready: int) -> _Recommendations:
    stable = _replicas_for(load.stable, target_calls=settings.target_concurrency)
    panic = _replicas_for(load.panic, target_calls=settings.target_concurrency)
    return _Recommendations(
        stable=_apply_activation_scale(settings, stable, ready=ready),
        panic=_apply_activation_scale(settings, panic, ready=ready),
        is_over_threshold=panic / ready >= settings.panic_threshold,
    )


def _replicas_for(calls: float, *, target_calls: float) -> int:
    # 8.4 / 2.8 is 3.0000000000000004: rounding errors must not add a fourth replica.
    return math.ceil(round(calls / target_calls, 12))


def _apply_activation_scale(settings: ScalingSettings, replicas: int, *, ready: int) -> Decision:
    decision = _apply_rate_limits(settings, replicas, ready=ready)
    if replicas > 0 and settings.activation_scale > decision.desired:
        return Decision(settings.activation_scale, Reason.ACTIVATION_SCALE)
    return decision


def _apply_rate_limits(settings: ScalingSettings, replicas: int, *, ready: int) -> Decision:
    # Rounded away from `ready`, so that even a rate of 1.1 can change one replica by one.
    maximum = math.ceil(settings.max_scale_up_rate * ready)
    minimum = math.floor(ready / settings.max_scale_down_rate)
    if replicas > maximum:
        return Decision(maximum, Reason.SCALE_UP_RATE)
    if replicas < minimum:
        return Decision(minimum, Reason.SCALE_DOWN_RATE)
    return Decision(replicas, Reason.STABLE)


def _update_panic(
    settings: ScalingSettings, state: KpaState, *, is_over_threshold: bool, now: float
) -> KpaState:
    if is_over_threshold:
        return replace(state, panic_since=now)
    if state.panic_since is not None and state.panic_since + settings.window_s < now:
        return replace(state, panic_since=None, panic_replicas=0)
    return state


def _apply_panic(state: KpaState, recommended: _Recommendations) -> tuple[Decision, KpaState]:
    if not state.is_panicking:
        return recommended.stable, state
    highest = recommended.stable.overridden_by(
        max(recommended.stable.desired, recommended.panic.desired), Reason.PANIC
    )
    panic_replicas = max(state.panic_replicas, highest.desired)
    return highest.overridden_by(panic_replicas, Reason.PANIC_HOLD), replace(
        state, panic_replicas=panic_replicas
    )


def _apply_scale_down_delay(
    settings: ScalingSettings, state: KpaState, *, decision: Decision, now: float
) -> tuple[Decision, KpaState]:
    if settings.scale_down_delay_s == 0:
        return decision, replace(state, recommendations=()) if state.recommendations else state
    cutoff = now - settings.scale_down_delay_s
    retained = tuple(r for r in state.recommendations if r[0] > cutoff and r[1] > decision.desired)
    recommendations = (*retained, (now, decision.desired))
    return decision.overridden_by(recommendations[0][1], Reason.SCALE_DOWN_DELAY), replace(
        state, recommendations=recommendations
    )


def _apply_bounds(settings: ScalingSettings, decision: Decision) -> Decision:
    bounded = settings.clamp(decision.desired)
    is_below = bounded > decision.desired
    return decision.overridden_by(bounded, Reason.MIN_SCALE if is_below else Reason.MAX_SCALE)
