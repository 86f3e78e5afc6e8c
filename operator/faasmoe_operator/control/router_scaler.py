"""How many routers of a model run, by its requests: functions' autoscaler for routers. Pure."""

from __future__ import annotations

import math

from faasmoe_operator.api.v1alpha1.router import RouterScalingSpec
from faasmoe_operator.scaling import FunctionAutoscaler, ScalingSettings


class RouterScaler:
    """Decides how many routers of a model run; time is an argument, in seconds.

    Args:
        spec: how many there may be; None for always one.
        max_num_seqs: requests in one batch of a router, at which it aims by default.
        now: current time.
        replicas: how many run already; None if none has run yet.
    """

    def __init__(
        self,
        spec: RouterScalingSpec | None,
        max_num_seqs: int,
        now: float,
        *,
        replicas: int | None = None,
    ) -> None:
        spec = spec or RouterScalingSpec.model_validate({"minReplicas": 1})
        self._settings = ScalingSettings(
            min_scale=spec.min_replicas,
            max_scale=spec.max_replicas,
            target=float(spec.target_concurrency or max_num_seqs),
            target_utilization_percentage=100.0,
            window_s=float(spec.idle_seconds),
            scale_to_zero_grace_period_s=0.0,
        )
        # One is started at first in any case, to find what is wrong with it.
        first = max(1, spec.min_replicas) if replicas is None else replicas
        self._restart(min(spec.max_replicas, max(spec.min_replicas, first)), now)
        self._n_requests = 0

    @property
    def desired(self) -> int:
        """How many routers should run."""
        return self._scaler.desired

    @property
    def min_replicas(self) -> int:
        """How many routers always run."""
        return self._settings.min_scale

    def set_demand(self, n_requests: int, now: float) -> None:
        """Take the number of requests that wait or run; the first one starts a router."""
        self._n_requests = n_requests
        if n_requests and not self.desired:
            self._scaler.activate(now)

    def tick(self, now: float, *, n_ready: int) -> None:
        """Decide anew; to be called once a second."""
        self._scaler.observe(math.floor(now), float(self._n_requests))
        self._scaler.decide(now, ready=n_ready)

    def end(self, now: float) -> None:
        """Desire none before the idle time is over, as others need the memory."""
        if not self.min_replicas and not self._n_requests:
            self._restart(0, now)

    def _restart(self, replicas: int, now: float) -> None:
        self._scaler = FunctionAutoscaler.restored(
            self._settings, replicas=replicas, ready=replicas, now=now
        )
