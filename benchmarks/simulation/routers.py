"""The engines that requests go to: admission, activation and Knative's autoscaler around them.

One pool is the routers of FaaSMoE, or the replicas of a whole model. Limits are the real
`RateLimiters`, the number of replicas is decided by the real `FunctionAutoscaler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.simulation.engine import Engine, EngineHooks, ServedRequest
from benchmarks.simulation.events import Event, EventLoop, Integral
from benchmarks.simulation.fleet import LOSS_DETECTED_S, FunctionFleet
from benchmarks.simulation.nodes import Nodes, Pod

from faasmoe_operator.scaling import FunctionAutoscaler, ScalingSettings
from faasmoe_router.control.activator import ActivationQueueLimits
from faasmoe_router.errors import RateLimitExceeded, RequestTooLarge, TenantQueueFull
from faasmoe_router.tenants.quota import RateLimiters
from faasmoe_router.tenants.registry import TenantLimitsConfig


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Replicas of one kind.

    Attributes:
        scaling: the autoscaler's settings; equal bounds keep a fixed number.
        memory_bytes: memory of one replica, over all its nodes.
        n_nodes: nodes that one replica spans.
        start_s: from placing a replica until it is ready.
        activation: bounds of the queue in front of replicas and functions at zero.
        limits: the tenants' limits, by tenant.
    """

    scaling: ScalingSettings
    memory_bytes: int
    n_nodes: int
    start_s: float
    activation: ActivationQueueLimits
    limits: Mapping[str, TenantLimitsConfig]


@dataclass(slots=True, eq=False)
class _Replica:
    engine: Engine
    pod: Pod
    is_ready: bool = False
    is_draining: bool = False
    is_lost: bool = False


@dataclass(slots=True, eq=False)
class _Waiting:
    served: ServedRequest
    since_s: float
    timeout: Event


class ReplicaPool:
    """Routers, or replicas of a whole model.

    Args:
        loop: the clock.
        nodes: where replicas are placed.
        settings: the replicas.
        make_engine: makes an engine with these hooks.
        memory_bytes: memory in use of the whole system.
        on_ended: called with each request that was served or refused.
        slowdown: factor on the functions' time, of the rows of a step and the busy engines.
    """

    def __init__(
        self,
        loop: EventLoop,
        nodes: Nodes,
        settings: PoolSettings,
        make_engine: Callable[[EngineHooks], Engine],
        *,
        memory_bytes: Integral,
        on_ended: Callable[[ServedRequest], None],
        slowdown: Callable[[int, int], float] = lambda rows, n_busy: 1.0,
    ) -> None:
        self.fleet: FunctionFleet | None = None
        self.n_busy = 0
        self.n_ready = Integral(loop)
        self._loop = loop
        self._nodes = nodes
        self._settings = settings
        self._make_engine = make_engine
        self._memory_bytes = memory_bytes
        self._on_ended = on_ended
        self._slowdown = slowdown
        self._limiters = RateLimiters()
        self._replicas: list[_Replica] = []
        self._waiting: dict[ServedRequest, _Waiting] = {}
        self._autoscaler = FunctionAutoscaler.for_new_function(settings.scaling, now=loop.now)
        self._calls_before_s = 0.0
        self._calls_ended_s = 0.0
        self._is_paused = False
        for _ in range(settings.scaling.min_scale):
            self._start(start_s=0.0)

    def submit(self, served: ServedRequest) -> None:
        """Take a request that has just arrived."""
        request, now = served.request, self._loop.now
        limits = self._settings.limits.get(request.tenant)
        try:
            if limits is not None:
                limiter = self._limiters.get_or_create(request.tenant, limits, now, n_routers=1)
                limiter.count_request(now)
                limiter.reserve_tokens(request.n_prompt + request.n_output, now)
        except (RateLimitExceeded, RequestTooLarge) as error:
            self._refuse(served, type(error).__name__)
            return
        self._dispatch(served)

    def tick(self) -> None:
        """Decide the number of replicas, and pass the functions' load on."""
        now, settings = self._loop.now, self._settings.scaling
        self._autoscaler.observe(now, self.n_held)
        n_ready = sum(r.is_ready and not r.is_draining for r in self._replicas)
        desired = self._autoscaler.decide(now, ready=n_ready).desired
        self._scale(settings.clamp(desired))
        if self.fleet is not None:
            self.fleet.tick(self._last_calls_s(), is_awaited=bool(self._waiting))

    def is_idle(self) -> bool:
        """Return whether nothing changes without a request."""
        is_settled = all(r.is_ready and not r.is_draining for r in self._replicas)
        if self.n_held or not is_settled or not self._is_pool_idle():
            return False
        return self.fleet is None or self.fleet.is_idle()

    @property
    def n_held(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + sum(r.engine.n_held for r in self._replicas)

    def pause(self) -> None:
        """Stop all engines: what they compute with is gone."""
        self._is_paused = True
        for replica in self._replicas:
            replica.engine.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False
        for replica in self._replicas:
            replica.engine.resume()

    def on_functions_changed(self) -> None:
        """Stop the engines while functions are missing, and go on once they are there."""
        if self.fleet is None:
            return
        if self.fleet.activated_below_tokens > 1:
            if self._is_paused:
                self.resume()
        elif any(r.engine.n_held for r in self._replicas):
            self.pause()
            self.fleet.activate()
        self._release()

    def _is_pool_idle(self) -> bool:
        n_ready = sum(r.is_ready for r in self._replicas)
        return self._autoscaler.is_idle(self._loop.now, ready=n_ready) and n_ready == (
            self._autoscaler.desired
        )

    def _dispatch(self, served: ServedRequest) -> None:
        if self._can_start(served):
            self._activate_rest(served)
            self._admit(served)
            return
        limits = self._settings.activation
        if len(self._waiting) >= limits.max_requests:
            self._refuse(served, "ActivationQueueFull")
            return
        now = self._loop.now
        timeout = self._loop.after(limits.timeout_s, lambda: self._on_timeout(served))
        self._waiting[served] = _Waiting(served, now, timeout)
        if self._autoscaler.desired == 0:
            self._autoscaler.activate(now)
            self._scale(self._autoscaler.desired)
        if self.fleet is not None:
            self.fleet.activate()

    def _activate_rest(self, served: ServedRequest) -> None:
        """Activate functions that the prompt does not need but the answer probably does."""
        request = served.request
        n_tokens = request.n_prompt + request.n_output
        if self.fleet is not None and n_tokens >= self.fleet.activated_below_tokens:
            self.fleet.activate()

    def _can_start(self, served: ServedRequest) -> bool:
        has_functions = (
            self.fleet is None or served.request.n_prompt < self.fleet.activated_below_tokens
        )
        return has_functions and self._pick() is not None

    def _pick(self) -> _Replica | None:
        """Return the ready replica with the fewest requests, or None."""
        ready = [r for r in self._replicas if r.is_ready and not r.is_draining]
        return min(ready, key=lambda r: r.engine.n_held, default=None)

    def _admit(self, served: ServedRequest) -> None:
        replica = self._pick()
        assert replica is not None
        served.admitted_s = self._loop.now
        try:
            replica.engine.submit(served)
        except TenantQueueFull as error:
            self._refuse(served, type(error).__name__)

    def _release(self) -> None:
        """Admit the waiting requests whose functions and router are there now."""
        for served, waiting in list(self._waiting.items()):
            if not self._can_start(served):
                continue
            del self._waiting[served]
            waiting.timeout.cancel()
            served.cold_start_s += self._loop.now - waiting.since_s
            self._admit(served)

    def _on_timeout(self, served: ServedRequest) -> None:
        if self._waiting.pop(served, None) is not None:
            self._refuse(served, "ActivationTimeout")

    def _refuse(self, served: ServedRequest, reason: str) -> None:
        served.refusal = reason
        self._on_ended(served)

    def _on_finished(self, served: ServedRequest) -> None:
        self._on_ended(served)
        ended = [r for r in self._replicas if r.is_draining and not r.is_lost]
        for replica in [r for r in ended if not r.engine.n_held]:
            self._stop(replica)

    def _scale(self, desired: int) -> None:
        alive = [r for r in self._replicas if not r.is_draining]  # a lost one until that is known
        present = sorted((r for r in alive if not r.is_lost), key=lambda r: r.engine.n_held)
        for replica in present[: max(0, len(alive) - desired)]:
            replica.is_draining = True
            if not replica.engine.n_held:
                self._stop(replica)
        for _ in range(desired - len(alive)):
            if not self._start(start_s=self._settings.start_s):
                return

    def _start(self, *, start_s: float) -> bool:
        """Place a replica; False if no node has room, which the next tick tries again."""
        settings = self._settings
        engine = self._make_engine(
            EngineHooks(self._on_finished, self._count_busy, self._experts_slowdown)
        )
        pod = Pod(-(-settings.memory_bytes // settings.n_nodes), lambda: self._on_lost(replica))
        replica = _Replica(engine, pod)
        if not self._nodes.place(pod, n_nodes=settings.n_nodes):
            return False
        self._replicas.append(replica)
        self._memory_bytes.add(settings.memory_bytes)
        if start_s:
            self._loop.after(start_s, lambda: self._on_ready(replica))
        else:
            self._on_ready(replica)
        return True

    def _on_ready(self, replica: _Replica) -> None:
        if replica.is_lost or replica not in self._replicas:
            return
        replica.is_ready = True
        self.n_ready.add(1)
        if self._is_paused:
            replica.engine.pause()
        self._release()

    def _stop(self, replica: _Replica) -> None:
        self._replicas.remove(replica)
        self._calls_ended_s += replica.engine.read_totals().calls_s
        self._nodes.remove(replica.pod)
        self._memory_bytes.add(-self._settings.memory_bytes)
        if replica.is_ready:
            self.n_ready.add(-1)

    def _on_lost(self, replica: _Replica) -> None:
        """Its node is gone: the gateway sends its requests to other routers."""
        replica.is_lost = True
        self._calls_ended_s += replica.engine.read_totals().calls_s
        held = replica.engine.take_all()
        self._memory_bytes.add(-self._settings.memory_bytes)
        if replica.is_ready:
            self.n_ready.add(-1)
        replica.is_ready = False
        self._loop.after(LOSS_DETECTED_S, lambda: self._forget(replica))
        for served in held:
            served.n_moved += 1
            self._dispatch(served)

    def _forget(self, replica: _Replica) -> None:
        self._replicas.remove(replica)

    def _count_busy(self, is_busy: bool) -> None:
        self.n_busy += 1 if is_busy else -1

    def _experts_slowdown(self, rows: int) -> float:
        return self._slowdown(rows, max(1, self.n_busy))

    def _last_calls_s(self) -> float:
        """Return the seconds that calls of all layers were in flight since the last tick."""
        calls_s = self._calls_ended_s + sum(
            r.engine.read_totals().calls_s for r in self._replicas if not r.is_lost
        )
        last_s, self._calls_before_s = calls_s - self._calls_before_s, calls_s
        return max(0.0, last_s)
