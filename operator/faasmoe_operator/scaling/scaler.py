"""The autoscaler of one function: load and activations in, decisions out.

It holds the function's load history and state only; the caller passes the time and the number of
ready replicas and executes the decisions. Reported load should include the calls that a router
queues for a function at zero, so that a burst gets as many replicas as it needs.
"""

from __future__ import annotations

import math

from faasmoe_operator.scaling import activation, kpa
from faasmoe_operator.scaling.activation import Phase
from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingError, ScalingSettings
from faasmoe_operator.scaling.windows import LoadAverages, LoadWindows, NoData


class FunctionAutoscaler:
    """Decides the desired replicas of one function.

    Create it with `for_new_function` for a new deployment, or with `restored` for a function that
    the control plane finds when it starts.
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
        """Return the autoscaler of a function that has never run; it desires the initial scale."""
        desired = settings.clamp(settings.initial_scale)
        return cls(settings, desired=desired, ready=0, initialized=desired == 0, now=now)

    @classmethod
    def restored(
        cls, settings: ScalingSettings, *, replicas: int, ready: int, now: float
    ) -> FunctionAutoscaler:
        """Return the autoscaler of a function with `replicas` assigned, `ready` of them ready."""
        return cls(settings, desired=replicas, ready=ready, initialized=True, now=now)

    @property
    def settings(self) -> ScalingSettings:
        """The current settings."""
        return self._settings

    @property
    def desired(self) -> int:
        """The replicas of the last decision."""
        return self._desired

    @property
    def phase(self) -> Phase:
        """The activation phase."""
        return self._activation.phase

    @property
    def is_panicking(self) -> bool:
        """Whether the function is in panic and only scales up."""
        return self._kpa.is_panicking

    def load(self, now: float) -> LoadAverages | NoData:
        """Return the load averages that a decision at `now` would use."""
        return self._windows.load(now)

    def observe(self, now: float, concurrency: float) -> None:
        """Record load for the second of `now`; values of the same second are summed.

        A load of 0 of a function at zero is not recorded: Knative has nothing to scrape then, and
        a burst after a long idle time must not be averaged over the time before it.

        Args:
            now: current time in seconds.
            concurrency: average calls in flight, queued ones included.

        Raises:
            ScalingError: the concurrency is negative or not finite.
        """
        if not math.isfinite(concurrency) or concurrency < 0:
            raise ScalingError("concurrency", value=concurrency, expected="a number of 0 or more")
        if concurrency > 0 or self.phase is not Phase.INACTIVE:
            self._windows.record(now, concurrency)

    def backfill(self, seconds: range, concurrency: float) -> None:
        """Record the same load for each of these seconds, as `observe` does for one."""
        if concurrency > 0 or self.phase is not Phase.INACTIVE:
            window_seconds = math.ceil(self._settings.window_s)
            for second in seconds[-window_seconds:]:
                self.observe(second, concurrency)

    def is_idle(self, now: float, *, ready: int) -> bool:
        """Return whether all later decisions equal the last one.

        This holds until there is load, an activation or another number of ready replicas.
        """
        if not self._is_initialized or self._desired != self._settings.clamp(0):
            return False
        if self._desired == 0:
            return self.phase is Phase.INACTIVE
        is_steady = self.phase is Phase.ACTIVE and ready == self._desired
        return is_steady and not self.is_panicking and self.load(now) == LoadAverages(0.0, 0.0)

    def activate(self, now: float) -> Decision:
        """Scale up from zero to the activation scale; a function above zero keeps its replicas."""
        self._activation = activation.activate(self._activation, now=now)
        if self._desired > 0:
            return Decision(self._desired, Reason.ALREADY_ACTIVE)
        self._desired = self._settings.clamp(self._settings.activation_scale)
        return Decision(self._desired, Reason.ACTIVATED)

    def decide(self, now: float, *, ready: int) -> Decision:
        """Decide the desired replicas.

        Args:
            now: current time in seconds.
            ready: number of ready replicas.
        """
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
        """Replace the settings and keep the load history."""
        self._settings = settings
        self._windows.resize(stable_s=settings.window_s, panic_s=settings.panic_window_s)

    def _apply_initial_scale(self, kpa_decision: Decision, *, ready: int, now: float) -> Decision:
        """Raise a decision to the initial scale until that was ready once or has timed out."""
        initial = self._settings.clamp(self._settings.initial_scale)
        timed_out = self._activation.elapsed_s(now) >= self._settings.progress_deadline_s
        self._is_initialized |= ready >= initial or timed_out
        if self._is_initialized:
            return kpa_decision
        return kpa_decision.overridden_by(max(initial, kpa_decision.desired), Reason.INITIAL_SCALE)
