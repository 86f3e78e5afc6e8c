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
from faasmoe_operator.scaling.windows import Load, NoData


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known when a decision is due.

    Attributes:
        load: the averages of both windows, or NoData.
        ready: replicas that can be called.
        desired: replicas that were decided last.
    """

    load: Load | NoData
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
    wishes: tuple[tuple[float, int], ...] = ()

    @classmethod
    def restored(cls, replicas: int, *, now: float) -> KpaState:
        """Return the state after a restart: history is lost, so nothing is shed for a window."""
        return cls(panic_since=now, panic_replicas=replicas) if replicas > 1 else cls()

    @property
    def in_panic(self) -> bool:
        """Whether replicas only go up."""
        return self.panic_since is not None


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What the windows ask for; `over` says whether the panic threshold is reached."""

    stable: Decision
    panic: Decision
    over: bool


def decide(
    settings: ScalingSettings, state: KpaState, *, observation: Observation, now: float
) -> tuple[Decision, KpaState]:
    """Return how many replicas the function should have at `now`, and the next state."""
    if isinstance(observation.load, NoData):
        return _bounded(settings, Decision(observation.desired, Reason.NO_DATA)), state
    wishes = _wishes(settings, observation.load, ready=max(1, observation.ready))
    state = _panicking(settings, state, over=wishes.over, now=now)
    decision, state = _through_panic(state, wishes)
    decision, state = _delayed(settings, state, decision=decision, now=now)
    return _bounded(settings, decision), state


def _wishes(settings: ScalingSettings, load: Load, *, ready: int) -> _Wishes:
    stable = _replicas(load.stable, target_calls=settings.target_calls)
    panic = _replicas(load.panic, target_calls=settings.target_calls)
    return _Wishes(
        stable=_activated(settings, stable, ready=ready),
        panic=_activated(settings, panic, ready=ready),
        over=panic / ready >= settings.panic_threshold,
    )


def _replicas(calls: float, *, target_calls: float) -> int:
    # 8.4 / 2.8 is 3.0000000000000004 in floats: noise must not buy a fourth replica.
    return math.ceil(round(calls / target_calls, 12))


def _activated(settings: ScalingSettings, wanted: int, *, ready: int) -> Decision:
    decision = _rated(settings, wanted, ready=ready)
    if wanted > 0 and settings.activation_scale > decision.desired:
        return Decision(settings.activation_scale, Reason.ACTIVATION_SCALE)
    return decision


def _rated(settings: ScalingSettings, wanted: int, *, ready: int) -> Decision:
    # Rounded up and down, so that a rate of 1.1 can still move one replica by one.
    most = math.ceil(settings.max_scale_up_rate * ready)
    least = math.floor(ready / settings.max_scale_down_rate)
    if wanted > most:
        return Decision(most, Reason.SCALE_UP_RATE)
    if wanted < least:
        return Decision(least, Reason.SCALE_DOWN_RATE)
    return Decision(wanted, Reason.STABLE)


def _panicking(settings: ScalingSettings, state: KpaState, *, over: bool, now: float) -> KpaState:
    if over:
        return replace(state, panic_since=now)
    if state.panic_since is not None and state.panic_since + settings.window_s < now:
        return replace(state, panic_since=None, panic_replicas=0)
    return state


def _through_panic(state: KpaState, wishes: _Wishes) -> tuple[Decision, KpaState]:
    if not state.in_panic:
        return wishes.stable, state
    wish = wishes.stable.but(max(wishes.stable.desired, wishes.panic.desired), Reason.PANIC)
    most = max(state.panic_replicas, wish.desired)
    return wish.but(most, Reason.PANIC_HOLD), replace(state, panic_replicas=most)


def _delayed(
    settings: ScalingSettings, state: KpaState, *, decision: Decision, now: float
) -> tuple[Decision, KpaState]:
    if settings.scale_down_delay_s == 0:
        return decision, replace(state, wishes=()) if state.wishes else state
    fresh = now - settings.scale_down_delay_s
    kept = tuple(w for w in state.wishes if w[0] > fresh and w[1] > decision.desired)
    wishes = (*kept, (now, decision.desired))
    return decision.but(wishes[0][1], Reason.SCALE_DOWN_DELAY), replace(state, wishes=wishes)


def _bounded(settings: ScalingSettings, decision: Decision) -> Decision:
    bounded = settings.bounded(decision.desired)
    below = bounded > decision.desired
    return decision.but(bounded, Reason.MIN_SCALE if below else Reason.MAX_SCALE)
