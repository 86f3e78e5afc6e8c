"""One simulated system: nodes, replicas and functions, a ticker, and the traffic that it gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.simulation.engine import ServedRequest
from benchmarks.simulation.events import EventLoop, Integral
from benchmarks.simulation.nodes import Nodes
from benchmarks.simulation.routers import ReplicaPool
from benchmarks.simulation.traffic import ClusterSpec, NodeLossSpec, Traffic

DRAIN_S = 3600.0  # after the traffic: what is not answered by then is reported as unfinished


@dataclass(frozen=True, slots=True)
class Run:
    """What one simulation came to; integrals are over the traffic's duration.

    Attributes:
        name: strategy.
        requests: every request of the traffic, in order of arrival.
        duration_s: duration of the traffic.
        gb_seconds: memory in use, integrated.
        reserved_gb_seconds: memory reserved in nodes, integrated.
        node_seconds: nodes that held anything, integrated.
        max_gb: highest memory in use.
        max_nodes: most nodes in use at once.
        max_node_bytes: highest memory reserved in one node, at any time.
        replica_seconds: ready routers or replicas, integrated.
        request_s: what a request takes beyond the engine.
    """

    name: str
    requests: Sequence[ServedRequest]
    duration_s: float
    gb_seconds: float
    reserved_gb_seconds: float
    node_seconds: float
    max_gb: float
    max_nodes: int
    max_node_bytes: int
    replica_seconds: float
    request_s: float


class System:
    """Runs traffic through one strategy.

    Args:
        name: the strategy.
        cluster: the nodes.
        request_s: what a request takes beyond the engine.
    """

    def __init__(self, name: str, cluster: ClusterSpec, *, request_s: float) -> None:
        self.loop = EventLoop()
        self.nodes = Nodes(
            self.loop,
            cluster.nodes,
            cluster.node_memory_bytes,
            is_spreading=cluster.packing == "LeastAllocated",
        )
        self.memory_bytes = Integral(self.loop)
        self.pool: ReplicaPool | None = None
        self._name = name
        self._request_s = request_s
        self._n_open = 0
        self._is_ticking = False

    def on_ended(self, served: ServedRequest) -> None:
        """Count a request that was served or refused."""
        self._n_open -= 1

    def run(self, traffic: Traffic, *, losses: Sequence[NodeLossSpec] = ()) -> Run:
        """Run the traffic to its end, and on until every request is answered."""
        served = [ServedRequest(request) for request in traffic.requests]
        self._n_open = len(served)
        self._schedule_arrivals(served)
        for loss in losses:
            self.loop.at(loss.at_seconds, self._loss(loss.nodes))
        self._ensure_ticking()
        self.loop.run_until(traffic.duration_s)
        run = self._measure(served, traffic.duration_s)
        deadline_s = traffic.duration_s + DRAIN_S
        while self._n_open and self.loop.now < deadline_s:
            self.loop.run_until(self.loop.now + 1.0)
        return run

    def _measure(self, served: Sequence[ServedRequest], duration_s: float) -> Run:
        assert self.pool is not None
        return Run(
            self._name,
            served,
            duration_s,
            gb_seconds=self.memory_bytes.total / 1e9,
            reserved_gb_seconds=self.nodes.reserved_bytes.total / 1e9,
            node_seconds=self.nodes.in_use.total,
            max_gb=self.memory_bytes.maximum / 1e9,
            max_nodes=int(self.nodes.in_use.maximum),
            max_node_bytes=self.nodes.max_used_bytes,
            replica_seconds=self.pool.n_ready.total,
            request_s=self._request_s,
        )

    def _schedule_arrivals(self, served: Sequence[ServedRequest]) -> None:
        arrivals = iter(served)

        def schedule_next() -> None:
            following = next(arrivals, None)
            if following is not None:
                self.loop.at(following.request.arrival_s, lambda: arrive(following))

        def arrive(one: ServedRequest) -> None:
            assert self.pool is not None
            self._ensure_ticking()
            self.pool.submit(one)
            schedule_next()

        schedule_next()

    def _loss(self, n_nodes: int) -> Callable[[], None]:
        def lose() -> None:
            self._ensure_ticking()
            for _ in range(n_nodes):
                self.nodes.lose_fullest()

        return lose

    def _ensure_ticking(self) -> None:
        """Tick in the middle of each second, as the control process does, until all is idle."""
        if not self._is_ticking:
            self._is_ticking = True
            if self.pool is not None and self.pool.fleet is not None:
                self.pool.fleet.resume()
            now = self.loop.now
            self.loop.at(math.floor(now + 0.5) + 0.5, self._tick)

    def _tick(self) -> None:
        assert self.pool is not None
        self.pool.tick()
        if self.pool.is_idle():
            self._is_ticking = False
        else:
            self.loop.after(1.0, self._tick)
