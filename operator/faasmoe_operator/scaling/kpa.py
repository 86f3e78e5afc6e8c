"""Knative's pod autoscaler for one function, above zero: load, ready replicas, time → replicas.

In this order: the wish of each window (load over target, within the rates, lifted to the activation
scale), panic (a load of twice the capacity in the short window: up at once, never down until a
stable window has passed without another), the scale-down delay, the bounds. The way to zero and
back is `activation`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingSettings
from faasmoe_operator.scaling.windows import LoadAverages, NoData


@dataclass(frozen=True, slots=True)
class ScalingObservation:
    """What is known when a decision is due.

    Attributes:
        load: the averages of both windows, or NoData.
        ready: replicas that can be called.
        desired: replicas that were decided last.
    """

    load: LoadAverages | NoData
    ready: int
    desired: int


@dataclass(frozen=True, slots=True)
class KpaState:
    """What one decision leaves for the next.

    Attributes:
        panic_since: when the load was last over the threshold; None when there is no panic.
        panic_replicas: the most replicas decided in this panic.
        wishes: (time, replicas) of the scale-down delay, only those that no later one exceeds.
    """

    panic_since: float | None = None
    panic_replicas: int = 0
    recommendations: tuple[tuple[float, int], ...] = ()

    @classmethod
    def restored(cls, replicas: int, *, now: float) -> KpaState:
        """Return the state after a restart: history is lost, so nothing is shed for a window."""
        return cls(panic_since=now, panic_replicas=replicas) if replicas > 1 else cls()

    @property
    def is_panicking(self) -> bool:
        """Whether replicas only go up."""
        return self.panic_since is not None


@dataclass(frozen=True, slots=True)
class _Recommendations:
    """What the windows ask for; `over` says whether the panic threshold is reached."""

    stable: Decision
    panic: Decision
    is_over_threshold: bool


def decide(
    settings: ScalingSettings, state: KpaState, *, observation: ScalingObservation, now: float
) -> tuple[Decision, KpaState]:
    """Return how many replicas the function should have at `now`, and the next state."""
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
    # 8.4 / 2.8 is 3.0000000000000004 in floats: noise must not buy a fourth replica.
    return math.ceil(round(calls / target_calls, 12))


def _apply_activation_scale(settings: ScalingSettings, replicas: int, *, ready: int) -> Decision:
    decision = _apply_rate_limits(settings, replicas, ready=ready)
    if replicas > 0 and settings.activation_scale > decision.desired:
        return Decision(settings.activation_scale, Reason.ACTIVATION_SCALE)
    return decision


def _apply_rate_limits(settings: ScalingSettings, replicas: int, *, ready: int) -> Decision:
    # Rounded up and down, so that a rate of 1.1 can still move one replica by one.
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
    retained = tuple(w for w in state.recommendations if w[0] > cutoff and w[1] > decision.desired)
    recommendations = (*retained, (now, decision.desired))
    return decision.overridden_by(recommendations[0][1], Reason.SCALE_DOWN_DELAY), replace(
        state, recommendations=recommendations
    )


def _apply_bounds(settings: ScalingSettings, decision: Decision) -> Decision:
    bounded = settings.clamp(decision.desired)
    is_below = bounded > decision.desired
    return decision.overridden_by(bounded, Reason.MIN_SCALE if is_below else Reason.MAX_SCALE)
