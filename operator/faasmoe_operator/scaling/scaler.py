"""One function's autoscaler: load reports and wakes go in, decisions come out.

It holds the function's history and nothing else; the caller brings the time, counts the ready
replicas and carries the decisions out. Reports should count the calls that a router holds for a
function at zero as calls in flight, so that a burst is answered with as many replicas as it needs.
"""

from __future__ import annotations

import math

from faasmoe_operator.scaling import activation, kpa
from faasmoe_operator.scaling.activation import Phase
from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingError, ScalingSettings
from faasmoe_operator.scaling.windows import LoadAverages, LoadWindows, NoData


class FunctionAutoscaler:
    """Decides the replicas of one function.

    Made by `fresh` for a function of a new deployment, by `restored` for one that a control plane
    finds when it starts.
    """

    def __init__(
        self, settings: ScalingSettings, *, desired: int, ready: int, initialized: bool, now: float
    ) -> None:
        self._settings = settings
        self._desired = desired
        self._is_initialized = initialized
        self._windows = LoadWindows(stable_s=settings.window_s, panic_s=settings.panic_window_s)
        self._kpa = kpa.KpaState.restored(desired if initialized else 0, now=now)
        self._activation = activation.initial_activation(replicas=desired, ready=ready, now=now)

    @classmethod
    def for_new_function(cls, settings: ScalingSettings, *, now: float) -> FunctionAutoscaler:
        """Return the scaler of a function that has never run: its initial scale is wanted."""
        desired = settings.clamp(settings.initial_scale)
        return cls(settings, desired=desired, ready=0, initialized=desired == 0, now=now)

    @classmethod
    def restored(
        cls, settings: ScalingSettings, *, replicas: int, ready: int, now: float
    ) -> FunctionAutoscaler:
        """Return the scaler of a function found with `replicas` assigned, `ready` of them ready."""
        return cls(settings, desired=replicas, ready=ready, initialized=True, now=now)

    @property
    def settings(self) -> ScalingSettings:
        """The settings in force."""
        return self._settings

    @property
    def desired(self) -> int:
        """The replicas decided last."""
        return self._desired

    @property
    def phase(self) -> Phase:
        """Where the function is on its way to zero and back."""
        return self._activation.phase

    @property
    def is_panicking(self) -> bool:
        """Whether replicas only go up."""
        return self._kpa.is_panicking

    def load(self, now: float) -> LoadAverages | NoData:
        """Return the load as the next decision would see it."""
        return self._windows.load(now)

    def observe(self, now: float, concurrency: float) -> None:
        """Take one router's report: the average calls in flight, and held, in the second of `now`.

        A report of 0 for a function at zero is not recorded: Knative has nothing to scrape then,
        and a burst after a long idle time must not be averaged over the silence before it.
        """
        if not math.isfinite(concurrency) or concurrency < 0:
            raise ScalingError("concurrency", value=concurrency, expected="a number of 0 or more")
        if concurrency > 0 or self.phase is not Phase.INACTIVE:
            self._windows.record(now, concurrency)

    def backfill(self, seconds: range, concurrency: float) -> None:
        """Take a load that was the same in each of these seconds, as `observe` takes one."""
        if concurrency > 0 or self.phase is not Phase.INACTIVE:
            longest = math.ceil(self._settings.window_s)
            for second in seconds[-longest:]:
                self.observe(second, concurrency)

    def is_idle(self, now: float, *, ready: int) -> bool:
        """Return whether every later decision is the last one.

        That is: until there is load, a wake, or another number of ready replicas.
        """
        if not self._is_initialized or self._desired != self._settings.clamp(0):
            return False
        if self._desired == 0:
            return self.phase is Phase.INACTIVE
        is_steady = self.phase is Phase.ACTIVE and ready == self._desired
        return is_steady and not self.is_panicking and self.load(now) == LoadAverages(0.0, 0.0)

    def activate(self, now: float) -> Decision:
        """Take a wake: a function at zero is to start at once, any other stays as it is."""
        self._activation = activation.activate(self._activation, now=now)
        if self._desired > 0:
            return Decision(self._desired, Reason.ALREADY_ACTIVE)
        self._desired = self._settings.clamp(self._settings.activation_scale)
        return Decision(self._desired, Reason.ACTIVATED)

    def decide(self, now: float, *, ready: int) -> Decision:
        """Return how many replicas the function should have, with `ready` that can be called."""
        self._activation = activation.observe_ready(self._activation, ready=ready, now=now)
        observation = kpa.ScalingObservation(self.load(now), ready=ready, desired=self._desired)
        kpa_decision, self._kpa = kpa.decide(
            self._settings, self._kpa, observation=observation, now=now
        )
        kpa_decision = self._apply_initial_scale(kpa_decision, ready=ready, now=now)
        decision, self._activation = activation.apply_scale_to_zero(
            self._settings,
            self._activation,
            kpa_decision=kpa_decision,
            last_desired=self._desired,
            now=now,
        )
        self._desired = decision.desired
        return decision

    def reconfigure(self, settings: ScalingSettings) -> None:
        """Take other settings; the history is kept."""
        self._settings = settings
        self._windows.resize(stable_s=settings.window_s, panic_s=settings.panic_window_s)

    def _apply_initial_scale(self, kpa_decision: Decision, *, ready: int, now: float) -> Decision:
        """Lift the wish to the initial scale until that was ready once, or the deadline passed."""
        initial = self._settings.clamp(self._settings.initial_scale)
        timed_out = self._activation.elapsed_s(now) >= self._settings.progress_deadline_s
        self._is_initialized |= ready >= initial or timed_out
        if self._is_initialized:
            return kpa_decision
        return kpa_decision.overridden_by(max(initial, kpa_decision.desired), Reason.INITIAL_SCALE)
