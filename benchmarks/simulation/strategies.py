"""What is compared: FaaSMoE, whole-model replicas on Knative, and resident expert parallelism.

All three serve with the same engine, limits and nodes. They differ in what a replica holds, in how
long it takes until it is there, and in whether it can be given back. The two others are given the
benefit of the doubt: tensor parallelism over the nodes of a replica without any cost, and experts
in process without calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.engine import Engine, EngineHooks, EngineLimits
from benchmarks.simulation.errors import SimulationError
from benchmarks.simulation.fleet import LOSS_DETECTED_S, TIMING, FleetModel, FunctionFleet
from benchmarks.simulation.geometry import ModelGeometry
from benchmarks.simulation.nodes import Pod
from benchmarks.simulation.routers import PoolSettings, ReplicaPool
from benchmarks.simulation.step_time import StepTime
from benchmarks.simulation.system import System
from benchmarks.simulation.traffic import ClusterSpec

from faasmoe_operator.api.v1alpha1.moemodel import MoEModelSpec
from faasmoe_operator.control.functions import managed_functions, partitioning_of
from faasmoe_operator.kube.manifests.resources import (
    IDLE_SANDBOX_CPU_MILLIS,
    SANDBOX_RUNTIME_CPU_BYTES,
)
from faasmoe_operator.plan.fleet import FleetSettings, SandboxShape
from faasmoe_operator.plan.functions import plan_functions
from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy
from faasmoe_operator.scaling import ScalingSettings
from faasmoe_router.control.activator import ActivationQueueLimits
from faasmoe_router.dispatch.routing import activation_threshold_tokens
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.tenants.registry import TenantLimitsConfig

DEFAULT_KV_CACHE_BYTES = 2 << 30  # as the router's
CONTAINER_TARGET_PERCENT = 70.0  # Knative's default utilisation of containerConcurrency


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything but the traffic.

    Attributes:
        spec: the MoEModel's spec.
        geometry: the model's sizes.
        costs: costs of one node of the cluster.
        cluster: the nodes.
        kv_cache_bytes: memory of a router's KV cache; None for the spec's or the router's default.
    """

    spec: MoEModelSpec
    geometry: ModelGeometry
    costs: Calibration
    cluster: ClusterSpec
    kv_cache_bytes: int | None = None

    @property
    def limits(self) -> EngineLimits:
        """Limits of an engine."""
        router = self.spec.router
        return EngineLimits(router.max_num_seqs, router.max_num_batched_tokens, router.max_waiting)

    @property
    def shares(self) -> Mapping[str, Share]:
        """The tenants' shares in the fair queue."""
        return {
            t.name: Share(
                t.weight,
                t.priority,
                max_running=t.limits.max_concurrent_requests,
                max_queued=t.limits.max_queued_requests,
            )
            for t in self.spec.tenants
        }

    @property
    def tenant_limits(self) -> Mapping[str, TenantLimitsConfig]:
        """The tenants' limits."""
        return {
            t.name: TenantLimitsConfig.model_validate(t.limits.to_object())
            for t in self.spec.tenants
        }

    @property
    def router_bytes(self) -> int:
        """Memory of a router: its weights, KV cache and process."""
        kv_bytes = self.kv_cache_bytes
        if kv_bytes is None:
            kv_bytes = self.spec.router.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
        return self.geometry.router_bytes + kv_bytes + round(self.costs.router_bytes)

    @property
    def n_min_routers(self) -> int:
        """Routers that stay when idle; all of them unless the profile says otherwise."""
        least = self.cluster.min_routers
        return self.cluster.routers if least is None else min(least, self.cluster.routers)

    def start_s(self, weights_bytes: float) -> float:
        """Return how long a process with these weights on one node takes to start."""
        return self.costs.router_start_s + weights_bytes / self.costs.weights_bytes_per_s

    def pool_settings(
        self, scaling: ScalingSettings, *, memory_bytes: int, n_nodes: int, start_s: float
    ) -> PoolSettings:
        """Return the settings of replicas."""
        activation = ActivationQueueLimits(timeout_s=self.cluster.activation_timeout_seconds)
        return PoolSettings(
            scaling, memory_bytes, n_nodes, start_s, activation, limits=self.tenant_limits
        )

    def system(self, name: str) -> System:
        """Return an empty system of the cluster's nodes."""
        system = System(name, self.cluster, request_s=self.costs.request_s)
        system.memory_bytes.add(self.costs.system_bytes)
        return system

    def engine_factory(
        self, system: System, step_time: StepTime
    ) -> Callable[[EngineHooks], Engine]:
        """Return what makes an engine of a system."""
        return lambda hooks: Engine(
            system.loop, self.limits, step_time, shares=self.shares, hooks=hooks
        )


def functions(scenario: Scenario) -> System:
    """Return FaaSMoE: routers, and expert functions that are attached on demand."""
    system, cluster = scenario.system("functions"), scenario.cluster
    model = fleet_model(scenario)
    n_hosts = _expected_hosts(scenario, model)
    blocks_per_layer = len(model.functions) * _layers_each(model) / len(scenario.geometry.layers)
    parallel = max(1.0, min(blocks_per_layer, n_hosts))
    round_trip_s = cluster.network_round_trip_seconds if cluster.nodes > 1 else 0.0
    step_time = StepTime(
        scenario.geometry,
        scenario.costs,
        call_s=scenario.costs.call_s + round_trip_s,
        expert_parallel=parallel,
    )
    scaling = _fixed_or_scaled(scenario)
    settings = scenario.pool_settings(
        scaling,
        memory_bytes=scenario.router_bytes,
        n_nodes=_nodes_for(scenario, scenario.router_bytes),
        start_s=scenario.start_s(scenario.geometry.router_bytes),
    )

    def slowdown(rows: int, n_busy: int) -> float:
        return max(1.0, n_busy * step_time.experts_share(rows) * parallel / n_hosts)

    pool = ReplicaPool(
        system.loop,
        system.nodes,
        settings,
        scenario.engine_factory(system, step_time),
        memory_bytes=system.memory_bytes,
        on_ended=system.on_ended,
        slowdown=slowdown,
    )
    pool.fleet = FunctionFleet(
        system.loop,
        system.nodes,
        model,
        scenario.costs,
        memory_bytes=system.memory_bytes,
        on_changed=pool.on_functions_changed,
    )
    system.pool = pool
    return system


def whole_model(scenario: Scenario) -> System:
    """Return replicas of the whole model, which Knative's KPA scales from and to zero."""
    system, geometry = scenario.system("whole-model replicas"), scenario.geometry
    memory_bytes = scenario.router_bytes + geometry.expert_bytes
    n_nodes = _nodes_for(scenario, memory_bytes)
    if n_nodes > scenario.cluster.nodes:
        raise SimulationError(
            "cluster.nodes", got=scenario.cluster.nodes, expected=f"{n_nodes} for one whole model"
        )
    scaling = ScalingSettings(
        max_scale=scenario.cluster.nodes // n_nodes,
        initial_scale=0,
        target=float(scenario.limits.max_num_seqs),
        target_utilization_percentage=CONTAINER_TARGET_PERCENT,
    )
    step_time = StepTime(
        geometry,
        scenario.costs,
        call_s=0.0,
        expert_parallel=n_nodes,
        dense_parallel=n_nodes,
    )
    system.pool = ReplicaPool(
        system.loop,
        system.nodes,
        scenario.pool_settings(
            scaling,
            memory_bytes=memory_bytes,
            n_nodes=n_nodes,
            start_s=scenario.start_s(geometry.weight_bytes / n_nodes),
        ),
        scenario.engine_factory(system, step_time),
        memory_bytes=system.memory_bytes,
        on_ended=system.on_ended,
    )
    return system


def resident_experts(scenario: Scenario) -> System:
    """Return expert parallelism: all experts resident over nodes, as many engines as routers."""
    system, geometry = scenario.system("resident expert parallelism"), scenario.geometry
    n_hosts = _nodes_for(scenario, geometry.expert_bytes)
    routers = scenario.cluster.routers
    round_trip_s = scenario.cluster.network_round_trip_seconds if n_hosts > 1 else 0.0
    step_time = StepTime(geometry, scenario.costs, call_s=round_trip_s, expert_parallel=n_hosts)
    system.pool = ReplicaPool(
        system.loop,
        system.nodes,
        scenario.pool_settings(
            ScalingSettings(min_scale=routers, max_scale=routers, initial_scale=routers),
            memory_bytes=scenario.router_bytes,
            n_nodes=_nodes_for(scenario, scenario.router_bytes),
            start_s=scenario.start_s(geometry.router_bytes),
        ),
        scenario.engine_factory(system, step_time),
        memory_bytes=system.memory_bytes,
        on_ended=system.on_ended,
        slowdown=lambda rows, n_busy: max(1.0, n_busy * step_time.experts_share(rows)),
    )
    ResidentExperts(scenario, system, n_hosts).place()
    return system


class ResidentExperts:
    """The experts that never leave memory; those of a lost node are loaded on another one.

    Args:
        scenario: model, nodes and costs.
        system: the system that they are part of.
        n_hosts: nodes that they are spread over.
    """

    def __init__(self, scenario: Scenario, system: System, n_hosts: int) -> None:
        self._scenario = scenario
        self._system = system
        self._n_missing = 0
        self._pods = [self._pod() for _ in range(n_hosts)]
        self._part_bytes = self._pods[0].request_bytes

    def place(self) -> None:
        """Place all experts; raises SimulationError if the nodes do not hold them."""
        for pod in self._pods:
            if not self._system.nodes.place(pod):
                n_hosts = len(self._pods)
                raise SimulationError(
                    "cluster.nodes",
                    got=self._scenario.cluster.nodes,
                    expected=f"{n_hosts} for all experts, besides those of the routers",
                )
            self._system.memory_bytes.add(pod.request_bytes)

    def _pod(self) -> Pod:
        geometry, memory = self._scenario.geometry, self._scenario.cluster.node_memory_bytes
        return Pod(-(-geometry.expert_bytes // -(-geometry.expert_bytes // memory)), self._on_lost)

    def _on_lost(self) -> None:
        pool = self._system.pool
        assert pool is not None
        self._n_missing += 1
        self._system.memory_bytes.add(-self._part_bytes)
        pool.pause()
        self._system.loop.after(LOSS_DETECTED_S, self._replace)

    def _replace(self) -> None:
        pod = self._pod()
        if not self._system.nodes.place(pod):
            self._system.loop.after(1.0, self._replace)
            return
        self._system.memory_bytes.add(self._part_bytes)
        self._system.loop.after(self._scenario.start_s(pod.request_bytes), self._on_replaced)

    def _on_replaced(self) -> None:
        self._n_missing -= 1
        if self._n_missing == 0 and self._system.pool is not None:
            self._system.pool.resume()


STRATEGIES: Mapping[str, Callable[[Scenario], System]] = {
    "functions": functions,
    "whole-model": whole_model,
    "resident": resident_experts,
}


def fleet_model(scenario: Scenario) -> FleetModel:
    """Return the functions of a MoEModel of this geometry, planned as the operator plans them."""
    spec, geometry = scenario.spec, scenario.geometry
    specs = plan_functions(
        geometry.layers,
        partitioning_of(spec.granularity),
        model_digest=geometry.name,
        key=b"simulation",
    )
    planned = managed_functions(specs, geometry.layers, scaling=spec.experts.scaling)
    by_index = {layer.index: layer for layer in geometry.layers}
    thresholds = tuple(
        activation_threshold_tokens(
            len(f.spec.experts),
            [(by_index[i].num_experts, by_index[i].top_k) for i in f.spec.layers],
        )
        for f in planned
    )
    capacity = spec.experts.functions_per_sandbox
    weights_bytes = capacity * max(f.size_bytes for f in planned)
    overhead_bytes = scenario.costs.runtime_bytes + scenario.costs.sandbox_bytes
    factor = scenario.costs.attached_factor
    return FleetModel(
        planned,
        thresholds,
        FleetSettings(
            "simulated",
            warm_pool=spec.experts.warm_pool,
            shape=SandboxShape(capacity),
            start_deadline_s=TIMING.start_deadline_s,
            memory_limit_bytes=spec.experts.memory_bytes,
        ),
        n_layers=len(geometry.layers),
        sandbox_request_bytes=math.ceil(weights_bytes * max(1.0, factor) + overhead_bytes),
        is_one_machine=scenario.cluster.nodes == 1,
        resize=ResizePolicy(
            PodRequests(IDLE_SANDBOX_CPU_MILLIS, SANDBOX_RUNTIME_CPU_BYTES),
            PodRequests(spec.experts.threads * 1000, SANDBOX_RUNTIME_CPU_BYTES + weights_bytes),
        ),
    )


def _fixed_or_scaled(scenario: Scenario) -> ScalingSettings:
    least = scenario.n_min_routers
    return ScalingSettings(
        min_scale=least,
        max_scale=scenario.cluster.routers,
        initial_scale=least,
        target=float(scenario.limits.max_num_seqs),
        target_utilization_percentage=CONTAINER_TARGET_PERCENT,
    )


def _nodes_for(scenario: Scenario, memory_bytes: int) -> int:
    return max(1, -(-memory_bytes // scenario.cluster.node_memory_bytes))


def _layers_each(model: FleetModel) -> float:
    return sum(len(f.spec.layers) for f in model.functions) / len(model.functions)


def _expected_hosts(scenario: Scenario, model: FleetModel) -> int:
    """Return how many nodes the sandboxes fill when all functions are attached once."""
    per_node = scenario.cluster.node_memory_bytes // model.sandbox_request_bytes
    if per_node < 1:
        raise SimulationError(
            "cluster.nodeMemory",
            got=scenario.cluster.node_memory,
            expected=f"{model.sandbox_request_bytes} bytes or more, for one sandbox of "
            f"{scenario.spec.experts.functions_per_sandbox} functions",
        )
    n_sandboxes = -(-len(model.functions) // scenario.spec.experts.functions_per_sandbox)
    n_hosts = n_sandboxes
    if scenario.cluster.packing == "MostAllocated":
        n_hosts = -(-n_sandboxes // per_node)
    return max(1, min(scenario.cluster.nodes, n_hosts))
